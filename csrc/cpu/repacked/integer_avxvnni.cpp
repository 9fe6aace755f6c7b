// AVX-VNNI: the byte dot product on 256-bit vectors, for CPUs without AVX-512.
#include <immintrin.h>
#include <string.h>

#include "half.h"
#include "repacked.h"

namespace dbrxq {
namespace {

template <bool Wide>
inline __m256i dot256(__m256i sum, __m256i codes, __m256i values) {
  return _mm256_dpbusd_avx_epi32(sum, codes, values);
}

}  // namespace
}  // namespace dbrxq

#include "integer_vec256.h"
//
#include "integer_impl.h"

namespace dbrxq {
const IntegerKernels kAvxVnniInteger = {Vec::tokens, quantize, multiply<Vec::tokens>};
}
