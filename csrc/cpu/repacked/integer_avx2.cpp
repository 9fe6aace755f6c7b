// AVX2: bytes are multiplied and added in pairs with 16-bit saturation, which codes of up to 7 bits never reach
// (2 * 127 * 127 < 2^15); codes of 8 bits go in two parts.
#include <immintrin.h>
#include <string.h>

#include "half.h"
#include "repacked.h"

namespace dbrxq {
namespace {

template <bool Wide>
inline __m256i dot256(__m256i sum, __m256i codes, __m256i values) {
  const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(-128);
  if constexpr (Wide) {
    const __m256i upper = _mm256_maddubs_epi16(_mm256_and_si256(codes, top), values);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(upper, ones));
    codes = _mm256_andnot_si256(top, codes);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), ones));
}

}  // namespace
}  // namespace dbrxq

#include "integer_vec256.h"
//
#include "integer_impl.h"

namespace dbrxq {
const IntegerKernels kAvx2Integer = {Vec::tokens, quantize, multiply<Vec::tokens>};
}
