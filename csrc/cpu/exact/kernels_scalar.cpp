// For any CPU: 4 columns a vector in the compiler's own vector types, which become whatever the baseline has (SSE2 on
// x86-64) or plain scalar code.
#include <string.h>

#include "half.h"
#include "kernels.h"
#include "layout.h"

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 4, registers = 16;
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t I __attribute__((vector_size(16)));
  static F splat(float value) { return F{value, value, value, value}; }
  static I splat_int(uint32_t value) { return I{value, value, value, value}; }
  static F load(const float* from) {
    F value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static void store(float* to, F value) { memcpy(to, &value, sizeof value); }
  static I load_words(const char* from) {
    I words;
    memcpy(&words, from, sizeof words);
    return words;
  }
  template <int S> static I shift_right(I value) { return value >> S; }
  template <int S> static I shift_left(I value) { return value << S; }
  static I either(I a, I b) { return a | b; }
  static I and_or(I a, I b, I c) { return (a & b) | c; }
  static F as_float(I bits) {
    F value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  // Two roundings: without the instruction a fused product is a library call per element.
  static F multiply_add(F a, F b, F c) { return a * b + c; }
  static F subtract_product(F a, F b, F c) { return a - b * c; }
  static bool any_at_least(F a, float bound) {
    return a[0] >= bound || a[1] >= bound || a[2] >= bound || a[3] >= bound;
  }
  static F round_half(F value) {
    for (int i = 0; i < lanes; ++i) value[i] = half_to_float(float_to_half(value[i]));
    return value;
  }
  static void store_half(uint16_t* to, F value) {
    for (int i = 0; i < lanes; ++i) to[i] = float_to_half(value[i]);
  }
  static F scale_steps(const char* scales, int64_t column) {
    uint32_t word;
    memcpy(&word, scales + layout::scale_word(column) * 4, sizeof word);
    F steps;
    for (int i = 0; i < lanes; ++i) steps[i] = static_cast<float>((word >> layout::scale_shift(column + i) & 15u) + 1u);
    return steps;
  }
};

}  // namespace
}  // namespace dbrxq

#include "kernels_impl.h"

namespace dbrxq {
const Kernels kScalarKernels = {multiply, dequantize};
}
