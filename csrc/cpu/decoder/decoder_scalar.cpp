// For any CPU: 4 floats a vector, which become whatever the baseline has.
#include <stdint.h>

#include "dbrxq.h"
#include "decoder_kernels.h"
#include "half.h"

namespace dbrxq {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(4 * kLanes)));
inline float total(F value) { return (value[0] + value[2]) + (value[1] + value[3]); }
inline F load_half(const uint16_t* from) {
  return F{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
}

}  // namespace
}  // namespace dbrxq

#include "decoder_impl.h"

namespace dbrxq {
const DecoderKernels kScalarDecoder = {attend, normalise, silu_product, dot, store};
}
