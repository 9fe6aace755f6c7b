// The router of a block of experts: norm, logits, softmax, the best of them and their weights, in one launch.
//
// A block owns a row and kWarps experts, a warp each. The last block of a row to come, by a ticket, has the row's logits
// and chooses. Of equal chances the first expert wins, as on the CPU.
#include "decoder.cuh"
#include "reduce.cuh"

namespace dbrxq {
namespace {

constexpr int kWarps = 4;

// The choice of one warp for a row whose logits lie in `chances` (shared).
__device__ void choose(const Router& args, int64_t row, float* chances) {
  const int lane = threadIdx.x % 32;
  float most = -INFINITY;
  for (int e = lane; e < args.experts; e += 32) most = chances[e] > most ? chances[e] : most;
  most = warp_maximum(most);
  float sum = 0.0f;
  for (int e = lane; e < args.experts; e += 32) sum += chances[e] = expf(chances[e] - most);
  sum = warp_sum(sum);
  float norm = 0.0f;
  const bool plain = args.expert_norm == 1.0f;
  for (int a = 0; a < args.active; ++a) {
    float best = -INFINITY;
    int where = 0;
    for (int e = lane; e < args.experts; e += 32)  // a lane takes out what it has chosen itself
      if (chances[e] > best) {
        best = chances[e];
        where = e;
      }
    const float winner = warp_maximum(best);
    const int chosen = static_cast<int>(-warp_maximum(best == winner ? -static_cast<float>(where) : -INFINITY));
    if (chosen % 32 == lane) chances[chosen] = -1.0f;
    const float weight = winner / sum;
    norm += plain || args.expert_norm == 0.0f ? weight : powf(weight, args.expert_norm);
    if (lane == 0) {
      args.index[row * args.active + a] = chosen;
      args.weights[row * args.active + a] = weight;
    }
  }
  if (args.expert_norm == 0.0f || lane != 0) return;
  if (!plain) norm = powf(norm, 1.0f / args.expert_norm);
  for (int a = 0; a < args.active; ++a) args.weights[row * args.active + a] /= norm;
}

__global__ void __launch_bounds__(32 * kWarps) router_kernel(Router args) {
  struct Shared {
    float chances[kMostExperts];
    float box[kWarps];
    int last;
  };
  DBRXQ_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.y;
  const float* x = args.x + row * args.hidden;
  const Moments own = moments_of(x, args.hidden, args.norm.layer_norm != 0, args.norm.eps, shared.box);
  const int expert = static_cast<int>(blockIdx.x) * kWarps + warp;
  if (expert < args.experts) {
    float sum = 0.0f;
    for (int64_t i = lane; i < args.hidden; i += 32)
      sum += (x[i] - own.mean) * own.factor * load(args.norm.weight, i, args.norm.dtype) *
             load(args.weight, expert * args.hidden + i, args.norm.dtype);
    sum = warp_sum(sum);
    if (lane == 0) args.logits[row * args.experts + expert] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(args.tickets + row, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  if (threadIdx.x == 0) args.tickets[row] = 0;
  for (int e = threadIdx.x; e < args.experts; e += 32 * kWarps)
    shared.chances[e] = load_shared_result(args.logits + row * args.experts + e);
  __syncthreads();
  if (warp == 0) choose(args, row, shared.chances);
}

}  // namespace

int choose_experts(const Router& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.experts + kWarps - 1) / kWarps), static_cast<unsigned>(args.rows));
  return launch(router_kernel, grid, 32 * kWarps, stream, args);
}

}  // namespace dbrxq
