// The inner loops, written once over a vector type and compiled by kernels_{scalar,avx2,avx512}.cpp.
//
//   w[k, c] = half((q[k, c] - 2^(b-1)) * s[g, c]),   s[g, c] = half(n^2 * half(max[g] / 256))
//
// A lane is an output column: one vector load of a word row gives words of `lanes` neighbouring columns, and code i
// of all of them sits at the same bits, so decoding needs no shuffles and a sum never leaves its lane.
//
//   word row 0   | col 0 | col 1 | ... | col lanes-1 |    >> 0, >> b, >> 2b ...  & mask   ->  codes of rows 0, 1, 2 ...
//   word row 1   | ...                               |
//
// The half rounding of a weight is done in float. p = d * s is exact (8 + 11 significant bits), and half(p) is p
// rounded to 11 significant bits: below 2^-14 too, because s is a multiple of 2^-24, so that p has none to lose
// there. Veltkamp's split does that rounding: with c = p * (2^13 + 1), half(p) = c - (c - p). s * (2^13 + 1) is exact
// in float as well, so c costs one product. tests/runtime/library/test_native.py tries every half s with every d: equal to the bit,
// ties to even included. Only overflow differs (half gives infinity from 65520 on); units that can overflow take
// the exact conversion.
//
// Everything sits in an unnamed namespace and uses no inline function of the standard library: code compiled for
// AVX-512 must never be the copy that the linker keeps for everyone.
#include "unroll.h"

