// From packed words to exact half weights in the registers of a warp, and their product with the activations.
//
//   weight = RN16((q - 2^(b-1)) * scale),  scale = RN16(s^2 * m),  m = RN16(scale_max / 256)
//
// A code in bits o .. o + b - 1 of a half whose upper bits are those of 1024 reads as 1024 + q 2^o, exactly; one fused
// multiply-add makes it q - 2^(b-1), exactly. The three products above are the only roundings, as the format asks.
// Oracle: tests/helpers/oracles_ops.py through tests/runtime/kernels/test_cuda_products.py.
#pragma once
#include "device.cuh"
#include "tile_layout.h"

namespace dbrxq {

constexpr Half2 kBoth = 0x00010001u;          // a value of 16 bits in both halves
constexpr Half2 kThousand = 0x6400u * kBoth;  // 1024, whose ulp is 1

// The half of 2^e (normal), and of a whole number below 2048.
__host__ __device__ constexpr uint32_t half_power(int e) { return static_cast<uint32_t>(e + 15) << 10; }
__host__ __device__ constexpr uint32_t half_integer(int value) {
  int e = 0;
  while (value >> (e + 1)) ++e;
  return half_power(e) | (static_cast<uint32_t>(value << (10 - e)) & 0x3ffu);
}
static_assert(half_integer(1) == 0x3c00 && half_integer(1024) == 0x6400 && half_integer(1152) == 0x6480, "halves");

// How far a word is shifted for the pair at `shift`: codes that reach beyond bit 9 need it, and share it.
__host__ __device__ constexpr int pre_shift(int bits, int shift) {
  if (shift + bits <= 10) return 0;
  return bits == 6 ? 6 : bits == 3 ? 9 : bits == 5 ? 10 : 8;
}

// (q - 2^(b-1)) of both rows of a pair, from the b words of a subtile. `pair` is a constant after unrolling.
template <int Bits>
__device__ __forceinline__ Half2 signed_codes(const uint32_t (&words)[Bits], int pair) {
  if (tile::in_one_piece(Bits, pair)) {
    const tile::Piece place = tile::piece(Bits, pair, 0);
    const int shift = pre_shift(Bits, place.shift), offset = place.shift - shift;
    const Half2 value = and_or(words[place.word] >> shift, (layout::code_mask(Bits) << offset) * kBoth, kThousand);
    const Half2 minus = 0x8000u * kBoth | half_integer((1024 >> offset) + layout::zero_point(Bits)) * kBoth;
    return offset ? fma2(value, half_power(-offset) * kBoth, minus) : add2(value, minus);
  }
  Half2 value = kThousand;
#pragma unroll
  for (int i = 0; i < tile::piece_count(Bits, pair); ++i) {
    const tile::Piece part = tile::piece(Bits, pair, i);
    const Half2 mask = (((1u << part.count) - 1u) << part.at) * kBoth;
    const uint32_t word = words[part.word];
    value =
        and_or(part.shift >= part.at ? word >> (part.shift - part.at) : word << (part.at - part.shift), mask, value);
  }
  return add2(value, 0x8000u * kBoth | half_integer(1024 + layout::zero_point(Bits)) * kBoth);
}

// Scales of a lane's 16 columns in one group: pairs[h][c] holds those of column c of subtiles 2 h and 2 h + 1.
struct Scales {
  Half2 pairs[2][tile::kSubtileColumns];

  // The scale of column c of subtile s, in both halves.
  __device__ __forceinline__ Half2 column(int s, int c) const {
    return s % 2 ? high_twice(pairs[s / 2][c]) : low_twice(pairs[s / 2][c]);
  }
};

// codes: the lane's two words of scale codes; scale_max: the group's half.
__device__ __forceinline__ Scales decode_scales(uint2 codes, uint32_t scale_max) {
  const Half2 unit = mul2(scale_max * kBoth, half_power(-8) * kBoth);
  Scales scales;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int c = 0; c < tile::kSubtileColumns; ++c) {
      const Half2 nibbles = and_or((h ? codes.y : codes.x) >> (4 * c), 0xfu * kBoth, kThousand);
      const Half2 step = add2(nibbles, 0x8000u * kBoth | half_integer(1023) * kBoth);  // s = code + 1
      scales.pairs[h][c] = mul2(mul2(step, step), unit);
    }
  return scales;
}

__device__ __forceinline__ uint32_t component(const uint4& v, int index) {
  return index == 0 ? v.x : index == 1 ? v.y : index == 2 ? v.z : v.w;
}

// fp32 sums of a warp: 128 columns by 8 TokenTiles tokens. sums[s][t][n] is the mma accumulator of columns 2 t and
// 2 t + 1 of subtile s and tokens 8 n ..: lane 4 g + q holds of it, for i = 0..3,
//   column 16 g + 4 s + 2 t + i / 2,  token 8 n + 2 q + i % 2
template <int TokenTiles>
using Sums = float[tile::kSubtiles][2][TokenTiles][4];

// sums += weights of one tile * activations.
//   words: the lane's uint4s of the tile (tile_layout.h)
//   x:     per 8 tokens the lane's 8 rows of token g: b-operand pairs 0..3
template <int Bits, int TokenTiles>
__device__ __forceinline__ void multiply_unit(const uint4 (&words)[Bits], const Scales& scales,
                                              const uint4 (&x)[TokenTiles], Sums<TokenTiles>& sums) {
#pragma unroll
  for (int s = 0; s < tile::kSubtiles; ++s) {
    uint32_t own[Bits];
#pragma unroll
    for (int i = 0; i < Bits; ++i) own[i] = component(words[i], s);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      Half2 a[2][4];  // rows of both mma steps: pairs 0, 1 and pairs 2, 3
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int column = 2 * t + r % 2, pair = r / 2;
        a[pair / 2][pair % 2 * 2 + r % 2] =
            mul2(signed_codes<Bits>(own, tile::kLaneRows / 2 * column + pair), scales.column(s, column));
      }
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n) {
        mma(sums[s][t][n], a[0], x[n].x, x[n].y);
        mma(sums[s][t][n], a[1], x[n].z, x[n].w);
      }
    }
  }
}

}  // namespace dbrxq
