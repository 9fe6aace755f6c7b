// Activations to integers, as the tiles that repacked.h describes. Included by integer_impl.h, and so compiled once for
// each instruction set: everything sits in an unnamed namespace and uses no inline function of the standard library.

namespace dbrxq {
namespace {

constexpr int kLongest = bands::kSegmentUnits * layout::kUnitRows;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kSmallest = 1e-30f;       // activations below it are taken for zero
constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: added to a small float, leaves an integer in the low bits
constexpr int32_t kRoundingBits = 0x4b400000;

// values[i] = nearest integer (ties to even) of x[i] * factor; returns their sum.
inline int32_t round_values(const float* x, float factor, int rows, int32_t* values) {
  int32_t total = 0;
  for (int i = 0; i < rows; ++i) {
    values[i] = static_cast<int32_t>(float_to_bits(x[i] * factor + kRounding)) - kRoundingBits;
    total += values[i];
  }
  return total;
}

// The widest segments come first.
bool any_two_bytes(const PackedView& view, int activation_bits) {
  return view.header->segments && two_bytes(activation_bits, view.segments[0].bits);
}

// Bits of the largest magnitude of a row; of an infinity or a NaN, if there is one.
uint32_t largest_bits(const float* row, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_to_bits(row[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// One token.
void quantize_one(const PackedView& view, int activation_bits, const float* row, const ActivationTile& tile) {
  alignas(64) float x[kLongest];
  alignas(64) int32_t values[kLongest];
  alignas(64) int8_t upper[kLongest], lower[kLongest];
  const uint32_t largest_of_row = any_two_bytes(view, activation_bits) ? largest_bits(row, view.header->k) : 0;
  for (int64_t s = 0; s < view.header->segments; ++s) {
    const Segment& segment = view.segments[s];
    const int count = segment.units * layout::kUnitRows;
    const bool two = two_bytes(activation_bits, segment.bits);
    const int32_t* channel = view.permutation + segment.unit * layout::kUnitRows;
    for (int i = 0; i < count; ++i) {
      x[i] = row[channel[i]];
      asm("");  // one by one: the gather instructions that compilers take here are slower
    }
    const uint32_t largest = two ? largest_of_row : largest_bits(x, count);
    const bool finite = largest < kInfinity;
    const float top = two ? 16256.0f : 127.0f, maximum = bits_to_float(largest);
    int32_t total = 0;
    if (finite && maximum > kSmallest) {
      total = round_values(x, top / maximum, count, values);
    } else {
      memset(values, 0, sizeof values);
    }
    tile.scales[s] = finite ? maximum / top : bits_to_float(0x7fc00000u);
    tile.offsets[s] = -layout::zero_point(segment.bits) * total;
    for (int i = 0; i < count; ++i) {
      const int32_t value = values[i], part = two ? (value + 64) >> 7 : value;
      upper[i] = static_cast<int8_t>(part);
      lower[i] = static_cast<int8_t>(two ? value - 128 * part : 0);
    }
    const int64_t first = static_cast<int64_t>(segment.unit) * bands::kQuads;
    memcpy(tile.high + first, upper, static_cast<size_t>(count));
    memcpy(tile.low + first, lower, static_cast<size_t>(count));
  }
}

using Floats = float __attribute__((vector_size(4 * kLargestTile)));  // a token a lane
using Ints = int32_t __attribute__((vector_size(4 * kLargestTile)));

// Several tokens side by side (rows[0] is one): maxima, sums and words of four rows come out in the order of the tile.
void quantize_several(const PackedView& view, int activation_bits, const float* const* rows, int64_t m,
                      const ActivationTile& tile) {
  Floats x[kLongest];
  const auto put = [m](void* to, const auto& lanes) DBRXQ_INLINE {
    if (m == kLargestTile)
      memcpy(to, &lanes, sizeof lanes);
    else
      memcpy(to, &lanes, sizeof(int32_t) * static_cast<size_t>(m));
  };
  const float* of[kLargestTile];
  Ints present = {}, largest_of_row = {};
  for (int t = 0; t < kLargestTile; ++t) {
    present[t] = t < m && rows[t] ? -1 : 0;
    of[t] = present[t] ? rows[t] : rows[0];  // any values: they are masked out
    if (present[t] && any_two_bytes(view, activation_bits))
      largest_of_row[t] = static_cast<int32_t>(largest_bits(rows[t], view.header->k));
  }
  for (int64_t s = 0; s < view.header->segments; ++s) {
    const Segment& segment = view.segments[s];
    const int count = segment.units * layout::kUnitRows;
    const bool two = two_bytes(activation_bits, segment.bits);
    const int32_t* channel = view.permutation + segment.unit * layout::kUnitRows;
    for (int i = 0; i < count; ++i) {
      float* to = reinterpret_cast<float*>(x + i);
      for (int t = 0; t < kLargestTile; ++t) {
        to[t] = of[t][channel[i]];
        asm("");
      }
    }
    Ints largest = two ? largest_of_row : Ints{};
    for (int i = 0; i < count && !two; ++i) {
      const Ints magnitude = reinterpret_cast<Ints>(x[i]) & present & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float top = two ? 16256.0f : 127.0f;
    const Ints finite = largest < static_cast<int32_t>(kInfinity);
    const Floats maximum = reinterpret_cast<Floats>(largest);
    const Ints usable = finite & (maximum > kSmallest) & present;
    const Floats factor = top / maximum;
    Ints total = {};
    int32_t* high = tile.high + static_cast<int64_t>(segment.unit) * bands::kQuads * m;
    int32_t* low = tile.low + static_cast<int64_t>(segment.unit) * bands::kQuads * m;
    for (int i = 0; i < count; i += 4, high += m, low += m) {
      Ints upper = {}, lower = {};
      for (int j = 0; j < 4; ++j) {
        const Floats rounded = x[i + j] * factor + kRounding;
        const Ints value = (reinterpret_cast<Ints>(rounded) - kRoundingBits) & usable;
        const Ints part = two ? (value + 64) >> 7 : value;
        total += value;
        upper |= (part & 255) << (8 * j);
        lower |= ((value - (part << 7)) & 255) << (8 * j);
      }
      put(high, upper);
      if (two) put(low, lower);
    }
    const Floats scale = maximum / top;
    const Ints bits = finite ? reinterpret_cast<Ints>(scale) : Ints{} + 0x7fc00000;
    total *= -layout::zero_point(segment.bits);
    put(tile.scales + s * m, bits);
    put(tile.offsets + s * m, total);
  }
}

void quantize(const PackedView& view, int activation_bits, const float* const* rows, int64_t m,
              const ActivationTile& tile) {
  if (m == 1)
    quantize_one(view, activation_bits, rows[0], tile);
  else
    quantize_several(view, activation_bits, rows, m, tile);
}

}  // namespace
}  // namespace dbrxq
