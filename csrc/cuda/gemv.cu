// y = x W for up to 16 rows of x: the weights stream past once, at the memory's speed.
//
// A block owns a column tile (128 columns; gated: of gate and of up), a row tile, and a slice of the input channels.
// Its warps divide that slice by equal words, each adding up all 128 columns of its part on the tensor cores
// (decode.cuh); then a tree over the warps, in a fixed order, makes one sum. Grid: column tiles, row tiles, splits. The
// words of the next units are on their way into registers, depth() units ahead: 2 to 4 KiB a warp, and for 8 rows 24 to
// 48 KiB a multiprocessor, where bandwidth times latency asks for about 7 KiB (RTX 3090), 19 (H100) or 29 (H200).
// Aligned: words to 16 bytes, x to 16. Oracle: oracles_ops.py through test_cuda_products.py.
#include "kernels.cuh"

namespace dbrxq {
namespace {

// Of a block. Three blocks of four leave a thread 168 registers; blocks of eight, with 128 a thread, spilled.
constexpr int kWarps = 4;

// Where a lane reads: its places in a tile column.
template <int TokenTiles>
struct LanePointers {
  const Linear* linear;        // in shared memory
  const uint4* words;          // of word row 0
  int words_stride;            // uint4s from word row to word row, and four times the uint2s from group to group
  int codes;                   // of group 0, in uint2s from the linear's scale_codes
  const uint4* x[TokenTiles];  // of unit 0: row g of each 8, or the last in use, whose sum nobody reads
  int x_stride;                // uint4s from unit to unit
};

// What a unit needs beside its words. It comes from the L2 or, once a group, from memory: one unit ahead will do.
template <int TokenTiles>
struct UnitInputs {
  uint4 x[TokenTiles];
  uint2 codes;
  uint32_t scale;  // group and scale_max, as in unit_scale
};

template <int TokenTiles>
__device__ __forceinline__ void fetch(UnitInputs<TokenTiles>& inputs, const LanePointers<TokenTiles>& from, int unit) {
  inputs.scale = static_cast<const uint32_t*>(from.linear->unit_scale)[unit];
  const int group = static_cast<int>(inputs.scale & 0xffffu);
  inputs.codes = static_cast<const uint2*>(from.linear->scale_codes)[group * (from.words_stride / 4) + from.codes];
#pragma unroll
  for (int n = 0; n < TokenTiles; ++n) inputs.x[n] = from.x[n][static_cast<int64_t>(unit) * from.x_stride];
}

// Units [begin, end), all of width Bits, the first at word row `word`.
template <int Bits, int TokenTiles>
__device__ __forceinline__ void stream_units(const LanePointers<TokenTiles>& from, int begin, int end, int word,
                                             Sums<TokenTiles>& sums) {
  constexpr int kDepth = depth(Bits);
  UnitWords<Bits> words[kDepth];
  UnitInputs<TokenTiles> inputs;
  const int unit_words = Bits * from.words_stride;
  const uint4* next = from.words + static_cast<int64_t>(word) * from.words_stride;
#pragma unroll
  for (int i = 0; i < kDepth; ++i, next += unit_words)
    if (begin + i < end) fetch(words[i], next, from.words_stride);
  fetch(inputs, from, begin);
  Scales scales = {};
  uint32_t scale = ~0u;  // of no group: they are fewer than 65535
  for (int unit = begin; unit < end; unit += kDepth)
#pragma unroll
    for (int i = 0; i < kDepth; ++i, next += unit_words) {
      if (unit + i >= end) break;
      const UnitInputs<TokenTiles> own = inputs;
      if (unit + i + 1 < end) fetch(inputs, from, unit + i + 1);
      if (own.scale != scale) {
        scale = own.scale;
        scales = decode_scales(own.codes, scale >> 16);
      }
      multiply_unit<Bits, TokenTiles>(words[i].at, scales, own.x, sums);
      if (unit + i + kDepth < end) fetch(words[i], next, from.words_stride);
    }
}

template <int Index, int TokenTiles>
__device__ __forceinline__ void stream_widths(const LanePointers<TokenTiles>& from,
                                              const UnitRange (&ranges)[tile::kWidthCount], Sums<TokenTiles>& sums) {
  if constexpr (Index < tile::kWidthCount) {
    const UnitRange range = ranges[Index];
    if (range.begin < range.end) stream_units<tile::width(Index)>(from, range.begin, range.end, range.word, sums);
    stream_widths<Index + 1>(from, ranges, sums);
  }
}

// TokenTiles: 8-row tiles of x.  Matrices: 2 when gate and up are made together.
template <int TokenTiles, int Matrices>
__global__ void __launch_bounds__(32 * kWarps, blocks_together(8 * TokenTiles)) gemv_kernel(Matmul args) {
  constexpr int kRows = 8 * TokenTiles, kSlices = kWarps / Matrices;
  constexpr int kWarpFloats = kRows * tile::kColumns;
  struct Shared {
    float sums[kWarps / 2 * kRows * kPanelStride];  // the tree's; then [Matrices, kRows, kPanelStride]
    Linear linears[Matrices];
    UnitRange ranges[kWarps][tile::kWidthCount];
    int rows, last;
  };
  static_assert(Matrices <= kWarps / 2 && sizeof(Shared) <= 48 * 1024, "static shared memory");
  DBRXQ_SHARED(Shared, shared);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int matrix = warp / kSlices, slice = warp % kSlices;
  const int column_tile = blockIdx.x, row_tile = blockIdx.y, split = blockIdx.z;
  int expert, rows;
  if (!find_tile(args, row_tile, kRows, expert, rows)) return;
  if (threadIdx.x == 0) shared.rows = rows;
  if (threadIdx.x < Matrices) shared.linears[threadIdx.x] = linear_of(args, expert, threadIdx.x);
  __syncthreads();  // from here on in shared memory: registers are for the sums
  const Linear& linear = shared.linears[matrix];
  if (lane < tile::kWidthCount)
    shared.ranges[warp][lane] =
        range_of(linear.first_unit, slice_of(linear.first_unit, split * kSlices + slice, args.splits * kSlices), lane);
  __syncthreads();

  LanePointers<TokenTiles> from;
  const int reads = reading_lane(lane, lanes_in_tile(linear.n, column_tile));
  from.words_stride = static_cast<int>(linear.n / 4);
  from.words = static_cast<const uint4*>(linear.words) + column_tile * 32 + reads;
  from.codes = column_tile * 8 + reads / 4;
  from.linear = &linear;
  from.x_stride = args.x_stride;
  const uint4* x = reinterpret_cast<const uint4*>(args.x) + matrix * linear.units * args.x_stride +
                   static_cast<int64_t>(row_tile) * kRows * 4 + lane % 4;
#pragma unroll
  for (int n = 0; n < TokenTiles; ++n) {
    const int row = 8 * n + lane / 4;
    from.x[n] = x + (row < rows ? row : rows - 1) * 4;
  }

  Sums<TokenTiles> sums = {};
  stream_widths<0>(from, shared.ranges[warp], sums);

  // The tree: the upper half of the slices hands its sums to the lower half, until slice 0 has all.
  float* flat = &sums[0][0][0][0];
  constexpr int kValues = kWarpFloats / 32;
#pragma unroll
  for (int half = kSlices / 2; half >= 1; half /= 2) {
    float* box = shared.sums + (matrix * half + slice % half) * kWarpFloats + lane;
    if (slice >= half && slice < 2 * half)
#pragma unroll
      for (int i = 0; i < kValues; ++i) box[i * 32] = flat[i];
    __syncthreads();
    if (slice < half)
#pragma unroll
      for (int i = 0; i < kValues; ++i) flat[i] += box[i * 32];
    __syncthreads();
  }
  if (slice == 0) store_panel<TokenTiles>(sums, shared.sums + matrix * kRows * kPanelStride);
  __syncthreads();
  const int group = row_tile * static_cast<int>(gridDim.x) + column_tile;
  const Output output = {group, split, column_tile * tile::kColumns, row_tile * kRows, shared.rows};
  write_output<Matrices, kRows, Matrices == 2>(args, output, shared.sums, shared.last);
}

template <int TokenTiles>
int launch_gemv(const Matmul& args, bool gated, Grid grid, cudaStream_t stream) {
  const dim3 blocks(grid.column_tiles, grid.row_tiles, grid.splits);
  if (gated) return launch(gemv_kernel<TokenTiles, 2>, blocks, 32 * kWarps, stream, args);
  return launch(gemv_kernel<TokenTiles, 1>, blocks, 32 * kWarps, stream, args);
}

}  // namespace

int gemv(const Matmul& args, int tile_rows, bool gated, Grid grid, cudaStream_t stream) {
  if (tile_rows == 8) return launch_gemv<1>(args, gated, grid, stream);
  return launch_gemv<2>(args, gated, grid, stream);
}

int64_t gemv_partial_floats(int tile_rows, bool gated, Grid grid) {
  if (grid.splits == 1) return 0;
  return static_cast<int64_t>(grid.column_tiles) * grid.row_tiles * grid.splits * (gated ? 2 : 1) * tile_rows *
         tile::kColumns;
}

}  // namespace dbrxq
