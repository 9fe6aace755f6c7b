// A warp's way through its units of a piece: activations gathered ahead, words on their way into registers, sums.
#pragma once
#include "folded.cuh"
#include "rows.cuh"

namespace dbrxq {

// Where a lane reads; what it needs seldom is read from shared memory each time, registers are for words and sums.
struct Lane {
  const uint4* words;  // of word row 0
  int words_stride;    // uint4s from word row to word row, and four times the uint2s from group to group
  int codes;           // of group 0, in uint2s from the linear's scale_codes
};

// The scale codes of a lane's columns in the group of `scale`; folded: of the four that the lane does, in x.
template <bool Folded>
__device__ __forceinline__ uint2 fetch_codes(const Linear& linear, const Lane& lane, uint32_t scale) {
  const int place = static_cast<int>(scale & 0xffffu) * (lane.words_stride / 4) + lane.codes;
  if constexpr (Folded) {
    const int own = threadIdx.x % 4;
    return make_uint2(static_cast<const uint16_t*>(linear.scale_codes)[4 * static_cast<int64_t>(place) + own], 0);
  } else {
    return static_cast<const uint2*>(linear.scale_codes)[place];
  }
}

// Units of width Bits.
template <int Bits, bool Folded, class S>
__device__ __forceinline__ void stream_units(const FewInput& input, const Lane& lane, const UnitRange& range, S& shared,
                                             Sums<1>& sums) {
  constexpr int kDepth = depth(Bits);
  auto& own = shared.warps[threadIdx.x / 32];
  UnitWords<Bits> words[kDepth];
  const int unit_words = Bits * lane.words_stride, end = range.end;
  const int& stride = own.stride;
  const uint4* next = lane.words + static_cast<int64_t>(range.word) * lane.words_stride;
#pragma unroll
  for (int i = 0; i < kDepth; ++i, next += unit_words)
    if (range.begin + i < end) fetch(words[i], next, lane.words_stride);
  uint32_t scale = ~0u;  // of no group: they are fewer than 65535
  uint32_t scale_ahead = static_cast<const uint32_t*>(shared.linear.unit_scale)[range.begin];
  uint2 codes_ahead = fetch_codes<Folded>(shared.linear, lane, scale_ahead);
  Scales scales = {};
  const uint16_t* x = nullptr;
  const uint4* starts = nullptr;
  const uint32_t* unit_scale = nullptr;
  const auto take = [&](int unit, UnitWords<Bits>& unit_words_held) {
    if (scale_ahead != scale) {
      scale = scale_ahead;
      if constexpr (Folded) {
        fold_scales(codes_ahead.x, scale >> 16, own.scales);
      } else {
        scales = decode_scales(codes_ahead, scale >> 16);
      }
    }
    scale_ahead = *++unit_scale;
    if (scale_ahead != scale) codes_ahead = fetch_codes<Folded>(shared.linear, lane, scale_ahead);
    const uint4 rows[1] = {*reinterpret_cast<const uint4*>(x)};
    if constexpr (Folded) {
      multiply_folded<Bits>(unit_words_held.at, own.scales, rows[0], *starts, sums);
    } else {
      multiply_unit<Bits, 1>(unit_words_held.at, scales, rows, sums);
    }
    if (unit + kDepth < end) fetch(unit_words_held, next, lane.words_stride);
    next += unit_words;
    x += stride * layout::kUnitRows;
    starts += stride / 2;
  };
  for (int unit = range.begin; unit < end;) {
    const int stop = unit + kStagedRows / stride < end ? unit + kStagedRows / stride : end;
    warp_barrier();  // nobody reads the units before
    gather(input, shared.linear, shared.rows, shared.tokens_in_use, unit, stop - unit, end,
           Folded ? power_of_two(-folded_offset(Bits, threadIdx.x % tile::kLaneRows / 2)) : 1.0f, own);
    warp_barrier();
    if constexpr (Folded) {
      fold_zero_points<Bits>(own.staged, (stop - unit) * stride, own.starts);
      warp_barrier();
    }
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    x = own.staged + (g & (stride - 1)) * layout::kUnitRows + q * tile::kLaneRows;
    starts = own.starts + (q & (stride / 2 - 1));
    unit_scale = own.unit_scale;
    for (; unit + kDepth <= stop; unit += kDepth)
#pragma unroll
      for (int i = 0; i < kDepth; ++i) take(unit + i, words[i]);
    if (unit < stop) take(unit++, words[0]);  // the last of an odd number: without a branch inside of the loop
  }
}

template <int Index, bool Folded, class S>
__device__ __forceinline__ void stream_widths(const FewInput& input, const Lane& lane, S& shared, Sums<1>& sums) {
  if constexpr (Index < tile::kWidthCount) {
    const UnitRange range = shared.warps[threadIdx.x / 32].ranges[Index];
    if (range.begin < range.end) stream_units<tile::width(Index), Folded>(input, lane, range, shared, sums);
    stream_widths<Index + 1, Folded>(input, lane, shared, sums);
  }
}

}  // namespace dbrxq
