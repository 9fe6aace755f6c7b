// Activation functions, and activations as numbers: loaded and stored in any dtype, moved into half's range.
#pragma once
#include "dbrxq.h"
#include "device.cuh"

namespace dbrxq {

__device__ __forceinline__ float activate(float x, int activation) {
  if (activation == DBRXQ_SILU) return x / (1.0f + expf(-x));
  if (activation == DBRXQ_GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if (activation == DBRXQ_GELU_TANH)
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x > 0.0f || x != x ? x : 0.0f;  // DBRXQ_RELU
}

// Rounded to nearest even; a NaN stays one.
__device__ __forceinline__ uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

__device__ __forceinline__ float load(const void* x, int64_t index, int dtype) {
  if (dtype == DBRXQ_FLOAT32) return static_cast<const float*>(x)[index];
  const uint16_t bits = static_cast<const uint16_t*>(x)[index];
  return dtype == DBRXQ_FLOAT16 ? from_half(bits) : from_bfloat16(bits);
}

// Elements 8 index .. 8 index + 7 of an array that is aligned to 16 bytes.
__device__ __forceinline__ void load_eight(const void* x, int64_t index, int dtype, float (&values)[8]) {
  if (dtype == DBRXQ_FLOAT32) {
    const uint4* from = static_cast<const uint4*>(x) + 2 * index;
    const uint4 a = from[0], b = from[1];
    const uint32_t bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = float_of(bits[i]);
    return;
  }
  const uint4 v = static_cast<const uint4*>(x)[index];
  const uint32_t bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint16_t half = static_cast<uint16_t>(bits[i / 2] >> (16 * (i % 2)));
    values[i] = dtype == DBRXQ_FLOAT16 ? from_half(half) : from_bfloat16(half);
  }
}

__device__ __forceinline__ void store(void* y, int64_t index, int dtype, float value) {
  if (dtype == DBRXQ_FLOAT32) {
    static_cast<float*>(y)[index] = value;
  } else if (dtype == DBRXQ_FLOAT16) {
    static_cast<uint16_t*>(y)[index] = to_half(value);
  } else {
    static_cast<uint16_t*>(y)[index] = to_bfloat16(value);
  }
}

__device__ __forceinline__ float power_of_two(int e) { return float_of(static_cast<uint32_t>(e + 127) << 23); }

// The e that takes the largest magnitude of a row to [2^14, 2^15): a bf16 in halves then loses nothing that is larger
// than 2^-38 of that. 0 where there is none to go by (all zero, or not finite).
__device__ __forceinline__ int exponent_to_half_range(float largest) {
  const int biased = static_cast<int>(bits_of(largest) >> 23);
  if (largest == 0.0f || biased == 255) return 0;
  const int e = 14 + 127 - biased;
  return e < 126 ? e : 126;
}

constexpr float kSecondPart = 1.0f / 2048;  // one half holds 11 bits: the second continues where the first stops

// What the first half of a value leaves, as the second half.
__device__ __forceinline__ uint16_t second_half(float value, uint16_t first) {
  const float rest = value - from_half(first);
  return rest - rest == 0.0f ? to_half(rest / kSecondPart) : static_cast<uint16_t>(0);
}

}  // namespace dbrxq
