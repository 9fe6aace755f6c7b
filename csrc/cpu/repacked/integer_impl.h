// Integer dot products over repacked linears, written once over a vector type and compiled by
// integer_{scalar,avx2,avxvnni,avx512}.cpp.
//
//   y[t, c] = sum over segments of s[g, c] * a[t] * (sum over rows of q[k, c] * v[t, k]  -  z * sum of v[t, k])
//
// q are the stored codes, z their zero point, v and a the quantized activations and their scale (repacked.h). Both inner
// sums are exact in 32-bit integers: at most 128 rows * 255 * 16256 < 2^30. Each segment's sum is rounded to float
// once, and the sums over segments run in order (a[t] comes last where a run of segments shares it): the result depends
// neither on the number of threads nor on the instruction set. Against dequantized weights the only other difference is
// that s * q is not rounded to half.
//
// A lane is an output column; four rows meet in one dot product of bytes. For one token, masked codes are multiplied
// where they sit in their byte, without a shift: codes at bit p give 2^p times the sum, in sums of their own, which are
// shifted down once a segment. ("2 bits" has four such sums, "3 bits" five.)
//
// Everything sits in an unnamed namespace and uses no inline function of the standard library: code compiled for
// AVX-512 must never be the copy that the linker keeps for everyone.
#include "unroll.h"

