// AVX-512: 16 floats a vector.
#include <immintrin.h>
#include <stdint.h>

#include "dbrxq.h"
#include "decoder_kernels.h"
#include "half.h"

namespace dbrxq {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(4 * kLanes)));
inline float total(F value) { return _mm512_reduce_add_ps(value); }
inline F load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

}  // namespace
}  // namespace dbrxq

#include "decoder_impl.h"

namespace dbrxq {
const DecoderKernels kAvx512Decoder = {attend, normalise, silu_product, dot, store};
}
