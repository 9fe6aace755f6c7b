// Routing on the device: slots (token, choice) sorted by expert into row tiles; and the weighted sum at the end.
//
//   slots of expert 0 | padding | slots of expert 1 | padding | ...      each expert starts a row tile
//   tile_expert:  0     0         1     2 ...  -1 -1                     -1: the fixed grid has more tiles than work
//
// Nothing here leaves the device, and grids depend on sizes alone, so the whole can be captured in a CUDA graph. Slots
// of an expert keep their order: the same routing gives the same rows, and every row its own sum.
#include "activation.cuh"
#include "kernels.cuh"

namespace dbrxq {
namespace {

constexpr int kRouteThreads = 512;
constexpr int kMaxExperts = 1024;
constexpr uint32_t kAllLanes = 0xffffffffu;

// One block. A warp counts, and then places, the slots of one expert at a time, 32 slots a vote.
__global__ void __launch_bounds__(kRouteThreads) route_kernel(Route args) {
  struct Shared {
    int count[kMaxExperts];
    int first_tile[kMaxExperts];
    int tiles;
  };
  DBRXQ_SHARED(Shared, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t earlier = (1u << lane) - 1u;

  for (int e = warp; e < args.experts; e += kRouteThreads / 32) {
    int count = 0;
    for (int slot = 0; slot < args.slots; slot += 32)
      count += __popc(__ballot_sync(kAllLanes, slot + lane < args.slots && args.top_k_index[slot + lane] == e));
    if (lane == 0) shared.count[e] = count;
  }
  for (int i = threadIdx.x; i < args.row_tiles * args.tile_tokens; i += kRouteThreads) args.row_slot[i] = -1;
  for (int i = threadIdx.x; i < args.slots; i += kRouteThreads) args.slot_row[i] = -1;
  __syncthreads();
  if (threadIdx.x == 0) {
    int tile = 0;
    for (int e = 0; e < args.experts; ++e) {
      shared.first_tile[e] = tile;
      for (int left = shared.count[e]; left > 0; left -= args.tile_tokens, ++tile) {
        args.tile_expert[tile] = e;
        args.tile_rows[tile] = (left < args.tile_tokens ? left : args.tile_tokens) * args.parts;
      }
    }
    shared.tiles = tile;
  }
  __syncthreads();
  for (int i = shared.tiles + static_cast<int>(threadIdx.x); i < args.row_tiles; i += kRouteThreads) {
    args.tile_expert[i] = -1;
    args.tile_rows[i] = 0;
  }
  for (int e = warp; e < args.experts; e += kRouteThreads / 32) {
    int row = shared.first_tile[e] * args.tile_tokens;
    for (int slot = lane; slot - lane < args.slots; slot += 32) {
      const bool mine = slot < args.slots && args.top_k_index[slot] == e;
      const uint32_t votes = __ballot_sync(kAllLanes, mine);
      if (mine) {
        const int own = row + __popc(votes & earlier);
        args.row_slot[own] = slot;
        args.slot_row[slot] = own;
      }
      row += __popc(votes);
    }
  }
}

constexpr int kCombineThreads = 256;

// y[t] = sum over a of top_k_weights[t, a] * outputs[slot_row[t, a]], in the order of a.
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(Combine args) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x, token = blockIdx.y;
  if (column >= args.hidden) return;
  float sum = 0.0f;
  for (int64_t a = 0; a < args.active; ++a) {
    const int row = args.slot_row[token * args.active + a];
    if (row >= 0) sum += args.top_k_weights[token * args.active + a] * args.outputs[row * args.hidden + column];
  }
  store(args.y, token * args.hidden + column, args.dtype, sum);
}

}  // namespace

int route(const Route& args, cudaStream_t stream) { return launch(route_kernel, dim3(1), kRouteThreads, stream, args); }

int combine(const Combine& args, cudaStream_t stream) {
  const int64_t blocks = (args.hidden + kCombineThreads - 1) / kCombineThreads;
  return launch(combine_kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.tokens)),
                kCombineThreads, stream, args);
}

}  // namespace dbrxq
