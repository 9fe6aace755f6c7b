// A linear in device memory, as the kernels walk it.
#pragma once
#include "dbrxq.h"
#include "device.cuh"
#include "tile_layout.h"

namespace dbrxq {

using Linear = dbrxq_cuda_linear;

__host__ __device__ inline int64_t column_tiles(int64_t n) { return (n + tile::kColumns - 1) / tile::kColumns; }
__host__ __device__ inline int unit_count(int64_t k) {
  return static_cast<int>((k + layout::kUnitRows - 1) / layout::kUnitRows);
}

// The 16-byte vectors of a tile's word row: 32, one a lane, but in a last tile of fewer columns.
__device__ __forceinline__ int lanes_in_tile(int64_t n, int column_tile) {
  const int64_t left = n / 4 - static_cast<int64_t>(column_tile) * 32;
  return left < 32 ? static_cast<int>(left) : 32;
}
// Whose words a lane reads: its own, or those of the same rows in the last columns, when it has no columns itself.
__device__ __forceinline__ int reading_lane(int lane, int lanes) { return lane < lanes ? lane : lanes - 4 + lane % 4; }

// Width of a unit and the word row where it starts.
struct Place {
  int bits;
  int word;
};

__device__ __forceinline__ Place locate(const int32_t (&first_unit)[7], int unit) {
  int word = 0;
#pragma unroll
  for (int i = 0; i < tile::kWidthCount - 1; ++i) {
    const int begin = first_unit[i], end = first_unit[i + 1];
    if (unit < end) return {tile::width(i), word + (unit - begin) * tile::width(i)};
    word += (end - begin) * tile::width(i);
  }
  return {2, word + (unit - first_unit[5]) * 2};
}

__host__ __device__ inline int word_rows(const int32_t (&first_unit)[7]) {
  int words = 0;
#pragma unroll
  for (int i = 0; i < tile::kWidthCount; ++i) words += (first_unit[i + 1] - first_unit[i]) * tile::width(i);
  return words;
}

// The unit that holds word row `word`: slices of equal words are slices of equal time.
__device__ __forceinline__ int unit_at_word(const int32_t (&first_unit)[7], int word) {
#pragma unroll
  for (int i = 0; i < tile::kWidthCount; ++i) {
    const int words = (first_unit[i + 1] - first_unit[i]) * tile::width(i);
    if (word < words) return first_unit[i] + word / tile::width(i);
    word -= words;
  }
  return first_unit[6];
}

// Units [begin, end) of slice `index` of `count`.
struct Slice {
  int begin, end;
};
__device__ __forceinline__ Slice slice_of(const int32_t (&first_unit)[7], int index, int count) {
  const int64_t words = word_rows(first_unit);
  return {unit_at_word(first_unit, static_cast<int>(words * index / count)),
          unit_at_word(first_unit, static_cast<int>(words * (index + 1) / count))};
}

// A warp's share of the units of one width, and the word row of the first.
struct UnitRange {
  int begin, end, word;
};

// The units of width `index` in a slice.
__device__ __forceinline__ UnitRange range_of(const int32_t (&first_unit)[7], const Slice& slice, int index) {
  const int first = first_unit[index], last = first_unit[index + 1];
  const int begin = slice.begin > first ? slice.begin : first, end = slice.end < last ? slice.end : last;
  return {begin, end, begin < end ? locate(first_unit, begin).word : 0};
}

// Units under way in registers: a unit of b bits takes 4 b registers a lane, and 32 is what they may have.
__host__ __device__ constexpr int depth(int bits) { return bits >= 5 ? 1 : 2; }

template <int Bits>
struct UnitWords {
  uint4 at[Bits];
};

template <int Bits>
__device__ __forceinline__ void fetch(UnitWords<Bits>& words, const uint4* from, int stride) {
#pragma unroll
  for (int i = 0; i < Bits; ++i) words.at[i] = load_once(from + i * stride);
}

}  // namespace dbrxq
