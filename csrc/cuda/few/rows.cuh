// Activations on their way into a product: statistics of a token, and a warp's units gathered into packed order.
//
//   staged[unit][row][r] = half((x[token][permutation[32 unit + r]] - minus) * times * norm * factor)
//
// so that a product's lane reads the 8 rows it owns as one 16-byte load (tile_layout.h); the sum of the token is then
// multiplied by `back`. fp16 that is neither normalized nor folded (folded.cuh, whose 2^-o is `factor`) is taken as it is; all else moves by a power of two, in `times` and `back`, so that its largest magnitude is in
// [2^14, 2^15). Two parts of a value take two rows, the second with what the first left, times 2^11.
#pragma once
#include "activation.cuh"
#include "few.cuh"
#include "folded.cuh"
#include "reduce.cuh"

namespace dbrxq {

constexpr int kFewWarps = 4, kFewThreads = 32 * kFewWarps;
constexpr int kStagedRows = 48;  // rows times units that a warp gathers at a time: a multiple of 16

// How a token's values become halves.
struct Row {
  int64_t source;  // of its first value in x
  float minus, times, back;
};

// The row of a token of x. All threads of the block.
__device__ inline Row measure(const FewInput& input, int token, float (&box)[kFewWarps]) {
  Row row = {token * input.k, 0.0f, 1.0f, 1.0f};
  if (!input.norm && input.dtype == DBRXQ_FLOAT16 && !input.folded) return row;
  const int64_t first = row.source / 8, eights = input.k / 8;
  const float count = static_cast<float>(input.k);
  if (input.norm && input.layer_norm) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < eights; i += kFewThreads) {
      float values[8];
      load_eight(input.x, first + i, input.dtype, values);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += values[j];
    }
    row.minus = block_sum(sum, box) / count;
  }
  float squares = 0.0f, largest = 0.0f;
  for (int64_t i = threadIdx.x; i < eights; i += kFewThreads) {
    float values[8], gains[8];
    load_eight(input.x, first + i, input.dtype, values);
    if (input.norm) load_eight(input.norm, i, input.norm_dtype, gains);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float value = values[j] - row.minus;
      squares += value * value;
      const float magnitude = fabsf(input.norm ? value * gains[j] : value);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  largest = block_maximum(largest, box);
  if (input.norm) {
    row.times = 1.0f / sqrtf(block_sum(squares, box) / count + input.eps);
    largest *= row.times;
  }
  const int e = exponent_to_half_range(largest);
  row.times *= power_of_two(e);
  row.back = power_of_two(-e);
  return row;
}

// What a warp has in shared memory for its units.
struct Staged {
  alignas(16) uint16_t staged[kStagedRows * layout::kUnitRows];
  uint4 starts[kStagedRows / 2];         // what sums of two rows start from, twice (folded.cuh)
  uint32_t unit_scale[kStagedRows + 1];  // of the units, and of the one that follows
  FoldedScales scales;
  UnitRange ranges[tile::kWidthCount];
  int stride;  // rows from unit to unit: those in use, filled up to 2, 4 or 8
};

__device__ __forceinline__ int staged_stride(int rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : 8; }

// Units first .. first + count - 1 of the rows of `tokens` tokens. All lanes of a warp; it sees the result after a warp
// barrier.
__device__ __forceinline__ void gather(const FewInput& input, const Linear& linear, const Row* rows, int tokens,
                                       int first, int count, int end, float factor, Staged& to) {
  constexpr int kTogether = 2;  // units whose loads are under way
  const int lane = threadIdx.x % 32;
  for (int u = lane; u <= count; u += 32) {
    const int unit = first + u < end ? first + u : end - 1;
    to.unit_scale[u] = static_cast<const uint32_t*>(linear.unit_scale)[unit];
  }
  const int32_t* permutation = static_cast<const int32_t*>(linear.permutation) + first * layout::kUnitRows + lane;
  for (int u = 0; u < count; u += kTogether) {
    int channels[kTogether];
    float gains[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) channels[i] = u + i < count ? permutation[(u + i) * layout::kUnitRows] : -1;
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      gains[i] = input.norm && channels[i] >= 0 ? factor * load(input.norm, channels[i], input.norm_dtype) : factor;
    for (int t = 0; t < tokens; ++t) {
      const Row row = rows[t];
      float values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (channels[i] >= 0) values[i] = load(input.x, row.source + channels[i], input.dtype);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (u + i >= count) break;
        const float value = channels[i] < 0 ? 0.0f : (values[i] - row.minus) * row.times * gains[i];
        const uint16_t half = to_half(value);
        uint16_t* place = to.staged + ((u + i) * to.stride + t * input.parts) * layout::kUnitRows + lane;
        place[0] = half;
        if (input.parts == 2) place[layout::kUnitRows] = second_half(value, half);
      }
    }
  }
}

}  // namespace dbrxq