namespace dbrxq {
namespace {

struct Vec;
static_assert(Defined<Vec>, "define dbrxq::Vec, the vector type, before including integer_impl.h");

constexpr int kLanes = Vec::lanes;
constexpr int kVectors = bands::kColumns / kLanes;  // of a band
constexpr int kPair = 2 * kLanes;                   // columns handled together
constexpr int kUnitBytes = 4 * bands::kColumns;     // of one word row of a band
static_assert(bands::kColumns % kPair == 0, "a band is whole pairs of vectors");

// A constant as an argument.
template <int I>
struct Number {
  constexpr operator int() const { return I; }
};

template <int S>
inline Vec::I shift_down(Vec::I value) {
  if constexpr (S > 0) return Vec::template shift_right<S>(value);
  if constexpr (S < 0) return Vec::template shift_left<-S>(value);
  return value;
}

template <int B, int Quad, int Index>
inline Vec::I normal_part(const Vec::I* words) {
  constexpr bands::Part part = bands::part(B, Quad, Index);
  if constexpr (part.bits == 8) return words[part.word];
  return Vec::and_mask(shift_down<part.position - part.weight>(words[part.word]),
                       (bands::part_mask(part) << part.weight));
}

// The codes of a quad, one a byte.
template <int B, int Quad>
inline Vec::I normal_codes(const Vec::I* words) {
  if constexpr (bands::part_count(B, Quad) == 1)
    return normal_part<B, Quad, 0>(words);
  else
    return Vec::either(normal_part<B, Quad, 0>(words), normal_part<B, Quad, 1>(words));
}

// Sums of one token in place: codes that sit `shift` bits above their weight go to sum `slot`.
constexpr int in_place_sums(int bits) { return bits == 2 ? 4 : bits == 3 ? 5 : bits == 4 ? 2 : 1; }
constexpr int slot_shift(int bits, int slot) {
  if (bits == 2) return 2 * slot;
  if (bits == 3) return slot == 4 ? 5 : slot == 3 ? 4 : 3 * slot;
  return bits == 4 ? 4 * slot : 0;
}
constexpr int slot_of(int bits, int shift) {
  for (int slot = 0; slot < in_place_sums(bits); ++slot)
    if (slot_shift(bits, slot) == shift) return slot;
  return -1;
}

template <int B, int M>
constexpr bool in_place() {
  return M == 1 && Vec::any_byte && B <= 4;
}

// ---- Sums of one band and tile -----------------------------------------------------------------------------------

// Where a run of segments of one width is in a band, and in the activations.
struct Cursor {
  const Segment* segment;
  const Segment* end;
  const char* codes;
  const int32_t *high, *low;  // of the segment's first quad
  const float* scales;
  const int32_t* offsets;
  bool fetch;  // whether the codes are still in memory
};

// All segments of width B from the cursor on, for M tokens whose activations have Planes bytes; moves it behind them.
//
// The loops over sums are unrolled by hand: compilers keep an array in registers only where they see constant indices
// from the start, and zeroing and adding up these arrays in memory took twice the time of the products. The steps are
// lambdas where they are used: as functions, the same steps made GCC 12 sum up in another order, up to a third slower.
template <int B, int Planes, int M>
inline void multiply_run(Cursor& run, const uint8_t* steps, const float* tables, Vec::F* sums) {
  constexpr bool placed = in_place<B, M>();
  constexpr int slots = placed ? in_place_sums(B) : 1;
  constexpr int count = slots * Planes * M * 2;  // integer sums of a pair of vectors: [slot][plane][m][vector]
  const auto at_sum = [](int slot, int plane, int m, int v) { return ((slot * Planes + plane) * M + m) * 2 + v; };
  const Segment* segment = run.segment;
  const char* codes = run.codes;
  const int32_t *high = run.high, *low = run.low;
  const float* scales = run.scales;
  const int32_t* offsets = run.offsets;
  for (; segment != run.end && segment->bits == B; ++segment) {
    const int units = segment->units;
    const uint8_t* of = steps + segment->group * 16;
    const float* table = tables + segment->group * 16;
    const auto multiply_pair = [&](auto pair) DBRXQ_INLINE {  // an int or a Number
      const int column = pair * kPair;
      Vec::I sum[count];
      unroll<count>([&]<int I>() DBRXQ_INLINE { sum[I] = Vec::zero(); });

      const auto load_words = [&](const char* at, Vec::I(&words)[2][B]) DBRXQ_INLINE {
        unroll<2 * B>([&]<int I>() DBRXQ_INLINE {  // in the order of memory
          words[I % 2][I / 2] = Vec::load(at + I / 2 * kUnitBytes + I % 2 * kLanes * 4);
        });
        for (int i = 0; i < B * kPair * 4; i += 64) Vec::prefetch(at + Vec::ahead + i);
      };
      // Codes of the unit's quads, in place one part of them after the other, times the activations of all tokens.
      const auto add_products = [&](const Vec::I(&words)[2][B], const int32_t* upper,
                                    const int32_t* lower) DBRXQ_INLINE {
        unroll<bands::kQuads>([&]<int Quad>() DBRXQ_INLINE {
          unroll<2 * (placed ? bands::part_count(B, Quad) : 1)>([&]<int I>() DBRXQ_INLINE {
            constexpr int v = I % 2;
            constexpr bands::Part part = bands::part(B, Quad, I / 2);
            constexpr int slot = placed ? slot_of(B, part.position - part.weight) : 0;
            static_assert(slot >= 0, "every part has a sum");
            Vec::I code;
            if constexpr (placed)
              code = Vec::and_mask(words[v][part.word], bands::part_mask(part) << part.position);
            else
              code = normal_codes<B, Quad>(words[v]);
            unroll<Planes * M>([&]<int J>() DBRXQ_INLINE {
              constexpr int plane = J / M, m = J % M, s = at_sum(slot, plane, m, v);
              sum[s] = Vec::template dot<B == 8>(sum[s], code, Vec::splat_int((plane ? lower : upper)[Quad * M + m]));
            });
          });
        });
      };
      // The integer sum of one token and vector, over slots and bytes.
      const auto total = [&]<int m, int v>(const Vec::I* sum) DBRXQ_INLINE {
        Vec::I of_plane[Planes];
        unroll<Planes>([&]<int Plane>() DBRXQ_INLINE {
          of_plane[Plane] = sum[at_sum(0, Plane, m, v)];
          unroll<slots - 1>([&]<int I>() DBRXQ_INLINE {
            constexpr int slot = I + 1;
            of_plane[Plane] = Vec::add_int(
                of_plane[Plane], Vec::template shift_signed<slot_shift(B, slot)>(sum[at_sum(slot, Plane, m, v)]));
          });
        });
        Vec::I all = Vec::add_int(of_plane[Planes - 1], Vec::splat_int(offsets[m]));
        if constexpr (Planes == 2) all = Vec::add_int(all, Vec::template shift_left<7>(of_plane[0]));
        return all;
      };

      const char* at = codes + column * 4;
      const int32_t *upper = high, *lower = low;
      for (int unit = 0; unit < units; ++unit) {
        Vec::I words[2][B];
        load_words(at, words);
        add_products(words, upper, lower);
        at += B * kUnitBytes;
        upper += bands::kQuads * M;
        lower += bands::kQuads * M;
      }
      // Before anything is stored: for all that the compiler knows, stores to `sums` may change the tables.
      const Vec::F column_scales[2] = {Vec::column_scales(of, table, column),
                                       Vec::column_scales(of, table, column + kLanes)};
      unroll<2 * M>([&]<int I>() DBRXQ_INLINE {
        constexpr int v = I % 2, m = I / 2;
        const Vec::I all = total.template operator()<m, v>(sum);
        Vec::F scale = column_scales[v];
        if constexpr (Planes == 1) scale = Vec::mul(scale, Vec::splat(scales[m]));
        Vec::F& to = sums[m * kVectors + pair * 2 + v];
        to = Vec::multiply_add(Vec::to_float(all), scale, to);
      });
    };
    if constexpr (kPair == bands::kColumns)
      multiply_pair(Number<0>{});
    else
      for (int pair = 0; pair < bands::kColumns / kPair; ++pair) multiply_pair(pair);
    codes += units * (B * kUnitBytes);
    high += units * (bands::kQuads * M);
    low += units * (bands::kQuads * M);
    scales += M;
    offsets += M;
  }
  run = {segment, run.end, codes, high, low, scales, offsets, run.fetch};
}

// As multiply_run, for tiles of more than four tokens. These are bound by the two dot products a cycle that a core can
// start, so registers are for sums: one byte's. Where activations have two, the upper bytes go through the whole
// segment, the sums move up by 7 bits, and the lower bytes follow into the same sums.
template <int B, int Planes, int M>
inline void multiply_wide_run(Cursor& run, const uint8_t* steps, const float* tables, Vec::F* sums) {
  static_assert(M * kPair == M * bands::kColumns, "wide tiles are for vectors of 16 columns");
  const Segment* segment = run.segment;
  const char* codes = run.codes;
  const int32_t *high = run.high, *low = run.low;
  const float* scales = run.scales;
  const int32_t* offsets = run.offsets;
  for (; segment != run.end && segment->bits == B; ++segment) {
    const int units = segment->units;
    if (run.fetch)
      for (int i = 0; i < units * B * kUnitBytes; i += 64) Vec::prefetch(codes + Vec::ahead + i);
    Vec::I sum[M * 2];  // [m][vector]
    unroll<M * 2>([&]<int I>() DBRXQ_INLINE { sum[I] = Vec::zero(); });
    const int32_t* values = high;
    for (int plane = 0; plane < Planes; ++plane, values = low) {  // one piece of code for both: it is long as it is
      if (plane) unroll<M * 2>([&]<int I>() DBRXQ_INLINE { sum[I] = Vec::template shift_left<7>(sum[I]); });
      const char* at = codes;
      for (int unit = 0; unit < units; ++unit) {
        unroll<bands::kQuads>([&]<int Quad>() DBRXQ_INLINE {
          Vec::I code[2];
          unroll<2>([&]<int v>() DBRXQ_INLINE {
            Vec::I words[B];  // loads of words that the quad has no use for are left out
            unroll<B>([&]<int I>() DBRXQ_INLINE { words[I] = Vec::load(at + I * kUnitBytes + v * kLanes * 4); });
            code[v] = normal_codes<B, Quad>(words);
          });
          unroll<M>([&]<int m>() DBRXQ_INLINE {  // one load for two products: a core starts two of either
            const Vec::I value = Vec::splat_int(values[Quad * M + m]);
            sum[2 * m] = Vec::template dot<B == 8>(sum[2 * m], code[0], value);
            sum[2 * m + 1] = Vec::template dot<B == 8>(sum[2 * m + 1], code[1], value);
          });
        });
        at += B * kUnitBytes;
        values += bands::kQuads * M;
      }
    }
    // Before anything is stored: for all that the compiler knows, `sums` may be where the scales are.
    const uint8_t* of = steps + segment->group * 16;
    const float* table = tables + segment->group * 16;
    const Vec::F column_scales[2] = {Vec::column_scales(of, table, 0), Vec::column_scales(of, table, kLanes)};
    unroll<M>([&]<int m>() DBRXQ_INLINE {
      const Vec::I offset = Vec::splat_int(offsets[m]);
      const Vec::F activation_scale = Vec::splat(scales[m]);
      Vec::F total[2];
      unroll<2>([&]<int v>() DBRXQ_INLINE {
        Vec::F scale = column_scales[v];
        if constexpr (Planes == 1) scale = Vec::mul(scale, activation_scale);
        total[v] = Vec::multiply_add(Vec::to_float(Vec::add_int(sum[2 * m + v], offset)), scale, sums[2 * m + v]);
      });
      sums[2 * m] = total[0];
      sums[2 * m + 1] = total[1];
    });
    codes += units * (B * kUnitBytes);
    high += units * (bands::kQuads * M);
    low += units * (bands::kQuads * M);
    scales += M;
    offsets += M;
  }
  run = {segment, run.end, codes, high, low, scales, offsets, run.fetch};
}

// One run of segments after the other: run<bits, planes>().
template <class Run>
DBRXQ_INLINE inline void for_runs(const Cursor& cursor, int activation_bits, Run&& run) {
  while (cursor.segment != cursor.end) {
    const int bits = cursor.segment->bits;
    const bool two = two_bytes(activation_bits, bits);
    switch (bits) {
      case 2: two ? run.template operator()<2, 2>() : run.template operator()<2, 1>(); break;
      case 3: two ? run.template operator()<3, 2>() : run.template operator()<3, 1>(); break;
      case 4: two ? run.template operator()<4, 2>() : run.template operator()<4, 1>(); break;
      case 5: run.template operator()<5, 2>(); break;
      case 6: run.template operator()<6, 2>(); break;
      default: run.template operator()<8, 2>(); break;
    }
  }
}

template <int M>
void multiply_band(const PackedView& view, int activation_bits, int64_t band, const ActivationTile& tile, bool fetch,
                   float* out) {
  constexpr int kSums = M * kVectors;
  const uint8_t* steps = view.band_steps(band);
  const float* tables = view.tables;
  Cursor cursor = {.segment = view.segments,
                   .end = view.segments + view.header->segments,
                   .codes = view.band_codes(band),
                   .high = tile.high,
                   .low = tile.low,
                   .scales = tile.scales,
                   .offsets = tile.offsets,
                   .fetch = fetch};
  Vec::F sums[kSums];
  unroll<kSums>([&]<int I>() DBRXQ_INLINE { sums[I] = Vec::splat(0.0f); });
  for_runs(cursor, activation_bits, [&]<int B, int Planes>() {
    const float* scales = cursor.scales;
    Vec::F of_run[kSums];  // where all segments of a run share the activations' scale
    if constexpr (Planes == 2) unroll<kSums>([&]<int I>() DBRXQ_INLINE { of_run[I] = Vec::splat(0.0f); });
    Vec::F* to = Planes == 2 ? of_run : sums;
    if constexpr (M > 4)
      multiply_wide_run<B, Planes, M>(cursor, steps, tables, to);
    else
      multiply_run<B, Planes, M>(cursor, steps, tables, to);
    if constexpr (Planes == 2)
      unroll<kSums>([&]<int I>() DBRXQ_INLINE {
        sums[I] = Vec::multiply_add(of_run[I], Vec::splat(scales[I / kVectors]), sums[I]);
      });
  });
  unroll<kSums>([&]<int I>() DBRXQ_INLINE { Vec::store(out + I * kLanes, sums[I]); });
}

template <int Largest>  // tile: a template, so that tiles that the vectors have no room for are not compiled
void multiply(const PackedView& view, int activation_bits, int64_t band, int64_t m, const ActivationTile& tile,
              bool fetch, float* sums) {
  if (m == 1) return multiply_band<1>(view, activation_bits, band, tile, fetch, sums);
  if constexpr (Largest > 2) {
    if (m == 4) return multiply_band<4>(view, activation_bits, band, tile, fetch, sums);
    if (m == 6) return multiply_band<6>(view, activation_bits, band, tile, fetch, sums);
    if (m == 8) return multiply_band<8>(view, activation_bits, band, tile, fetch, sums);
  }
  multiply_band<2>(view, activation_bits, band, tile, fetch, sums);
}

}  // namespace
}  // namespace dbrxq

#include "activations_impl.h"
