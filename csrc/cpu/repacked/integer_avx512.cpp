// AVX-512 with VNNI: 16 columns a vector.
#include <immintrin.h>
#include <string.h>

#include "half.h"
#include "repacked.h"

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 16, tokens = 8;
  static constexpr bool any_byte = true;  // `dot` takes codes of any size
  static constexpr int ahead = 8192;      // bytes of codes fetched in advance
  using F = __m512;
  using I = __m512i;
  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* from) { return _mm512_loadu_si512(from); }
  static I splat_int(int32_t value) { return _mm512_set1_epi32(value); }
  static I and_mask(I a, uint32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(mask))); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  template <int S> static I shift_right(I a) { return _mm512_srli_epi32(a, S); }
  template <int S> static I shift_signed(I a) { return _mm512_srai_epi32(a, S); }
  template <int S> static I shift_left(I a) { return _mm512_slli_epi32(a, S); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  template <bool Wide>
  static I dot(I sum, I codes, I values) {
    // What _mm512_dpbusd_epi32 does; with that, GCC 12 copies sums from register to register and into memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(values));
    return sum;
  }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F splat(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // As assembly: a function that only prefetches looks to GCC as if it did nothing, and its calls are dropped.
  static void prefetch(const char* at) { asm volatile("prefetcht0 %0" : : "m"(*at)); }
  // table[step] of columns first..first+15: the permutation looks at the low four bits of its index only.
  static F column_scales(const uint8_t* steps, const float* table, int first) {
    I index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(steps)));
    if (first == 16) index = _mm512_srli_epi32(index, 4);
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
  }
};

}  // namespace
}  // namespace dbrxq

#include "integer_impl.h"

namespace dbrxq {
const IntegerKernels kAvx512Integer = {Vec::tokens, quantize, multiply<Vec::tokens>};
}
