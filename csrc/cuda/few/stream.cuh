// A warp's way through its units of a piece: activations gathered ahead, words on their way into registers, sums.
#pragma once
#include "../decode.cuh"
#include "rows.cuh"

namespace dbrxq {

// Where a lane reads.
struct Lane {
  const uint4* words;  // of word row 0
  int words_stride;    // uint4s from word row to word row, and four times the uint2s from group to group
  const uint2* codes;  // of group 0
  const uint32_t* unit_scale;
  const int32_t* permutation;
  int tokens, rows;       // of the piece
  int row;                // row g, or the last in use, whose sum nobody reads
  const Row* token_rows;  // in shared memory
  uint16_t* staged;       // of the warp, in shared memory
};

struct UnitScales {
  uint2 codes;
  uint32_t scale;  // group and scale_max, as in unit_scale
};
__device__ __forceinline__ UnitScales fetch_scales(const Lane& lane, int unit) {
  const uint32_t scale = lane.unit_scale[unit];
  return {lane.codes[static_cast<int>(scale & 0xffffu) * (lane.words_stride / 4)], scale};
}

// Units of width Bits.
template <int Bits>
__device__ __forceinline__ void stream_units(const FewInput& input, const Lane& lane, const UnitRange& range,
                                             Sums<1>& sums) {
  constexpr int kDepth = depth(Bits);
  UnitWords<Bits> words[kDepth];
  const int unit_words = Bits * lane.words_stride, together = units_together(lane.rows), end = range.end;
  const uint4* next = lane.words + static_cast<int64_t>(range.word) * lane.words_stride;
#pragma unroll
  for (int i = 0; i < kDepth; ++i, next += unit_words)
    if (range.begin + i < end) fetch(words[i], next, lane.words_stride);
  UnitScales ahead = fetch_scales(lane, range.begin);
  Scales scales = {};
  uint32_t scale = ~0u;  // of no group: they are fewer than 65535
  for (int first = range.begin; first < end; first += together) {
    const int stop = first + together < end ? first + together : end;
    warp_barrier();  // nobody reads the units before
    gather(input, lane.permutation, lane.token_rows, lane.tokens, first, stop - first, lane.staged);
    warp_barrier();
    const uint16_t* from = lane.staged + lane.row * layout::kUnitRows + threadIdx.x % 4 * tile::kLaneRows;
    for (int unit = first; unit < stop; unit += kDepth)
#pragma unroll
      for (int i = 0; i < kDepth; ++i, next += unit_words, from += lane.rows * layout::kUnitRows) {
        if (unit + i >= stop) break;
        const UnitScales own = ahead;
        if (unit + i + 1 < end) ahead = fetch_scales(lane, unit + i + 1);
        if (own.scale != scale) {
          scale = own.scale;
          scales = decode_scales(own.codes, scale >> 16);
        }
        const uint4 x[1] = {*reinterpret_cast<const uint4*>(from)};
        multiply_unit<Bits, 1>(words[i].at, scales, x, sums);
        if (unit + i + kDepth < end) fetch(words[i], next, lane.words_stride);
      }
  }
}

template <int Index>
__device__ __forceinline__ void stream_widths(const FewInput& input, const Lane& lane,
                                              const UnitRange (&ranges)[tile::kWidthCount], Sums<1>& sums) {
  if constexpr (Index < tile::kWidthCount) {
    const UnitRange range = ranges[Index];
    if (range.begin < range.end) stream_units<tile::width(Index)>(input, lane, range, sums);
    stream_widths<Index + 1>(input, lane, ranges, sums);
  }
}

}  // namespace dbrxq
