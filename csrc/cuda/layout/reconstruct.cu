// The exact half weights of a linear, bit for bit, from the device layout, by the decoder of the products (decode.cuh).
//
// A warp owns one tile. It decodes into shared memory [32 rows, 128 columns], then writes each row where its input
// channel belongs, 64 bytes at a time. Oracle: tests/helpers/oracles_ops.py, and the golden files.
#include "kernels.cuh"

namespace dbrxq {
namespace {

struct Reconstruct {
  Linear linear;
  uint16_t* weight;  // device [K, out_features]
};

using Panel = uint16_t[layout::kUnitRows][tile::kColumns];

template <int Bits>
__device__ void decode_tile(const uint4* from, int64_t stride, const Scales& scales, Panel& panel) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  uint4 words[Bits];
#pragma unroll
  for (int i = 0; i < Bits; ++i) words[i] = from[i * stride];
#pragma unroll
  for (int s = 0; s < tile::kSubtiles; ++s) {
    uint32_t own[Bits];
#pragma unroll
    for (int i = 0; i < Bits; ++i) own[i] = component(words[i], s);
#pragma unroll
    for (int pair = 0; pair < tile::kPairs; ++pair) {
      const int c = pair / (tile::kLaneRows / 2), row = tile::kLaneRows * q + pair % (tile::kLaneRows / 2) * 2;
      const Half2 weights = mul2(signed_codes<Bits>(own, pair), scales.column(s, c));
      const int column = tile::kLaneColumns * g + tile::kSubtileColumns * s + c;
      panel[row][column] = static_cast<uint16_t>(weights & 0xffffu);
      panel[row + 1][column] = static_cast<uint16_t>(weights >> 16);
    }
  }
}

__global__ void __launch_bounds__(32) reconstruct_kernel(Reconstruct args) {
  struct Shared {
    Panel panel;
  };
  DBRXQ_SHARED(Shared, shared);
  const Linear& linear = args.linear;
  const int unit = blockIdx.y, column_tile = blockIdx.x, lane = threadIdx.x;
  const int64_t columns = linear.n;
  const int reads = reading_lane(lane, lanes_in_tile(columns, column_tile));
  const Place place = locate(linear.first_unit, unit);
  const uint32_t scale = static_cast<const uint32_t*>(linear.unit_scale)[unit];
  const uint2 codes =
      static_cast<const uint2*>(linear.scale_codes)[(scale & 0xffffu) * (columns / 16) + column_tile * 8 + reads / 4];
  const Scales scales = decode_scales(codes, scale >> 16);
  const uint4* from = static_cast<const uint4*>(linear.words) + place.word * (columns / 4) + column_tile * 32 + reads;
  switch (place.bits) {
    case 8: decode_tile<8>(from, columns / 4, scales, shared.panel); break;
    case 6: decode_tile<6>(from, columns / 4, scales, shared.panel); break;
    case 5: decode_tile<5>(from, columns / 4, scales, shared.panel); break;
    case 4: decode_tile<4>(from, columns / 4, scales, shared.panel); break;
    case 3: decode_tile<3>(from, columns / 4, scales, shared.panel); break;
    default: decode_tile<2>(from, columns / 4, scales, shared.panel);
  }
  __syncthreads();
  for (int row = 0; row < layout::kUnitRows; ++row) {
    const int channel = static_cast<const int32_t*>(linear.permutation)[unit * layout::kUnitRows + row];
    if (channel < 0) continue;
    for (int c = lane; c < tile::kColumns; c += 32) {
      const int64_t column = static_cast<int64_t>(column_tile) * tile::kColumns + c;
      if (column < linear.out_features) args.weight[channel * linear.out_features + column] = shared.panel[row][c];
    }
  }
}

}  // namespace

int reconstruct(const Linear& linear, uint16_t* weight, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(column_tiles(linear.n)), static_cast<unsigned>(linear.units));
  return launch(reconstruct_kernel, blocks, 32, stream, Reconstruct{linear, weight});
}

}  // namespace dbrxq
