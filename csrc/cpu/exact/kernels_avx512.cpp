// AVX-512 (F, BW, VL, DQ): 16 columns a vector.
#include <immintrin.h>
#include <string.h>

#include "half.h"
#include "kernels.h"
#include "layout.h"

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 16, registers = 32;
  using F = __m512;
  using I = __m512i;
  static F splat(float value) { return _mm512_set1_ps(value); }
  static I splat_int(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static I load_words(const char* from) { return _mm512_loadu_si512(from); }
  template <int S> static I shift_right(I value) { return _mm512_srli_epi32(value, S); }
  template <int S> static I shift_left(I value) { return _mm512_slli_epi32(value, S); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I and_or(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }  // (a & b) | c
  static F as_float(I bits) { return _mm512_castsi512_ps(bits); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F subtract_product(F a, F b, F c) { return _mm512_fnmadd_ps(b, c, a); }  // a - b c
  static bool any_at_least(F a, float bound) { return _mm512_cmp_ps_mask(a, splat(bound), _CMP_GE_OQ) != 0; }
  static __m256i to_half(F value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F round_half(F value) { return _mm512_cvtph_ps(to_half(value)); }
  static void store_half(uint16_t* to, F value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }
  // n of 16 columns from two scale words: each word goes to eight lanes, each lane shifts its own nibble down.
  static F scale_steps(const char* scales, int64_t column) {
    const char* from = scales + layout::scale_word(column) * 4;
    const I which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const I shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const I words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const I nibbles =
        _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi32(which, words), shifts), splat_int(15));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(nibbles, splat_int(1)));
  }
};

}  // namespace
}  // namespace dbrxq

#include "kernels_impl.h"

namespace dbrxq {
const Kernels kAvx512Kernels = {multiply, dequantize};
}