namespace dbrxq {
namespace {

struct Vec;
static_assert(Defined<Vec>, "define dbrxq::Vec, the vector type, before including kernels_impl.h");

constexpr int kLanes = Vec::lanes;
constexpr int kPanelWidth = 2 * kLanes;  // columns that the matrix kernel holds in registers
static_assert(layout::kColumnMultiple % kPanelWidth == 0, "a band holds whole panels");
static_assert(kPanelColumns % kPanelWidth == 0, "a band holds whole panels");
static_assert(kPanelRows % layout::kUnitRows == 0, "a panel holds whole units");

template <int... I>
struct Rows {};
template <int N, int... I>
struct MakeRows : MakeRows<N - 1, N - 1, I...> {};
template <int... I>
struct MakeRows<0, I...> {
  using type = Rows<I...>;
};
template <int I>
struct Index {
  static constexpr int value = I;
};

// d = q - 2^(b-1) of row I, as float: the code becomes the low mantissa bits of 2^23, which is then taken away.
template <int B, int I>
inline Vec::F signed_code(const Vec::I* words) {
  constexpr int word = layout::code_word(B, I), shift = layout::code_shift(B, I);
  Vec::I bits = Vec::template shift_right<shift>(words[word]);
  if constexpr (layout::code_straddles(B, I))
    bits = Vec::either(bits, Vec::template shift_left<32 - shift>(words[word + 1]));
  const Vec::F biased =
      Vec::as_float(Vec::and_or(bits, Vec::splat_int(layout::code_mask(B)), Vec::splat_int(0x4B000000)));
  return Vec::sub(biased, Vec::splat(8388608.0f + static_cast<float>(layout::zero_point(B))));
}

// Calls sink(Index<i>, weights) for the rows of one unit. `words` is the unit's first word at the first lane's
// column; `step` is bytes from one word row to the next.
template <int B, bool Exact, class Sink, int... I>
inline void decode(const char* words, int64_t step, Vec::F scale, Sink&& sink, Rows<I...>) {
  constexpr int count = layout::unit_words(B, static_cast<int>(sizeof...(I)));
  Vec::I loaded[count];
  for (int i = 0; i < count; ++i) loaded[i] = Vec::load_words(words + i * step);
  const Vec::F split = Vec::mul(scale, Vec::splat(8193.0f));
  (
      [&] {
        const Vec::F code = signed_code<B, I>(loaded);
        if constexpr (Exact) {
          sink(Index<I>{}, Vec::round_half(Vec::mul(code, scale)));
        } else {
          const Vec::F big = Vec::mul(code, split);
          sink(Index<I>{}, Vec::sub(big, Vec::subtract_product(big, code, scale)));
        }
      }(),
      ...);
}

// The stretch of one group's rows that a call of a row loop covers, with its scales.
struct Group {
  const char* words;   // first word row, column 0
  const char* scales;  // scale row, column 0
  int64_t step;        // bytes from one word row to the next
  Vec::F unit;         // half(max / 256) in every lane
};

inline Group open_group(const LinearView& view, const GroupSpan& span) {
  uint16_t maximum;
  memcpy(&maximum, view.scale_max + 2 * span.index, sizeof maximum);
  const float unit = half_to_float(float_to_half(half_to_float(maximum) * (1.0f / 256.0f)));
  return {view.words + span.word * view.n * 4, view.scales + span.index * (view.n / 8) * 4, view.n * 4,
          Vec::splat(unit)};
}

inline Vec::F column_scales(const Group& group, int64_t column) {
  const Vec::F steps = Vec::scale_steps(group.scales, column);  // n, 1..16
  return Vec::round_half(Vec::mul(Vec::mul(steps, steps), group.unit));
}

// Whether some weight of b bits with these scales reaches half's infinity.
template <int B>
inline bool overflows(Vec::F scale) {
  return Vec::any_at_least(scale, 65520.0f / static_cast<float>(layout::zero_point(B)));
}

// Weights of one unit as float rows: out[i * stride], i < Count.
template <int B, int Count>
inline void decode_to_rows(const Group& group, const char* words, int64_t column, float* out, int64_t stride) {
  const Vec::F scale = column_scales(group, column);
  const auto store = [&](auto row, Vec::F weight) { Vec::store(out + decltype(row)::value * stride, weight); };
  if (__builtin_expect(overflows<B>(scale), 0))
    decode<B, true>(words, group.step, scale, store, typename MakeRows<Count>::type{});
  else
    decode<B, false>(words, group.step, scale, store, typename MakeRows<Count>::type{});
}

// ---- Few tokens: sums[column vector][M][lane] += x . w, the words streamed once -------------------------------

template <int B, int M, int Count>
inline void stream_unit(const Group& group, const char* words, int64_t first, int64_t last, const float* x,
                        float* sums) {
  constexpr int parts = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums that hide the latency of the addition
  const int64_t ahead = group.step * layout::unit_words(B, Count);
  for (int64_t column = first; column < last; column += kLanes, sums += M * kLanes) {
    const char* at = words + column * 4;
    for (int i = 0; i < layout::unit_words(B, Count); ++i) __builtin_prefetch(at + ahead + i * group.step);
    const Vec::F scale = column_scales(group, column);
    Vec::F partial[M][parts];
    for (int m = 0; m < M; ++m)
      for (int p = 0; p < parts; ++p) partial[m][p] = Vec::splat(0.0f);
    if (__builtin_expect(overflows<B>(scale), 0)) {
      alignas(64) float rows[Count * kLanes];
      decode_to_rows<B, Count>(group, at, column, rows, kLanes);
      for (int i = 0; i < Count; ++i)
        for (int m = 0; m < M; ++m)
          partial[m][i % parts] =
              Vec::multiply_add(Vec::load(rows + i * kLanes), Vec::splat(x[i * M + m]), partial[m][i % parts]);
    } else {
      decode<B, false>(
          at, group.step, scale,
          [&](auto row, Vec::F weight) {
            constexpr int i = decltype(row)::value;
            for (int m = 0; m < M; ++m)
              partial[m][i % parts] = Vec::multiply_add(weight, Vec::splat(x[i * M + m]), partial[m][i % parts]);
          },
          typename MakeRows<Count>::type{});
    }
    for (int m = 0; m < M; ++m) {
      Vec::F total = partial[m][0];
      if constexpr (parts == 2) total = Vec::add(total, partial[m][1]);
      if constexpr (parts == 4)
        total = Vec::add(Vec::add(total, partial[m][1]), Vec::add(partial[m][2], partial[m][3]));
      Vec::store(sums + m * kLanes, Vec::add(Vec::load(sums + m * kLanes), total));
    }
  }
}

template <int B, int M>
void stream_group(const LinearView& view, const GroupSpan& span, int64_t first, int64_t last, const float* packed,
                  float* sums) {
  const Group group = open_group(view, span);
  const float* x = packed + span.row * M;
  const char* words = group.words;
  int64_t row = 0;
  for (; row + layout::kUnitRows <= span.rows; row += layout::kUnitRows) {
    stream_unit<B, M, layout::kUnitRows>(group, words, first, last, x + row * M, sums);
    words += group.step * B;
  }
  if constexpr (B == 2)
    if (row < span.rows) stream_unit<B, M, layout::kTailRows>(group, words, first, last, x + row * M, sums);
}

template <int M>
void stream(const LinearView& view, const float* packed, int64_t tokens, int64_t first, int64_t last, float* sums,
            int64_t stride, float* scratch) {
  const int64_t columns = last - first;
  memset(scratch, 0, sizeof(float) * static_cast<size_t>(columns * M));
  for (const GroupSpan& span : view.groups) {
    switch (span.bits) {
      case 2: stream_group<2, M>(view, span, first, last, packed, scratch); break;
      case 3: stream_group<3, M>(view, span, first, last, packed, scratch); break;
      case 4: stream_group<4, M>(view, span, first, last, packed, scratch); break;
      case 5: stream_group<5, M>(view, span, first, last, packed, scratch); break;
      case 6: stream_group<6, M>(view, span, first, last, packed, scratch); break;
      default: stream_group<8, M>(view, span, first, last, packed, scratch); break;
    }
  }
  for (int64_t column = 0; column < columns; column += kLanes)
    for (int64_t m = 0; m < tokens; ++m)
      Vec::store(sums + m * stride + column, Vec::load(scratch + (column * M) + m * kLanes));
}

// ---- Many tokens: decode a panel, multiply it by all tokens ---------------------------------------------------

// sums[m * stride + 0 .. kPanelWidth) += sum over rows of x[row * Step + m] * panel[row], m < M, all in registers.
// Every kRunRows rows the registers are added to `sums`: short runs keep the rounding error near that of a tree.
constexpr int64_t kRunRows = 64;
template <int M, int Step>
inline void multiply_panel(const float* x, const float* panel, int64_t rows, float* sums, int64_t stride) {
  for (int64_t start = 0; start < rows; start += kRunRows) {
    const int64_t end = start + kRunRows < rows ? start + kRunRows : rows;
    Vec::F total[M][2];
    for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = Vec::splat(0.0f);
    for (int64_t row = start; row < end; ++row) {
      const Vec::F left = Vec::load(panel + row * kPanelWidth), right = Vec::load(panel + row * kPanelWidth + kLanes);
      for (int m = 0; m < M; ++m) {
        const Vec::F value = Vec::splat(x[row * Step + m]);
        total[m][0] = Vec::multiply_add(left, value, total[m][0]);
        total[m][1] = Vec::multiply_add(right, value, total[m][1]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int half = 0; half < 2; ++half) {
        float* at = sums + m * stride + half * kLanes;
        Vec::store(at, Vec::add(Vec::load(at), total[m][half]));
      }
  }
}

// All tokens times `rows` decoded rows (the packed rows from `row` on) of a band.
void multiply_band(const float* packed, int64_t tokens, int64_t k, int64_t row, int64_t rows, const float* panels,
                   int64_t columns, float* sums, int64_t stride) {
  constexpr int group = Vec::registers >= 32 ? 8 : 4;  // tokens whose sums fit in the registers
  for (int64_t token = 0; token < tokens; token += kTileTokens) {
    const int64_t left = tokens - token, m = tile_tokens(left);
    const float* x = packed + token * k + row * m;
    alignas(64) float spare[kTileTokens * kPanelWidth];  // a padded tile has more rows than `sums`
    for (int64_t column = 0; column < columns; column += kPanelWidth) {
      const float* panel = panels + column * kPanelRows;
      const bool padded = m > left;
      float* to = padded ? spare : sums + token * stride + column;
      const int64_t to_stride = padded ? kPanelWidth : stride;
      if (padded)
        for (int64_t i = 0; i < m; ++i)
          for (int64_t c = 0; c < kPanelWidth; ++c)
            spare[i * kPanelWidth + c] = i < left ? sums[(token + i) * stride + column + c] : 0.0f;
      if (m == 8) {
        for (int i = 0; i < 8; i += group) multiply_panel<group, 8>(x + i, panel, rows, to + i * to_stride, to_stride);
      } else if (m == 4) {
        multiply_panel<4, 4>(x, panel, rows, to, to_stride);
      } else if (m == 2) {
        multiply_panel<2, 2>(x, panel, rows, to, to_stride);
      } else {
        multiply_panel<1, 1>(x, panel, rows, to, to_stride);
      }
      if (padded)
        for (int64_t i = 0; i < left; ++i)
          memcpy(sums + (token + i) * stride + column, spare + i * kPanelWidth, sizeof(float) * kPanelWidth);
    }
  }
}

// panels[panel of kPanelWidth columns][kPanelRows][kPanelWidth], this unit from row `filled` on.
template <int B, int Count>
void decode_band(const Group& group, const char* words, int64_t first, int64_t last, int64_t filled, float* panels) {
  for (int64_t column = first; column < last; column += kLanes) {
    const int64_t inside = column - first, panel = inside / kPanelWidth * kPanelWidth;
    float* to = panels + panel * kPanelRows + filled * kPanelWidth + (inside - panel);
    decode_to_rows<B, Count>(group, words + column * 4, column, to, kPanelWidth);
  }
}

void decode_band_unit(const Group& group, int bits, int64_t rows, const char* words, int64_t first, int64_t last,
                      int64_t filled, float* panels) {
  constexpr int unit = layout::kUnitRows;
  switch (bits) {
    case 2:
      if (rows < unit)
        decode_band<2, layout::kTailRows>(group, words, first, last, filled, panels);
      else
        decode_band<2, unit>(group, words, first, last, filled, panels);
      break;
    case 3: decode_band<3, unit>(group, words, first, last, filled, panels); break;
    case 4: decode_band<4, unit>(group, words, first, last, filled, panels); break;
    case 5: decode_band<5, unit>(group, words, first, last, filled, panels); break;
    case 6: decode_band<6, unit>(group, words, first, last, filled, panels); break;
    default: decode_band<8, unit>(group, words, first, last, filled, panels); break;
  }
}

void panelled(const LinearView& view, const float* packed, int64_t tokens, int64_t first, int64_t last, float* sums,
              int64_t stride, float* panels) {
  const int64_t columns = last - first;
  for (int64_t t = 0; t < tokens; ++t) memset(sums + t * stride, 0, sizeof(float) * static_cast<size_t>(columns));
  int64_t start = 0, filled = 0;  // packed rows in `panels`
  for (const GroupSpan& span : view.groups) {
    const Group group = open_group(view, span);
    for (int64_t row = 0; row < span.rows; row += layout::kUnitRows) {
      const int64_t left = span.rows - row, rows = left < layout::kUnitRows ? left : layout::kUnitRows;
      const char* words = group.words + row * span.bits / 32 * group.step;
      decode_band_unit(group, span.bits, rows, words, first, last, filled, panels);
      filled += rows;
      if (filled + layout::kUnitRows > kPanelRows || start + filled == view.k) {
        multiply_band(packed, tokens, view.k, start, filled, panels, columns, sums, stride);
        start += filled;
        filled = 0;
      }
    }
  }
}

void multiply(const LinearView& view, const float* packed, int64_t tokens, int64_t first, int64_t last, float* sums,
              int64_t stride, float* scratch) {
  if (tokens > kStreamTokens) return panelled(view, packed, tokens, first, last, sums, stride, scratch);
  switch (tile_tokens(tokens)) {
    case 1: return stream<1>(view, packed, tokens, first, last, sums, stride, scratch);
    case 2: return stream<2>(view, packed, tokens, first, last, sums, stride, scratch);
    case 4: return stream<4>(view, packed, tokens, first, last, sums, stride, scratch);
    default: return stream<8>(view, packed, tokens, first, last, sums, stride, scratch);
  }
}

// ---- The weights themselves -------------------------------------------------------------------------------------

template <int B, int Count>
void dequantize_unit(const LinearView& view, const Group& group, const char* words, const int32_t* permutation,
                     int64_t first, int64_t last, uint16_t* weight) {
  for (int64_t column = first; column < last; column += kLanes) {
    const int64_t wanted = view.out_features - column;
    if (wanted <= 0) return;
    const Vec::F scale = column_scales(group, column);
    decode<B, true>(
        words + column * 4, group.step, scale,
        [&](auto row, Vec::F value) {
          uint16_t* to = weight + static_cast<int64_t>(permutation[decltype(row)::value]) * view.out_features + column;
          if (wanted >= kLanes) {
            Vec::store_half(to, value);
          } else {
            uint16_t halves[kLanes];
            Vec::store_half(halves, value);
            memcpy(to, halves, sizeof(uint16_t) * static_cast<size_t>(wanted));
          }
        },
        typename MakeRows<Count>::type{});
  }
}

void dequantize(const LinearView& view, const int32_t* permutation, int64_t first, int64_t last, uint16_t* weight) {
  constexpr int unit = layout::kUnitRows;
  for (const GroupSpan& span : view.groups) {
    const Group group = open_group(view, span);
    for (int64_t row = 0; row < span.rows; row += unit) {
      const char* words = group.words + row * span.bits / 32 * group.step;
      const int32_t* to = permutation + span.row + row;
      switch (span.bits) {
        case 2:
          if (span.rows - row < unit)
            dequantize_unit<2, layout::kTailRows>(view, group, words, to, first, last, weight);
          else
            dequantize_unit<2, unit>(view, group, words, to, first, last, weight);
          break;
        case 3: dequantize_unit<3, unit>(view, group, words, to, first, last, weight); break;
        case 4: dequantize_unit<4, unit>(view, group, words, to, first, last, weight); break;
        case 5: dequantize_unit<5, unit>(view, group, words, to, first, last, weight); break;
        case 6: dequantize_unit<6, unit>(view, group, words, to, first, last, weight); break;
        default: dequantize_unit<8, unit>(view, group, words, to, first, last, weight); break;
      }
    }
  }
}

}  // namespace
}  // namespace dbrxq
