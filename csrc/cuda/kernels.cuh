// The kernels as the C ABI calls them (api.cu). Each only enqueues on `stream` and returns a cudaError_t.
#pragma once
#include "few/few.cuh"
#include "matmul.cuh"

namespace dbrxq {

// layout/repack.cu: words of the device layout from q_weight [R, N] of the file, and back; of `linear` the sizes count.
int repack(const Linear& linear, const uint32_t* q_weight, uint32_t* words, cudaStream_t stream);
int unpack(const Linear& linear, const uint32_t* words, uint32_t* q_weight, cudaStream_t stream);

// layout/reconstruct.cu: the exact weight [K, out_features] half, input channels in their original order.
int reconstruct(const Linear& linear, uint16_t* weight, cudaStream_t stream);

// Blocks of a matrix kernel that share a multiprocessor. A lane has 32 sums for 8 rows, 64 for 16 and 128 for 64, and
// two blocks of gemm.cu fill the 100 KiB of shared memory that the smallest multiprocessor has (sm_86).
__host__ __device__ constexpr int blocks_together(int tile_rows) { return tile_rows == 8 ? 3 : 2; }

// gemv.cu: 8 or 16 rows a tile. gated: gate and up at once.
struct Grid {
  int column_tiles, row_tiles, splits;
};
int gemv(const Matmul& args, int tile_rows, bool gated, Grid grid, cudaStream_t stream);
int64_t gemv_partial_floats(int tile_rows, bool gated, Grid grid);

// gemm.cu: 64 rows a tile.
constexpr int kGemmRows = 64;
int gemm(const Matmul& args, bool gated, Grid grid, cudaStream_t stream);
int64_t gemm_partial_floats(bool gated, Grid grid);
int gemm_groups(bool gated, Grid grid);

// prepare.cu: activations in packed order and in halves, one permutation a matrix.
struct Prepare {
  const void* x;  // [source rows, k]
  int dtype;
  int64_t k;
  int units, parts;
  Linear only;          // without experts
  const Linear* first;  // with experts: their linears; second for two matrices at once, else null
  const Linear* second;
  const int32_t* tile_expert;
  const int32_t* row_slot;  // [tokens in row order]: routing slot, -1 for none; null without experts
  int slots_a_source;       // a row reads source row slot / slots_a_source; 0: the row's own
  int tile_tokens;          // tokens of a row tile
  int64_t row_capacity;
  int tokens;        // tokens in row order
  uint16_t* packed;  // [matrices, units, row_capacity, 32]
  float* row_scale;  // [tokens]
  int32_t* tickets;  // zeroed here for the product that follows
  int ticket_count;
};
int prepare(const Prepare& args, cudaStream_t stream);

// moe.cu: rows sorted by expert; and the weighted sum of what the experts made of them.
struct Route {
  const int64_t* top_k_index;  // [slots]; outside [0, experts): no expert
  int slots, experts;
  int tile_tokens, parts;
  int row_tiles;         // capacity: enough for any routing
  int32_t* tile_expert;  // out [row_tiles]
  int32_t* tile_rows;    // out [row_tiles]
  int32_t* row_slot;     // out [row_tiles * tile_tokens]
  int32_t* slot_row;     // out [slots], -1 for no expert
};
int route(const Route& args, cudaStream_t stream);

struct Combine {
  const float* outputs;        // [rows, hidden]
  const int32_t* slot_row;     // [tokens * active]
  const float* top_k_weights;  // [tokens * active]
  int64_t tokens, active, hidden;
  int dtype;
  void* y;  // [tokens, hidden]
};
int combine(const Combine& args, cudaStream_t stream);

}  // namespace dbrxq
