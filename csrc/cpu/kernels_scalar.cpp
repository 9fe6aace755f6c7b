// Plain C++, for any CPU: 8 columns in loops that the compiler may turn into whatever vectors it may assume.
#include <string.h>

#include "half.h"
#include "kernels.h"
#include "layout.h"

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 8, registers = 16;
  struct F {
    float at[lanes];
  };
  struct I {
    uint32_t at[lanes];
  };
  template <class Result, class Body>
  static inline Result each(Body body) {
    Result result;
    for (int i = 0; i < lanes; ++i) result.at[i] = body(i);
    return result;
  }
  static F splat(float value) { return each<F>([&](int) { return value; }); }
  static I splat_int(uint32_t value) { return each<I>([&](int) { return value; }); }
  static F load(const float* from) { return each<F>([&](int i) { return from[i]; }); }
  static void store(float* to, const F& value) { memcpy(to, value.at, sizeof value.at); }
  static I load_words(const char* from) {
    I words;
    memcpy(words.at, from, sizeof words.at);
    return words;
  }
  template <int S>
  static I shift_right(const I& value) { return each<I>([&](int i) { return value.at[i] >> S; }); }
  template <int S>
  static I shift_left(const I& value) { return each<I>([&](int i) { return value.at[i] << S; }); }
  static I either(const I& a, const I& b) { return each<I>([&](int i) { return a.at[i] | b.at[i]; }); }
  static I and_or(const I& a, const I& b, const I& c) {
    return each<I>([&](int i) { return (a.at[i] & b.at[i]) | c.at[i]; });
  }
  static F as_float(const I& bits) { return each<F>([&](int i) { return bits_to_float(bits.at[i]); }); }
  static F add(const F& a, const F& b) { return each<F>([&](int i) { return a.at[i] + b.at[i]; }); }
  static F sub(const F& a, const F& b) { return each<F>([&](int i) { return a.at[i] - b.at[i]; }); }
  static F mul(const F& a, const F& b) { return each<F>([&](int i) { return a.at[i] * b.at[i]; }); }
  // Two roundings: without the instruction a fused product is a library call per element.
  static F multiply_add(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static bool any_at_least(const F& a, float bound) {
    bool any = false;
    for (int i = 0; i < lanes; ++i) any |= a.at[i] >= bound;
    return any;
  }
  static F round_half(const F& value) {
    return each<F>([&](int i) { return half_to_float(float_to_half(value.at[i])); });
  }
  static void store_half(uint16_t* to, const F& value) {
    for (int i = 0; i < lanes; ++i) to[i] = float_to_half(value.at[i]);
  }
  static F scale_steps(const char* from) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return each<F>([&](int i) { return static_cast<float>((word >> layout::scale_shift(i) & 15u) + 1u); });
  }
};

}  // namespace
}  // namespace dbrxq

#include "kernels_impl.h"

namespace dbrxq {
const Kernels kScalarKernels = {multiply, dequantize};
}
