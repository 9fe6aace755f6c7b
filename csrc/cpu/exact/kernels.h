// The inner loops of linears, one set per instruction set; linear.cpp and experts.cpp choose and schedule them.
#pragma once
#include <cstdint>

#include "linear_view.h"

namespace dbrxq {

constexpr int64_t kStreamTokens = 8;    // up to here the words are decoded straight into the sums
constexpr int64_t kPanelRows = 256;     // K rows decoded at a time for more tokens ...
constexpr int64_t kPanelColumns = 128;  // ... of so many columns: 128 KiB of floats, at home in L2

struct Kernels {
  // sums[t * stride + c - first] = sum over k of x[t, k] * weight[k, c], c in [first, last), t in [0, tokens).
  //   packed   float, tiles as linear_view.h draws them
  //   first, last   multiples of 32; at most kPanelColumns apart when tokens > kStreamTokens
  //   scratch  float [scratch_floats(tokens, last - first)], 64-byte aligned
  void (*multiply)(const LinearView& view, const float* packed, int64_t tokens, int64_t first, int64_t last,
                   float* sums, int64_t stride, float* scratch);

  // weight[permutation[i], c] for c in [first, min(last, out_features)), half [K, out_features].
  void (*dequantize)(const LinearView& view, const int32_t* permutation, int64_t first, int64_t last, uint16_t* weight);
};

inline int64_t scratch_floats(int64_t tokens, int64_t columns) {
  return tokens <= kStreamTokens ? tile_tokens(tokens) * columns : kPanelRows * columns;
}

const Kernels& kernels();  // of the instruction set in use

extern const Kernels kScalarKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace dbrxq
