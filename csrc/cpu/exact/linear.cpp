// y = x . W + bias for one linear: pack the activations, hand out bands of columns. A column's sum is made by one
// task in one order, so the number of threads changes nothing.
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace dbrxq {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return kAvx512Kernels;
  if (isa() == Isa::avx2) return kAvx2Kernels;
#endif
  return kScalarKernels;
}

int64_t band_columns(int64_t tokens, int64_t columns, int64_t linears) {
  if (tokens > kStreamTokens) return kPanelColumns;
  // Wide bands read long stretches of each word row; a few for every thread even the load out.
  constexpr int64_t unit = 64, widest = 512;
  const int64_t wanted = columns * linears / (4 * threads()) / unit * unit;
  return std::clamp(wanted, unit, widest);
}

void add_bias(const LinearView& view, int64_t first, int64_t last, int64_t tokens, float* sums, int64_t stride) {
  if (!view.bias) return;
  for (int64_t c = first; c < last; ++c) {
    uint16_t half;
    std::memcpy(&half, view.bias + 2 * c, sizeof half);
    const float bias = half_to_float(half);
    for (int64_t t = 0; t < tokens; ++t) sums[t * stride + c - first] += bias;
  }
}

namespace {

constexpr int64_t kTokenBlock = 1024;  // bounds the packed copy of the activations

void forward_block(const LinearView& view, const float* x, int64_t tokens, float* y, Buffer<float>& packed) {
  float* tiles = packed.reserve(packed_floats(tokens, view.k));
  parallel_for((tokens + kTileTokens - 1) / kTileTokens, [&](int64_t tile) {
    const float* rows[kTileTokens] = {};
    const int64_t token = tile * kTileTokens, left = tokens - token;
    for (int64_t i = 0; i < kTileTokens && i < left; ++i) rows[i] = x + (token + i) * view.k;
    pack_tile(view, rows, tile_tokens(left), tiles + token * view.k);
  });
  const int64_t band = band_columns(tokens, view.out_features, 1);
  parallel_tasks((view.out_features + band - 1) / band, [&](int64_t task) {
    const int64_t first = task * band, wanted = std::min(first + band, view.out_features);
    const int64_t last = std::min(first + band, view.n);
    const int64_t columns = last - first, scratch = scratch_floats(tokens, columns);
    float* memory = thread_scratch(scratch + tokens * columns);
    float* sums = memory + scratch;
    kernels().multiply(view, tiles, tokens, first, last, sums, columns, memory);
    add_bias(view, first, wanted, tokens, sums, columns);
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(y + t * view.out_features + first, sums + t * columns,
                  sizeof(float) * static_cast<size_t>(wanted - first));
  });
}

}  // namespace
}  // namespace dbrxq

int dbrxq_linear_forward(const dbrxq_linear* linear, const float* x, int64_t tokens, float* y) {
  return dbrxq::guarded([&] {
    if (!dbrxq::isa_usable()) return static_cast<int>(DBRXQ_BAD_ISA);
    if (tokens < 0) return static_cast<int>(DBRXQ_BAD_SHAPE);
    dbrxq::LinearView view;
    const int status = dbrxq::view_linear(*linear, view);
    if (status != DBRXQ_OK) return status;
    dbrxq::Buffer<float> packed;
    for (int64_t t = 0; t < tokens; t += dbrxq::kTokenBlock)
      dbrxq::forward_block(view, x + t * view.k, std::min(dbrxq::kTokenBlock, tokens - t), y + t * view.out_features,
                           packed);
    return static_cast<int>(DBRXQ_OK);
  });
}
