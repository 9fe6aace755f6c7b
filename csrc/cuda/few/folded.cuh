// Products with zero point and scale folded out of the weights: half the work a weight, and weights that are not rounded to
// halves.
//
// Codes go into the tensor cores as they lie: 1024 + q 2^o, a half, where o depends on the row alone. With x' = x 2^-o,
//
//   sum over the rows of a unit of (1024 + q 2^o) x' - (1024 + 2^(b-1) 2^o) x'  =  sum of (q - 2^(b-1)) x
//
// The second term is the same for all columns: one product with constants makes it, and it is what the sums of a unit
// start from. The column's scale multiplies the sum, in fp32. What is lost: the fp32 sums carry the 1024, which is 30 to 110
// times a typical code; so about as many times 2^-24 of the terms' size.
#pragma once
#include "../decode.cuh"

namespace dbrxq {

// o of the rows of pair p of a column: of all choices with as few shifts (of whole words) the one with the largest o.
__host__ __device__ constexpr int folded_offset(int bits, int p) {
  if (bits == 2) return 2 * p;
  if (bits == 3) return p % 2 ? 3 : 6;
  if (bits == 4) return p == 1 ? 4 : p == 3 ? 6 : p;
  if (bits == 5) return p % 2 ? 5 : 0;
  return p % 2 ? 10 - bits : 0;
}

__device__ __forceinline__ uint32_t shifted(uint32_t word, int right) {
  return right >= 0 ? word >> right : word << -right;
}

// 1024 + q 2^o of both rows of a pair, from the b words of a subtile. `pair` is a constant after unrolling.
template <int Bits>
__device__ __forceinline__ Half2 folded_codes(const uint32_t (&words)[Bits], int pair) {
  const int offset = folded_offset(Bits, pair % (tile::kLaneRows / 2));
  Half2 value = kThousand;
#pragma unroll
  for (int i = 0; i < tile::piece_count(Bits, pair); ++i) {
    const tile::Piece part = tile::piece(Bits, pair, i);
    const int at = part.at + offset;
    value = and_or(shifted(words[part.word], part.shift - at), (((1u << part.count) - 1u) << at) * kBoth, value);
  }
  return value;
}

// Scales of a tile in one group, as floats in shared memory: those of subtile s of the lanes 4 g .. 4 g + 3 at [s][g].
struct FoldedScales {
  uint4 at[tile::kSubtiles][8];
};

// All lanes of a warp: lane 4 g + q does those of subtile q, whose four codes it has. With a warp barrier before and after the write.
__device__ __forceinline__ void fold_scales(uint32_t codes, uint32_t scale_max, FoldedScales& scales) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const Half2 unit = mul2(scale_max * kBoth, half_power(-8) * kBoth);
  const uint32_t apart = (codes & 0xffu) | (codes & 0xff00u) << 8;  // columns 0 and 1 low, 2 and 3 high
  float floats[tile::kSubtileColumns];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const Half2 nibbles = and_or(apart >> (4 * c), 0xfu * kBoth, kThousand);
    const Half2 step = add2(nibbles, 0x8000u * kBoth | half_integer(1023) * kBoth);  // s = code + 1
    const Half2 both = mul2(mul2(step, step), unit);
    floats[c] = from_half(static_cast<uint16_t>(both & 0xffffu));
    floats[c + 2] = from_half(static_cast<uint16_t>(both >> 16));
  }
  warp_barrier();
  scales.at[q][g] = make_uint4(bits_of(floats[0]), bits_of(floats[1]), bits_of(floats[2]), bits_of(floats[3]));
  warp_barrier();
}

// What sums of `rows` staged rows (rows.cuh) start from, eight at a time: the columns of one product. All lanes of a warp.
template <int Bits>
__device__ __forceinline__ void fold_zero_points(const uint16_t* staged, int rows, uint4* starts) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  Half2 zero[2][4];  // minus what a code of the zero point is, in all 16 rows of the operand
#pragma unroll
  for (int p = 0; p < 4; ++p)
    zero[p / 2][p % 2 * 2] = zero[p / 2][p % 2 * 2 + 1] =
        (0x8000u | half_integer(1024 + (layout::zero_point(Bits) << folded_offset(Bits, p)))) * kBoth;
#pragma unroll 1
  for (int first = 0; first < rows; first += 8) {
    const int row = first + g < rows ? first + g : rows - 1;
    const uint4 x = *reinterpret_cast<const uint4*>(staged + row * layout::kUnitRows + tile::kLaneRows * q);
    float sums[4] = {};
    mma(sums, zero[0], x.x, x.y);
    mma(sums, zero[1], x.z, x.w);
    if (g == 0)
      starts[first / 2 + q] = make_uint4(bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[0]), bits_of(sums[1]));
  }
}

// sums += weights of one tile * activations, as multiply_unit. x: rows times 2^-o; begin: what sums of tokens 2 q
// and 2 q + 1 start from, twice.
template <int Bits>
__device__ __forceinline__ void multiply_folded(const uint4 (&words)[Bits], const FoldedScales& scales, const uint4& x,
                                                const uint4& begin, Sums<1>& sums) {
  const float start[4] = {float_of(begin.x), float_of(begin.y), float_of(begin.z), float_of(begin.w)};
#pragma unroll
  for (int s = 0; s < tile::kSubtiles; ++s) {
    uint32_t own[Bits];
#pragma unroll
    for (int i = 0; i < Bits; ++i) own[i] = component(words[i], s);
    const uint4 scale = scales.at[s][threadIdx.x % 32 / 4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      Half2 a[2][4];  // as in multiply_unit
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int column = 2 * t + r % 2, pair = r / 2;
        a[pair / 2][pair % 2 * 2 + r % 2] = folded_codes<Bits>(own, tile::kLaneRows / 2 * column + pair);
      }
      float part[4];
      mma_from(part, a[0], x.x, x.y, start);
      mma(part, a[1], x.z, x.w);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][t][0][i] += part[i] * float_of(component(scale, 2 * t + i / 2));
    }
  }
}

}  // namespace dbrxq
