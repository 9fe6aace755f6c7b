// y = x W for many rows of x: 64 rows a block, weights decoded in registers, everything through a pipeline of copies.
//
//                    panel 0: 128 columns   panel 1: 128 columns     gated: panel 0 is the gate, panel 1 the
//     rows  0..31    warp 0                 warp 1                   up-projection of the same columns;
//     rows 32..63    warp 2                 warp 3                   else two column tiles side by side
//
// One stage of the pipeline is one unit (32 input channels): the panels' words as they lie in memory, and 64 bytes of
// each row of x, whose fragments a quarter warp reads from 128 consecutive bytes, so without bank conflicts. kStages
// units are under way. Grid: pairs of column tiles (gated: column tiles), row tiles, splits of the input channels.
// Oracle: tests/helpers/oracles_ops.py through tests/runtime/kernels/test_cuda_products.py.
#include "kernels.cuh"

namespace dbrxq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // as drawn: two panels by two halves of the rows
constexpr int kTokenTiles = 4;                     // rows of a warp in eights: 128 sums a lane, half of its registers
constexpr int kWarpRows = 8 * kTokenTiles;
constexpr int kStages = 3;       // as many gated stages of 16 KiB as fit in the 48 KiB of static shared memory
constexpr int kUnitVectors = 4;  // 16-byte vectors of a row in a unit
static_assert(2 * kWarpRows == kGemmRows, "two halves");

template <int Matrices>
struct Stage {
  uint4 words[2][8 * 32];  // of each panel, as many as its width needs: 8 word rows at most
  uint4 x[Matrices][kGemmRows * kUnitVectors];
};

template <int Bits>
__device__ __forceinline__ void multiply_stage(const uint4* words, const Scales& scales, const uint4 (&x)[kTokenTiles],
                                               Sums<kTokenTiles>& sums) {
  uint4 own[Bits];
#pragma unroll
  for (int i = 0; i < Bits; ++i) own[i] = words[i * 32];
  multiply_unit<Bits, kTokenTiles>(own, scales, x, sums);
}

// The scales of a lane's columns under way.
struct PackedScales {
  uint2 codes;
  uint32_t scale;  // group and scale_max, as in unit_scale
};

