// For any CPU: 4 columns a vector in the compiler's own vector types.
#include <string.h>

#include "half.h"
#include "repacked.h"

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 4, tokens = 2;
  static constexpr bool any_byte = true;
  static constexpr int ahead = 2048;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static I zero() { return I{0, 0, 0, 0}; }
  static I load(const void* from) {
    I value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static I splat_int(int32_t value) { return I{value, value, value, value}; }
  static I and_mask(I a, uint32_t mask) { return a & splat_int(static_cast<int32_t>(mask)); }
  static I either(I a, I b) { return a | b; }
  template <int S> static I shift_right(I a) { return reinterpret_cast<I>(reinterpret_cast<U>(a) >> S); }
  template <int S> static I shift_signed(I a) { return a >> S; }
  template <int S> static I shift_left(I a) { return reinterpret_cast<I>(reinterpret_cast<U>(a) << S); }
  static I add_int(I a, I b) { return a + b; }
  // Byte by byte. The products fit in 16 bits, and multiplying the low halves of the lanes is what SSE2 can do.
  template <bool Wide>
  static I dot(I sum, I codes, I values) {
    const U code = reinterpret_cast<U>(codes);
    sum += reinterpret_cast<I>(code & 255) * (values << 24 >> 24);
    sum += reinterpret_cast<I>(code >> 8 & 255) * (values << 16 >> 24);
    sum += reinterpret_cast<I>(code >> 16 & 255) * (values << 8 >> 24);
    sum += reinterpret_cast<I>(code >> 24) * (values >> 24);
    return sum;
  }
  static F to_float(I a) { return __builtin_convertvector(a, F); }
  static F splat(float value) { return F{value, value, value, value}; }
  static F load(const float* from) {
    F value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static void store(float* to, F value) { memcpy(to, &value, sizeof value); }
  static F mul(F a, F b) { return a * b; }
  static F multiply_add(F a, F b, F c) { return a * b + c; }
  static void prefetch(const char*) {}
  static F column_scales(const uint8_t* steps, const float* table, int first) {
    F scales;
    for (int i = 0; i < lanes; ++i) scales[i] = table[steps[(first + i) % 16] >> (first < 16 ? 0 : 4) & 15];
    return scales;
  }
};

}  // namespace
}  // namespace dbrxq

#include "integer_impl.h"

namespace dbrxq {
const IntegerKernels kScalarInteger = {Vec::tokens, quantize, multiply<Vec::tokens>};
}
