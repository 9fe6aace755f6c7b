// Sums and maxima over the lanes of a warp and the threads of a block, in an order that never changes.
#pragma once
#include "../activation.cuh"

namespace dbrxq {

constexpr uint32_t kEveryLane = 0xffffffffu;

// Of all 32 lanes, in each of them.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) value += __shfl_xor_sync(kEveryLane, value, step);
  return value;
}
__device__ __forceinline__ float warp_maximum(float value) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    const float other = __shfl_xor_sync(kEveryLane, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Of all threads, in each of them; `box` is shared memory of a float a warp, free again when all have returned.
template <int Warps>
__device__ __forceinline__ float block_sum(float value, float (&box)[Warps]) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) box[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Warps; ++w) sum += box[w];
  __syncthreads();
  return sum;
}

template <int Warps>
__device__ __forceinline__ float block_maximum(float value, float (&box)[Warps]) {
  value = warp_maximum(value);
  if (threadIdx.x % 32 == 0) box[threadIdx.x / 32] = value;
  __syncthreads();
  float most = box[0];
#pragma unroll
  for (int w = 1; w < Warps; ++w) most = box[w] > most ? box[w] : most;
  __syncthreads();
  return most;
}

// What a norm subtracts and multiplies by, of a row of `count` floats; called by all threads of a block.
struct Moments {
  float mean, factor;
};
template <int Warps>
__device__ __forceinline__ Moments moments_of(const float* x, int64_t count, bool layer_norm, float eps,
                                              float (&box)[Warps]) {
  float mean = 0.0f;
  if (layer_norm) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < count; i += 32 * Warps) sum += x[i];
    mean = block_sum(sum, box) / static_cast<float>(count);
  }
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += 32 * Warps) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / sqrtf(block_sum(squares, box) / static_cast<float>(count) + eps)};
}

}  // namespace dbrxq
