// File layout to device layout and back (common/layout.h, tile_layout.h have the pictures), when a linear is loaded or
// its file's tensors are asked for. Oracle: tests/runtime/kernels/test_cuda_layout.py, and every product of the other tests.
#include "kernels.cuh"

namespace dbrxq {
namespace {

constexpr int kThreads = 128;  // to the device: 4 subtiles of 32 lanes; to the file: 128 columns
static_assert(kThreads == 32 * tile::kSubtiles && kThreads == tile::kColumns, "a thread each");

struct Repack {
  const uint32_t* from;  // device [word rows, N], in the one layout
  uint32_t* to;          // device [word rows, N], in the other
  Linear linear;
};

// Rows of a unit that the file has: 16 in a tail, else 32.
__device__ __forceinline__ int rows_of(const Linear& linear, int unit) {
  const int64_t left = linear.k - static_cast<int64_t>(unit) * layout::kUnitRows;
  return left < layout::kUnitRows ? static_cast<int>(left) : layout::kUnitRows;
}

// A block owns one unit of one column tile; thread 32 s + lane makes the words of subtile s of its lane. Rows beyond K
// get the code that stands for 0.
__global__ void __launch_bounds__(kThreads) repack_kernel(Repack args) {
  const Linear& linear = args.linear;
  const int unit = blockIdx.y, column_tile = blockIdx.x;
  const int lane = threadIdx.x % 32, s = threadIdx.x / 32;
  if (lane >= lanes_in_tile(linear.n, column_tile)) return;
  const Place place = locate(linear.first_unit, unit);
  const int bits = place.bits, rows = rows_of(linear, unit);

  uint32_t words[8] = {};
  for (int c = 0; c < tile::kSubtileColumns; ++c) {
    const int64_t column = static_cast<int64_t>(column_tile) * tile::kColumns + tile::kLaneColumns * (lane / 4) +
                           tile::kSubtileColumns * s + c;
    for (int r = 0; r < tile::kLaneRows; ++r) {
      const int row = tile::kLaneRows * (lane % 4) + r;
      uint32_t code = layout::zero_point(bits);
      if (row < rows) {
        const uint32_t* from = args.from + (place.word + layout::code_word(bits, row)) * linear.n + column;
        code = layout::extract_code(bits, row, *from, layout::code_straddles(bits, row) ? from[linear.n] : 0u);
      }
      const int pair = tile::kLaneRows / 2 * c + r / 2;
      for (int i = 0; i < tile::piece_count(bits, pair); ++i) {
        const tile::Piece part = tile::piece(bits, pair, i);
        words[part.word] |= (code >> part.at & layout::code_mask(part.count)) << (part.shift + r % 2 * 16);
      }
    }
  }
  uint32_t* to = args.to + place.word * linear.n + static_cast<int64_t>(column_tile) * tile::kColumns +
                 lane * tile::kSubtiles + s;
  for (int i = 0; i < bits; ++i) to[i * linear.n] = words[i];
}

// A block owns one unit of one column tile, a thread a column, whose bits it writes one row after the other.
__global__ void __launch_bounds__(kThreads) unpack_kernel(Repack args) {
  const Linear& linear = args.linear;
  const int unit = blockIdx.y, c = threadIdx.x;
  const int64_t tile_column = static_cast<int64_t>(blockIdx.x) * tile::kColumns;
  if (tile_column + c >= linear.n) return;
  const Place place = locate(linear.first_unit, unit);
  const int bits = place.bits, rows = rows_of(linear, unit);
  const int g = c / tile::kLaneColumns, s = c % tile::kLaneColumns / tile::kSubtileColumns;

  uint64_t stream = 0;  // the bits of the column that do not fill a word yet
  int filled = 0;
  uint32_t* to = args.to + place.word * linear.n + tile_column + c;
  for (int row = 0; row < rows; ++row) {
    const int lane = 4 * g + row / tile::kLaneRows, r = row % tile::kLaneRows;
    const int pair = tile::kLaneRows / 2 * (c % tile::kSubtileColumns) + r / 2;
    const uint32_t* from = args.from + place.word * linear.n + tile_column + lane * tile::kSubtiles + s;
    uint32_t code = 0;
    for (int i = 0; i < tile::piece_count(bits, pair); ++i) {
      const tile::Piece part = tile::piece(bits, pair, i);
      code |= (from[part.word * linear.n] >> (part.shift + r % 2 * 16) & layout::code_mask(part.count)) << part.at;
    }
    stream |= static_cast<uint64_t>(code) << filled;
    filled += bits;
    if (filled < 32) continue;
    *to = static_cast<uint32_t>(stream);
    to += linear.n;
    stream >>= 32;
    filled -= 32;
  }
}

dim3 tiles_of(const Linear& linear) {
  return dim3(static_cast<unsigned>(column_tiles(linear.n)), static_cast<unsigned>(linear.units));
}

}  // namespace

int repack(const Linear& linear, const uint32_t* q_weight, uint32_t* words, cudaStream_t stream) {
  return launch(repack_kernel, tiles_of(linear), kThreads, stream, Repack{q_weight, words, linear});
}

int unpack(const Linear& linear, const uint32_t* words, uint32_t* q_weight, cudaStream_t stream) {
  return launch(unpack_kernel, tiles_of(linear), kThreads, stream, Repack{words, q_weight, linear});
}

}  // namespace dbrxq
