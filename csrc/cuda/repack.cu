// File layout to device layout (common/layout.h, tile_layout.h have the pictures), once when a linear is loaded.
//
// A block owns one unit of one column tile: 128 threads, thread 32 s + lane makes the words of subtile s of its lane, in
// the place of the same word rows. Columns beyond N and rows beyond K get the code that stands for 0.
#include "kernels.cuh"

namespace dbrxq {
namespace {

constexpr int kThreads = 32 * tile::kSubtiles;

struct Repack {
  const uint32_t* q_weight;  // device [R, N]
  Linear linear;
};

__global__ void __launch_bounds__(kThreads) repack_kernel(Repack args) {
  const Linear& linear = args.linear;
  const int unit = blockIdx.y, column_tile = blockIdx.x;
  const int lane = threadIdx.x % 32, s = threadIdx.x / 32;
  const Place place = locate(linear.first_unit, unit);
  const int bits = place.bits;
  const int64_t left = linear.k - static_cast<int64_t>(unit) * layout::kUnitRows;
  const int rows = left < layout::kUnitRows ? static_cast<int>(left) : layout::kUnitRows;

  uint32_t words[8] = {};
  for (int c = 0; c < tile::kSubtileColumns; ++c) {
    const int64_t column = static_cast<int64_t>(column_tile) * tile::kColumns + tile::kLaneColumns * (lane / 4) +
                           tile::kSubtileColumns * s + c;
    for (int r = 0; r < tile::kLaneRows; ++r) {
      const int row = tile::kLaneRows * (lane % 4) + r;
      uint32_t code = layout::zero_point(bits);
      if (column < linear.n && row < rows) {
        const uint32_t* from = args.q_weight + (place.word + layout::code_word(bits, row)) * linear.n + column;
        code = layout::extract_code(bits, row, *from, layout::code_straddles(bits, row) ? from[linear.n] : 0u);
      }
      const int pair = tile::kLaneRows / 2 * c + r / 2;
      for (int i = 0; i < tile::piece_count(bits, pair); ++i) {
        const tile::Piece part = tile::piece(bits, pair, i);
        words[part.word] |= (code >> part.at & layout::code_mask(part.count)) << (part.shift + r % 2 * 16);
      }
    }
  }
  const int64_t columns = padded_columns(linear.n);
  uint32_t* to = static_cast<uint32_t*>(const_cast<void*>(linear.words)) + place.word * columns +
                 static_cast<int64_t>(column_tile) * tile::kColumns + lane * tile::kSubtiles + s;
  for (int i = 0; i < bits; ++i) to[i * columns] = words[i];
}

}  // namespace

int repack(const uint32_t* q_weight, const Linear& linear, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(column_tiles(linear.n)), static_cast<unsigned>(linear.units));
  return launch(repack_kernel, blocks, kThreads, stream, Repack{q_weight, linear});
}

}  // namespace dbrxq
