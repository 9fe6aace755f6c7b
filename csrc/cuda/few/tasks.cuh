// What the three launches of few.cuh differ in: how their work is listed, which rows meet a piece, where sums go. Each
// function has an overload for each; few.cu calls them in this order.
#pragma once
#include "router.cuh"
#include "rows.cuh"
#include "work.cuh"

namespace dbrxq {

constexpr int kBoxStride = tile::kColumns + 4;  // floats of a row in a warp's box: rows on banks of their own
static_assert(tile::kColumns == kFewThreads, "a thread has one column of a panel");

// What the block of a kernel shares.
template <int Panels>
struct FewShared {
  union alignas(16) {
    Staged warps[kFewWarps];
    float box[kFewWarps][kFewRows * kBoxStride];
  };
  float panels[Panels][kFewRows][tile::kColumns];  // thread c has column c to itself
  Linear linear;                                   // of the piece
  int tokens_in_use;                               // of the piece
  Row rows[kFewRows];                              // of the piece
  Row tokens[kFewRows];
  float sums[kFewWarps];
  int last;
  Group group;
  Work work;
};

// ---- What there is to do ----------------------------------------------------------------------------------------

template <class Task>
constexpr int kPanels = 1;
template <>
constexpr int kPanels<FewGateUp> = 2;

__device__ __forceinline__ int tiles_of(int64_t columns) { return static_cast<int>(column_tiles(columns)); }

// Lists pieces and items; ends with a barrier.
__device__ inline void list_work(const FewLinears& args, Work& work) {
  if (threadIdx.x == 0) {
    int64_t start = 0;
#pragma unroll
    for (int i = 0; i < kFewLinears; ++i) {
      if (i >= args.count) break;
      const int words = word_rows(args.linears[i].first_unit), tiles = tiles_of(args.linears[i].n);
      work.pieces[i] = {i, words, 0, 0, static_cast<int16_t>(args.input.tokens)};
      work.items[i] = {start, words, tiles, i, 1};
      start += static_cast<int64_t>(words) * tiles;
    }
    work.total = start;
    work.item_count = args.count;
  }
  __syncthreads();
}

__device__ inline void list_work(const FewGateUp& args, Work& work) {
  sort_slots(args.routing, kFewRows / args.input.parts, args.router.weight != nullptr, work);
  const int count = work.piece_count, i = threadIdx.x;
  const Piece run = i < count ? work.pieces[i] : Piece{};
  __syncthreads();
  if (i < count) {
    const int gate = word_rows(args.gate[run.linear].first_unit), up = word_rows(args.up[run.linear].first_unit);
    work.pieces[2 * i] = {run.linear, gate, 0, run.first, run.rows};
    work.pieces[2 * i + 1] = {run.linear, up, gate, run.first, run.rows};
    work.items[i] = {0, gate + up, tiles_of(args.ffn), 2 * i, 2};
  }
  __syncthreads();
  if (i == 0) {
    int64_t start = 0;
    for (int j = 0; j < count; ++j) {
      work.items[j].start = start;
      start += static_cast<int64_t>(work.items[j].words) * work.items[j].tiles;
    }
    work.total = start;
    work.item_count = count;
    if (count == 0) work.items[0].tiles = 0;
  }
  __syncthreads();
}

__device__ inline void list_work(const FewDown& args, Work& work) {
  sort_slots(args.routing, kFewRows / args.parts, false, work);
  const int count = work.piece_count, i = threadIdx.x;
  if (i < count) work.pieces[i].words = word_rows(args.down[work.pieces[i].linear].first_unit);
  __syncthreads();
  if (i == 0) {
    int offset = 0;
    for (int j = 0; j < count; ++j) {
      work.pieces[j].offset = offset;
      offset += work.pieces[j].words;
    }
    work.items[0] = {0, offset, tiles_of(args.hidden), 0, count};
    work.total = static_cast<int64_t>(offset) * tiles_of(args.hidden);
    work.item_count = 1;
  }
  __syncthreads();
}

// Matrix `panel` of a piece.
__device__ __forceinline__ void copy_linear(const FewLinears& args, int which, int, Linear& to) {
#pragma unroll
  for (int i = 0; i < kFewLinears; ++i)
    if (i == which) to = args.linears[i];
}
__device__ __forceinline__ void copy_linear(const FewGateUp& args, int which, int panel, Linear& to) {
  to = (panel ? args.up : args.gate)[which];
}
__device__ __forceinline__ void copy_linear(const FewDown& args, int which, int, Linear& to) { to = args.down[which]; }

__device__ __forceinline__ FewInput input_of(const FewLinears& args) { return args.input; }
__device__ __forceinline__ FewInput input_of(const FewGateUp& args) { return args.input; }
__device__ __forceinline__ FewInput input_of(const FewDown& args) {
  return {args.inner, args.ffn,   args.routing.tokens * args.routing.active, DBRXQ_FLOAT32, args.parts, 0, nullptr, 0,
          0,          args.folded};
}

// What is the same for all pieces: the statistics of the tokens. All threads of the block.
template <class Task, class S>
__device__ void measure_tokens(const Task& args, S& shared) {
  for (int t = 0; t < args.input.tokens; ++t) {
    const Row row = measure(args.input, t, shared.sums);
    if (threadIdx.x == 0) shared.tokens[t] = row;
  }
  __syncthreads();
}
template <class S>
__device__ void measure_tokens(const FewDown&, S&) {}

// The experts, where there is a router to choose them. All threads of the block, which has measured the tokens.
template <class Task, class S>
__device__ __forceinline__ void choose_experts(const Task&, S&) {}
template <class S>
__device__ void choose_experts(const FewGateUp& args, S& shared) {
  static_assert(sizeof(shared.box[0]) >= kMostExperts * sizeof(float), "a warp's chances fit in its box");
  if (args.router.weight)
    choose_all(args.router, args.routing, args.input.k, shared.tokens, shared.box[threadIdx.x / 32],
               shared.work.expert);
}

// The rows of a piece. All threads of the block; the caller brings the barrier.
template <class S>
__device__ void set_rows(const FewLinears&, const Piece& piece, S& shared) {
  const int r = threadIdx.x;
  if (r < piece.rows) shared.rows[r] = shared.tokens[r];
}
template <class S>
__device__ void set_rows(const FewGateUp& args, const Piece& piece, S& shared) {
  const int r = threadIdx.x;
  if (r < piece.rows) shared.rows[r] = shared.tokens[shared.work.sorted[piece.first + r] / args.routing.active];
}
template <class S>
__device__ void set_rows(const FewDown& args, const Piece& piece, S& shared) {
  const int tiles = tiles_of(args.ffn), lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < piece.rows; r += kFewWarps) {
    const int64_t slot = shared.work.sorted[piece.first + r];
    float largest = 0.0f;
    for (int i = lane; i < tiles; i += 32) {
      const float magnitude = args.largest[slot * tiles + i];
      largest = magnitude > largest ? magnitude : largest;
    }
    largest = warp_maximum(largest);
    const int e = exponent_to_half_range(largest);
    if (lane == 0) shared.rows[r] = {slot * args.ffn, 0.0f, power_of_two(e), power_of_two(-e)};
  }
}

