// AVX2 with FMA and F16C: 8 floats a vector.
#include <immintrin.h>
#include <stdint.h>

#include "dbrxq.h"
#include "decoder_kernels.h"
#include "half.h"

namespace dbrxq {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(4 * kLanes)));
inline float total(F value) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline F load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

}  // namespace
}  // namespace dbrxq

#include "decoder_impl.h"

namespace dbrxq {
const DecoderKernels kAvx2Decoder = {attend, normalise, silu_product, dot, store};
}
