// Both ends of a decode step: the rows of the embedding, and the norm behind the last layer. A block is a row.
#include "../few/reduce.cuh"
#include "decoder.cuh"
#include "matmul.cuh"

namespace dbrxq {
namespace {

constexpr int kWarps = 8;

__global__ void __launch_bounds__(32 * kWarps) embed_kernel(Embed args) {
  const int64_t row = blockIdx.x;
  int64_t token = args.tokens[row];
  if (token < 0 || token >= args.vocabulary) token = 0;
  for (int64_t i = threadIdx.x; i < args.hidden; i += 32 * kWarps)
    args.x[row * args.hidden + i] = load(args.table, token * args.hidden + i, args.dtype);
}

__global__ void __launch_bounds__(32 * kWarps) normalise_kernel(Normalise args) {
  struct Shared {
    float box[kWarps];
  };
  DBRXQ_SHARED(Shared, shared);
  const int64_t first = blockIdx.x * args.hidden;
  const float* x = args.x + first;
  const Moments own = moments_of(x, args.hidden, args.norm.layer_norm != 0, args.norm.eps, shared.box);
  for (int64_t i = threadIdx.x; i < args.hidden; i += 32 * kWarps)
    store(args.y, first + i, args.dtype, (x[i] - own.mean) * own.factor * load(args.norm.weight, i, args.norm.dtype));
}

}  // namespace

int embed(const Embed& args, cudaStream_t stream) {
  return launch(embed_kernel, dim3(static_cast<unsigned>(args.rows)), 32 * kWarps, stream, args);
}

int normalise(const Normalise& args, cudaStream_t stream) {
  return launch(normalise_kernel, dim3(static_cast<unsigned>(args.rows)), 32 * kWarps, stream, args);
}

}  // namespace dbrxq
