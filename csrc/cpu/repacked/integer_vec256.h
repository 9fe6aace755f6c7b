// The 256-bit vector type of the integer kernels, 8 columns a vector; the includer defines dbrxq::dot256 first.
#pragma once

namespace dbrxq {
namespace {

struct Vec {
  static constexpr int lanes = 8, tokens = 2;
  static constexpr bool any_byte = false;
  static constexpr int ahead = 8192;
  using F = __m256;
  using I = __m256i;
  static I zero() { return _mm256_setzero_si256(); }
  static I load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static I splat_int(int32_t value) { return _mm256_set1_epi32(value); }
  static I and_mask(I a, uint32_t mask) { return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(mask))); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  template <int S> static I shift_right(I a) { return _mm256_srli_epi32(a, S); }
  template <int S> static I shift_signed(I a) { return _mm256_srai_epi32(a, S); }
  template <int S> static I shift_left(I a) { return _mm256_slli_epi32(a, S); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  template <bool Wide> static I dot(I sum, I codes, I values) { return dot256<Wide>(sum, codes, values); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F splat(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // As assembly: a function that only prefetches looks to GCC as if it did nothing, and its calls are dropped.
  static void prefetch(const char* at) { asm volatile("prefetcht0 %0" : : "m"(*at)); }
  // table[step] of columns first..first+7: two look-ups of eight entries, chosen between by the step's top bit.
  static F column_scales(const uint8_t* steps, const float* table, int first) {
    I index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(steps + first % 16)));
    if (first >= 16) index = _mm256_srli_epi32(index, 4);
    const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const F high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

}  // namespace
}  // namespace dbrxq
