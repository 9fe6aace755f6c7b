// What the two matrix kernels share: their arguments, and how a block turns its sums into results.
//
// Axes: rows are *virtual* tokens. fp16 and bf16 activations take one row a token, fp32 ones two (prepare.cu): the sum
// of a token is  row_scale * (sum of row 0 + 2^-11 * sum of row 1). A *row tile* is the rows of one block; with experts
// it belongs to one of them (moe.cu), else row tiles count up through all rows.
#pragma once
#include "activation.cuh"
#include "decode.cuh"
#include "linear.cuh"

namespace dbrxq {

struct Matmul {
  Linear only;                 // the linear, where there are no experts
  const Linear* first;         // device [E]: gate, or the one matrix
  const Linear* second;        // device [E]: up, for gated kernels
  const int32_t* tile_expert;  // device [row tiles]: expert of each, -1 for none; null without experts
  const int32_t* tile_rows;    // device [row tiles]: rows in use of each; null without experts
  const uint16_t* x;           // device half [matrices, units, row_capacity, 32], packed order; 16-byte aligned
  const float* row_scale;      // device [tokens in row order]
  int x_stride;                // 16-byte vectors from unit to unit: 4 row_capacity; whole row tiles
  int rows;                    // rows in use, without experts
  int parts;                   // rows a token, 1 or 2
  int splits;                  // blocks that share the input channels of one result
  int activation;
  int dtype;         // of y
  float* partial;    // device [groups, splits, panels, group rows, 128], used when splits > 1
  int32_t* tickets;  // device [groups], zero before the launch
  void* y;           // device [tokens in row order, width]
  int64_t width;     // columns of y
};

// The expert (0 without experts) and the rows in use of a row tile; false for one without work.
__device__ __forceinline__ bool find_tile(const Matmul& args, int row_tile, int tile_rows, int& expert, int& rows) {
  expert = args.tile_expert ? args.tile_expert[row_tile] : 0;
  if (expert < 0) return false;
  const int left = args.tile_expert ? args.tile_rows[row_tile] : args.rows - row_tile * tile_rows;
  rows = left < tile_rows ? left : tile_rows;
  return true;
}

// Matrix 0 or 1 of an expert.
__device__ __forceinline__ Linear linear_of(const Matmul& args, int expert, int matrix) {
  if (!args.tile_expert) return args.only;
  return (matrix ? args.second : args.first)[expert];
}

// Floats from row to row of a panel in shared memory: four more than columns, so that the rows that a store meets lie on
// banks of their own.
constexpr int kPanelStride = tile::kColumns + 4;

// Sums of one warp into a panel [rows, kPanelStride] in shared memory.
template <int TokenTiles>
__device__ __forceinline__ void store_panel(const Sums<TokenTiles>& sums, float* panel) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int s = 0; s < tile::kSubtiles; ++s)
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          panel[(8 * n + 2 * q + i % 2) * kPanelStride + tile::kLaneColumns * g + tile::kSubtileColumns * s + 2 * t +
                i / 2] = sums[s][t][n][i];
}

// Which piece of y some panels are.
struct Output {
  int group;  // number of the piece, the same in all its splits
  int split;
  int column;  // first column of panel 0
  int row;     // first row
  int rows;    // how many are in use
};

// Turns Panels panels [Rows, kPanelStride], which all threads of the block have written to `sums` before a barrier, into y.
// With splits, the last block of the group to come adds all parts, rows in use alone, in the order of the splits: the
// same bits whoever is last (`last` is a shared flag). Gated: panel 0 is the gate, panel 1 the up-projection of the same columns; else they
// lie side by side.
template <int Panels, int Rows, bool Gated>
__device__ void write_output(const Matmul& args, const Output& output, float* sums, int& last) {
  const int group = output.group, column = output.column, first = output.row / args.parts;
  constexpr int size = Panels * Rows * tile::kColumns;
  const int threads = blockDim.x, used = output.rows * tile::kColumns;  // of a panel
  // Place i of the rows in use: in shared memory, and in the parts of other blocks.
  const auto at = [&](int panel, int i) {
    return (panel * Rows + i / tile::kColumns) * kPanelStride + i % tile::kColumns;
  };
  if (args.splits > 1) {
    float* parts = args.partial + static_cast<int64_t>(group) * args.splits * size;
    for (int p = 0; p < Panels; ++p)
      for (int i = threadIdx.x; i < used; i += threads)
        parts[(static_cast<int64_t>(output.split) * Panels + p) * Rows * tile::kColumns + i] = sums[at(p, i)];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(args.tickets + group, 1) == args.splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int p = 0; p < Panels; ++p)
      for (int i = threadIdx.x; i < used; i += threads) {
        const float* from = parts + p * Rows * tile::kColumns + i;
        float sum = 0.0f;
#pragma unroll 4
        for (int split = 0; split < args.splits; ++split)
          sum += load_shared_result(from + static_cast<int64_t>(split) * size);
        sums[at(p, i)] = sum;
      }
    __syncthreads();
  }
  const int tokens = output.rows / args.parts;
  const auto total = [&](int panel, int token, int c) {
    const float* from = sums + (panel * Rows + token * args.parts) * kPanelStride + c;
    const float sum = args.parts == 2 ? *from + kSecondPart * from[kPanelStride] : *from;
    return sum * args.row_scale[first + token];
  };
  constexpr int wide = Gated ? tile::kColumns : Panels * tile::kColumns;
  for (int i = threadIdx.x; i < tokens * wide; i += threads) {
    const int token = i / wide, c = i % wide;
    if (column + c >= args.width) continue;
    float value = total(Gated ? 0 : c / tile::kColumns, token, c % tile::kColumns);
    if (Gated) value = activate(value, args.activation) * total(1, token, c);
    if (args.only.bias && !args.tile_expert)
      value += from_half(static_cast<const uint16_t*>(args.only.bias)[column + c]);
    store(args.y, (first + token) * args.width + column + c, args.dtype, value);
  }
}

}  // namespace dbrxq
