// AVX2 with FMA and F16C: 8 columns a vector.
#include <immintrin.h>
#include <string.h>

#include "half.h"
#include "kernels.h"
#include "layout.h"

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 8, registers = 16;
  using F = __m256;
  using I = __m256i;
  static F splat(float value) { return _mm256_set1_ps(value); }
  static I splat_int(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static I load_words(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  template <int S> static I shift_right(I value) { return _mm256_srli_epi32(value, S); }
  template <int S> static I shift_left(I value) { return _mm256_slli_epi32(value, S); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  static I and_or(I a, I b, I c) { return _mm256_or_si256(_mm256_and_si256(a, b), c); }
  static F as_float(I bits) { return _mm256_castsi256_ps(bits); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F subtract_product(F a, F b, F c) { return _mm256_fnmadd_ps(b, c, a); }  // a - b c
  static bool any_at_least(F a, float bound) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, splat(bound), _CMP_GE_OQ)) != 0;
  }
  static __m128i to_half(F value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F round_half(F value) { return _mm256_cvtph_ps(to_half(value)); }
  static void store_half(uint16_t* to, F value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_half(value)); }
  static F scale_steps(const char* scales, int64_t column) {
    int32_t word;
    memcpy(&word, scales + layout::scale_word(column) * 4, sizeof word);
    const I shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const I nibbles = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), splat_int(15));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(nibbles, splat_int(1)));
  }
};

}  // namespace
}  // namespace dbrxq

#include "kernels_impl.h"

namespace dbrxq {
const Kernels kAvx2Kernels = {multiply, dequantize};
}