// ---- Sums into panels, panels into results ----------------------------------------------------------------------

// Rows of a panel in use.
__device__ __forceinline__ int panel_rows(const FewLinears& args, const Work&, const Item&) {
  return args.input.tokens;
}
__device__ __forceinline__ int panel_rows(const FewGateUp&, const Work& work, const Item& item) {
  return work.pieces[item.first_piece].rows;
}
__device__ __forceinline__ int panel_rows(const FewDown& args, const Work&, const Item&) { return args.routing.tokens; }

// The panel, the row of it and the factor of row r of a piece.
struct Target {
  int panel, row;
  float factor;
};
__device__ __forceinline__ Target target_of(const FewLinears&, const Work&, const Piece&, int, int r) {
  return {0, r, 1.0f};
}
__device__ __forceinline__ Target target_of(const FewGateUp&, const Work&, const Piece&, int index, int r) {
  return {index, r, 1.0f};
}
__device__ __forceinline__ Target target_of(const FewDown& args, const Work& work, const Piece& piece, int, int r) {
  const int slot = work.sorted[piece.first + r];
  const float* weights = args.routing.top_k_weights;
  return {0, slot / args.routing.active, weights ? weights[slot] : 1.0f};
}

__device__ __forceinline__ float store_result(const FewResult& result, int token, int64_t column, float value) {
  if (result.residual) value += load(result.residual, token * result.residual_stride + column, result.residual_dtype);
  store(result.y, token * result.stride + column, result.dtype, value);
  return value;
}

// The whole sums of a group into its result. All threads of the block.
template <class S>
__device__ void finish(const FewLinears& args, const Item& item, int tile, S& shared) {
  const int64_t column = static_cast<int64_t>(tile) * tile::kColumns + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kFewLinears; ++i) {
    if (i != item.first_piece || column >= args.linears[i].out_features) continue;
    const void* bias = args.linears[i].bias;
    const float add = bias ? from_half(static_cast<const uint16_t*>(bias)[column]) : 0.0f;
    for (int t = 0; t < args.input.tokens; ++t) {
      float& value = shared.panels[0][t][threadIdx.x];
      value = store_result(args.results[i], t, column, value + add);
    }
  }
  if (!args.router.weight) return;
  const int64_t columns = args.linears[0].out_features;
  if (column >= columns)
    for (int t = 0; t < args.input.tokens; ++t) shared.panels[0][t][threadIdx.x] = 0.0f;
  __syncthreads();
  leave_logits(args.router, columns, args.input.tokens, tile, shared.panels[0]);
  __syncthreads();
}
template <class S>
__device__ void finish(const FewGateUp& args, const Item& item, int tile, S& shared) {
  const Piece piece = shared.work.pieces[item.first_piece];
  const int64_t column = static_cast<int64_t>(tile) * tile::kColumns + threadIdx.x;
  for (int r = 0; r < piece.rows; ++r) {
    const int64_t slot = shared.work.sorted[piece.first + r];
    float value = 0.0f;
    if (column < args.ffn) {
      value = activate(shared.panels[0][r][threadIdx.x], args.activation) * shared.panels[1][r][threadIdx.x];
      args.inner[slot * args.ffn + column] = value;
    }
    const float largest = block_maximum(fabsf(value) > 0.0f ? fabsf(value) : 0.0f, shared.sums);
    if (threadIdx.x == 0) args.largest[slot * item.tiles + tile] = largest;
  }
}
template <class S>
__device__ void finish(const FewDown& args, const Item&, int tile, S& shared) {
  const int64_t column = static_cast<int64_t>(tile) * tile::kColumns + threadIdx.x;
  if (column >= args.hidden) return;
  for (int t = 0; t < args.routing.tokens; ++t) store_result(args.result, t, column, shared.panels[0][t][threadIdx.x]);
}

}  // namespace dbrxq