template <int Matrices>
__global__ void __launch_bounds__(kThreads, blocks_together(kGemmRows)) gemm_kernel(Matmul args) {
  struct Shared {
    union {
      Stage<Matrices> stages[kStages];
      struct {
        float sums[2 * kWarpRows * kPanelStride];  // [panels, 32 rows, kPanelStride]
        int last;
      };
    };
  };
  static_assert(sizeof(Shared) <= 48 * 1024, "static shared memory");
  DBRXQ_SHARED(Shared, shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, panel = warp % 2, half = warp / 2;
  const int row_tile = blockIdx.y, split = blockIdx.z;
  const int first_tile = Matrices == 2 ? blockIdx.x : 2 * blockIdx.x;
  int expert, rows;
  if (!find_tile(args, row_tile, kGemmRows, expert, rows)) return;
  Linear linears[Matrices];
#pragma unroll
  for (int m = 0; m < Matrices; ++m) linears[m] = linear_of(args, expert, m);
  const Linear own = linear_of(args, expert, Matrices == 2 ? panel : 0);

  const int64_t columns = linears[0].n;  // of both matrices
  const int tiles = static_cast<int>(column_tiles(columns));
  const auto tile_of = [&](int p) { return Matrices == 2 ? first_tile : first_tile + p; };
  const bool works = tile_of(panel) < tiles;

  // Gate and up may differ in their widths: units are split evenly, the same for both.
  const int units = static_cast<int>(linears[0].units);
  const int begin = static_cast<int>(static_cast<int64_t>(units) * split / args.splits);
  const int end = static_cast<int>(static_cast<int64_t>(units) * (split + 1) / args.splits);

  const auto fetch = [&](Stage<Matrices>& stage, int unit) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (tile_of(p) >= tiles) continue;
      const Linear& linear = linears[Matrices == 2 ? p : 0];
      const Place place = locate(linear.first_unit, unit);
      const uint4* from = static_cast<const uint4*>(linear.words) + place.word * (columns / 4) + tile_of(p) * 32;
      const int lanes = lanes_in_tile(columns, tile_of(p));  // of the others' words nobody reads the sums
      for (int i = threadIdx.x; i < place.bits * 32; i += kThreads)
        if (i % 32 < lanes) copy_async(&stage.words[p][i], from + i / 32 * (columns / 4) + i % 32);
    }
#pragma unroll
    for (int m = 0; m < Matrices; ++m) {
      const uint4* from = reinterpret_cast<const uint4*>(args.x) +
                          (static_cast<int64_t>(m) * units + unit) * args.x_stride +
                          row_tile * kGemmRows * kUnitVectors;
      for (int i = threadIdx.x; i < rows * kUnitVectors; i += kThreads) copy_async(&stage.x[m][i], from + i);
    }
  };
  const auto fetch_scales = [&](int unit) {
    const uint32_t scale = static_cast<const uint32_t*>(own.unit_scale)[unit];
    const uint2* codes = static_cast<const uint2*>(own.scale_codes) + (scale & 0xffffu) * (columns / 16) +
                         tile_of(panel) * 8 + reading_lane(lane, lanes_in_tile(columns, tile_of(panel))) / 4;
    return PackedScales{*codes, scale};
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) fetch(shared.stages[i], begin + i);
    close_copy_group();
  }
  Sums<kTokenTiles> sums = {};
  Scales scales = {};
  PackedScales ahead = {};
  if (works && begin < end) ahead = fetch_scales(begin);
  uint32_t scale = ~0u;  // of no group: they are fewer than 65535
  for (int unit = begin, slot = 0; unit < end; ++unit, slot = slot + 1 == kStages ? 0 : slot + 1) {
    copies_done<kStages - 2>();
    __syncthreads();  // this unit has arrived for all, and nobody reads the stage that is filled next
    if (unit + kStages - 1 < end) fetch(shared.stages[(slot + kStages - 1) % kStages], unit + kStages - 1);
    close_copy_group();
    if (!works) continue;
    if (ahead.scale != scale) {
      scale = ahead.scale;
      scales = decode_scales(ahead.codes, scale >> 16);
    }
    if (unit + 1 < end) ahead = fetch_scales(unit + 1);
    const Stage<Matrices>& stage = shared.stages[slot];
    uint4 x[kTokenTiles];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
      x[n] = stage.x[Matrices == 2 ? panel : 0][half * kWarpRows * kUnitVectors + n * 32 + lane];
    const uint4* words = stage.words[panel] + lane;
    switch (locate(own.first_unit, unit).bits) {
      case 8: multiply_stage<8>(words, scales, x, sums); break;
      case 6: multiply_stage<6>(words, scales, x, sums); break;
      case 5: multiply_stage<5>(words, scales, x, sums); break;
      case 4: multiply_stage<4>(words, scales, x, sums); break;
      case 3: multiply_stage<3>(words, scales, x, sums); break;
      default: multiply_stage<2>(words, scales, x, sums);
    }
  }
  copies_done<0>();

  // Both halves of the rows in turn.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    __syncthreads();
    if (half == h) store_panel<kTokenTiles>(sums, shared.sums + panel * kWarpRows * kPanelStride);
    __syncthreads();
    const int left = rows - h * kWarpRows;
    if (left <= 0) continue;
    const int group = (row_tile * 2 + h) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    const Output output = {group, split, first_tile * tile::kColumns, row_tile * kGemmRows + h * kWarpRows,
                           left < kWarpRows ? left : kWarpRows};
    write_output<2, kWarpRows, Matrices == 2>(args, output, shared.sums, shared.last);
  }
}

}  // namespace

int gemm(const Matmul& args, bool gated, Grid grid, cudaStream_t stream) {
  const dim3 blocks(gated ? grid.column_tiles : (grid.column_tiles + 1) / 2, grid.row_tiles, grid.splits);
  if (gated) return launch(gemm_kernel<2>, blocks, kThreads, stream, args);
  return launch(gemm_kernel<1>, blocks, kThreads, stream, args);
}

int gemm_groups(bool gated, Grid grid) {
  return (gated ? grid.column_tiles : (grid.column_tiles + 1) / 2) * grid.row_tiles * 2;
}

int64_t gemm_partial_floats(bool gated, Grid grid) {
  if (grid.splits == 1) return 0;
  return static_cast<int64_t>(gemm_groups(gated, grid)) * grid.splits * 2 * kWarpRows * tile::kColumns;
}

}  // namespace dbrxq
