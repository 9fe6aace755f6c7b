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
//
// The includer defines `Vec` first.

namespace dbrxq {
namespace {

constexpr int kLanes = Vec::lanes;
constexpr int kPair = 2 * kLanes;                // columns handled together
constexpr int kUnitBytes = 4 * bands::kColumns;  // of one word row of a band
static_assert(bands::kColumns % kPair == 0, "a band is whole pairs of vectors");

template <int... I>
struct Numbers {};
template <int N, int... I>
struct MakeNumbers : MakeNumbers<N - 1, N - 1, I...> {};
template <int... I>
struct MakeNumbers<0, I...> {
  using type = Numbers<I...>;
};
template <int I>
struct Number {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
#define DBRXQ_INLINE __attribute__((always_inline))
template <class Body, int... I>
DBRXQ_INLINE inline void unroll(Numbers<I...>, Body&& body) {
  (body(Number<I>{}), ...);
}
template <int N, class Body>
DBRXQ_INLINE inline void unroll(Body&& body) {
  unroll(typename MakeNumbers<N>::type{}, body);
}

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
  constexpr uint32_t mask = bands::part_mask(part) << part.weight;
  return Vec::and_mask(shift_down<part.position - part.weight>(words[part.word]), mask);
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

// All segments of width B from the cursor on; moves it behind them.
//
// The loops over sums are unrolled by hand: compilers keep an array in registers only where they see constant indices
// from the start, and zeroing and adding up these arrays in memory took twice the time of the products.
template <int B, int Planes, int M>
inline void multiply_run(Cursor& run, const uint8_t* steps, const float* tables, Vec::F* sums) {
  constexpr bool placed = in_place<B, M>();
  constexpr int slots = placed ? in_place_sums(B) : 1;
  constexpr int vectors = bands::kColumns / kLanes;
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
    const auto pair = [&](auto pair_number) DBRXQ_INLINE {
      const int column = pair_number * kPair;
      Vec::I sum[slots * Planes * M * 2];  // [slot][plane][m][vector]
      unroll<slots * Planes * M * 2>([&](auto i) DBRXQ_INLINE { sum[decltype(i)::value] = Vec::zero(); });
      const char* at = codes + column * 4;
      const int32_t *upper = high, *lower = low;
      for (int unit = 0; unit < units; ++unit) {
        Vec::I words[2][B];
        unroll<2 * B>([&](auto i) DBRXQ_INLINE {
          constexpr int v = decltype(i)::value % 2, word = decltype(i)::value / 2;  // in the order of memory
          words[v][word] = Vec::load(at + word * kUnitBytes + v * kLanes * 4);
        });
        for (int i = 0; i < B * kPair * 4; i += 64) Vec::prefetch(at + Vec::ahead + i);
        unroll<bands::kQuads>([&](auto number) DBRXQ_INLINE {
          constexpr int quad = decltype(number)::value;
          constexpr int parts = placed ? bands::part_count(B, quad) : 1;
          unroll<2 * parts>([&](auto index) DBRXQ_INLINE {
            constexpr int v = decltype(index)::value % 2, which = decltype(index)::value / 2;
            constexpr bands::Part part = bands::part(B, quad, which);
            constexpr int slot = placed ? slot_of(B, part.position - part.weight) : 0;
            static_assert(slot >= 0, "every part has a sum");
            Vec::I code;
            if constexpr (placed)
              code = Vec::and_mask(words[v][part.word], bands::part_mask(part) << part.position);
            else
              code = normal_codes<B, quad>(words[v]);
            unroll<Planes * M>([&](auto which_sum) DBRXQ_INLINE {
              constexpr int plane = decltype(which_sum)::value / M, m = decltype(which_sum)::value % M;
              constexpr int s = at_sum(slot, plane, m, v);
              sum[s] = Vec::template dot<B == 8>(sum[s], code, Vec::splat_int((plane ? lower : upper)[quad * M + m]));
            });
          });
        });
        at += B * kUnitBytes;
        upper += bands::kQuads * M;
        lower += bands::kQuads * M;
      }
      // Before anything is stored: for all that the compiler knows, stores to `sums` may change the tables.
      const Vec::F column_scales[2] = {Vec::column_scales(of, table, column),
                                       Vec::column_scales(of, table, column + kLanes)};
      unroll<2 * M>([&](auto index) DBRXQ_INLINE {
        constexpr int v = decltype(index)::value % 2, m = decltype(index)::value / 2;
        Vec::I total[Planes];
        unroll<Planes>([&](auto number) DBRXQ_INLINE {
          constexpr int plane = decltype(number)::value;
          total[plane] = sum[at_sum(0, plane, m, v)];
          unroll<slots - 1>([&](auto other) DBRXQ_INLINE {
            constexpr int slot = decltype(other)::value + 1;
            total[plane] = Vec::add_int(
                total[plane], Vec::template shift_signed<slot_shift(B, slot)>(sum[at_sum(slot, plane, m, v)]));
          });
        });
        Vec::I all = Vec::add_int(total[Planes - 1], Vec::splat_int(offsets[m]));
        if constexpr (Planes == 2) all = Vec::add_int(all, Vec::template shift_left<7>(total[0]));
        Vec::F scale = column_scales[v];
        if constexpr (Planes == 1) scale = Vec::mul(scale, Vec::splat(scales[m]));
        Vec::F& to = sums[m * vectors + pair_number * 2 + v];
        to = Vec::multiply_add(Vec::to_float(all), scale, to);
      });
    };
    if constexpr (kPair == bands::kColumns) {
      pair(Number<0>{});
    } else {
      for (int i = 0; i < bands::kColumns / kPair; ++i) pair(i);
    }
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
    unroll<M * 2>([&](auto i) DBRXQ_INLINE { sum[decltype(i)::value] = Vec::zero(); });
    const int32_t* values = high;
    for (int plane = 0; plane < Planes; ++plane, values = low) {  // one piece of code for both: it is long as it is
      if (plane)
        unroll<M * 2>([&](auto i) DBRXQ_INLINE {
          sum[decltype(i)::value] = Vec::template shift_left<7>(sum[decltype(i)::value]);
        });
      const char* at = codes;
      for (int unit = 0; unit < units; ++unit) {
        unroll<bands::kQuads>([&](auto number) DBRXQ_INLINE {
          constexpr int quad = decltype(number)::value;
          Vec::I code[2];
          unroll<2>([&](auto vector) DBRXQ_INLINE {
            constexpr int v = decltype(vector)::value;
            Vec::I words[B];  // loads of words that the quad has no use for are left out
            unroll<B>([&](auto word) DBRXQ_INLINE {
              words[decltype(word)::value] = Vec::load(at + decltype(word)::value * kUnitBytes + v * kLanes * 4);
            });
            code[v] = normal_codes<B, quad>(words);
          });
          unroll<M>([&](auto token) DBRXQ_INLINE {  // one load for two products: a core starts two of either
            constexpr int m = decltype(token)::value;
            const Vec::I value = Vec::splat_int(values[quad * M + m]);
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
    unroll<M>([&](auto token) DBRXQ_INLINE {
      constexpr int m = decltype(token)::value;
      const Vec::I offset = Vec::splat_int(offsets[m]);
      const Vec::F activation_scale = Vec::splat(scales[m]);
      Vec::F total[2];
      unroll<2>([&](auto vector) DBRXQ_INLINE {
        constexpr int v = decltype(vector)::value;
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

// One run of segments after the other: run(bits, planes) as constants.
template <class Run>
DBRXQ_INLINE inline void for_runs(const Cursor& cursor, int activation_bits, Run&& run) {
  while (cursor.segment != cursor.end) {
    const int bits = cursor.segment->bits;
    const bool two = two_bytes(activation_bits, bits);
    switch (bits) {
      case 2: two ? run(Number<2>{}, Number<2>{}) : run(Number<2>{}, Number<1>{}); break;
      case 3: two ? run(Number<3>{}, Number<2>{}) : run(Number<3>{}, Number<1>{}); break;
      case 4: two ? run(Number<4>{}, Number<2>{}) : run(Number<4>{}, Number<1>{}); break;
      case 5: run(Number<5>{}, Number<2>{}); break;
      case 6: run(Number<6>{}, Number<2>{}); break;
      default: run(Number<8>{}, Number<2>{}); break;
    }
  }
}

template <int M>
void multiply_band(const PackedView& view, int activation_bits, int64_t band, const ActivationTile& tile, bool fetch,
                   float* out) {
  constexpr int vectors = bands::kColumns / kLanes;
  const uint8_t* steps = view.band_steps(band);
  const float* tables = view.tables;
  Cursor cursor = {view.segments,
                   view.segments + view.header->segments,
                   view.band_codes(band),
                   tile.high,
                   tile.low,
                   tile.scales,
                   tile.offsets,
                   fetch};
  Vec::F sums[M * vectors];
  unroll<M * vectors>([&](auto i) DBRXQ_INLINE { sums[decltype(i)::value] = Vec::splat(0.0f); });
  for_runs(cursor, activation_bits, [&](auto bits, auto number) {
    constexpr int planes = decltype(number)::value;
    const float* scales = cursor.scales;
    Vec::F of_run[M * vectors];  // where all segments of a run share the activations' scale
    if constexpr (planes == 2)
      unroll<M * vectors>([&](auto i) DBRXQ_INLINE { of_run[decltype(i)::value] = Vec::splat(0.0f); });
    Vec::F* to = planes == 2 ? of_run : sums;
    if constexpr (M > 4)
      multiply_wide_run<decltype(bits)::value, planes, M>(cursor, steps, tables, to);
    else
      multiply_run<decltype(bits)::value, planes, M>(cursor, steps, tables, to);
    if constexpr (planes == 2)
      unroll<M * vectors>([&](auto index) DBRXQ_INLINE {
        constexpr int i = decltype(index)::value;
        sums[i] = Vec::multiply_add(of_run[i], Vec::splat(scales[i / vectors]), sums[i]);
      });
  });
  unroll<M * vectors>([&](auto i)
                          DBRXQ_INLINE { Vec::store(out + decltype(i)::value * kLanes, sums[decltype(i)::value]); });
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
