// The inner loops of a decoder step that are not linears, one set per instruction set; decoder.cpp calls them.
#pragma once
#include <cstdint>

namespace dbrxq {

// Attention of some queries over a stretch of one key head's cache, not yet divided by the sum of its weights, so
// that stretches can be added:  out[r] = sum over p of exp(s[r, p] - maximum[r]) * values[p],  sum[r] likewise.
struct AttentionTask {
  const void* keys;  // [length, head_dim] of dtype
  const void* values;
  int dtype;               // DBRXQ_FLOAT16, ..
  int64_t head_dim;        // a multiple of 16
  int64_t first, last;     // positions
  const float* queries;    // [rows, head_dim], scaled
  const int64_t* visible;  // [rows] positions that a row may see, counted from 0
  int64_t rows;
  float* scores;   // scratch [rows, last - first rounded up to 16]
  float* out;      // [rows, head_dim]
  float* maximum;  // [rows], -infinity where a row sees nothing here
  float* sum;      // [rows]
};

constexpr int64_t kScoreMultiple = 16;

struct DecoderKernels {
  void (*attend)(const AttentionTask& task);
  // y = x / sqrt(mean(x^2) + eps) * weight, of n values; centred first as in LayerNorm if `centred`. y may be x.
  void (*normalise)(const float* x, const void* weight, int dtype, int64_t n, float eps, bool centred, float* y);
  // gate = silu(gate) * up, of n values.
  void (*silu_product)(float* gate, const float* up, int64_t n);
  // x . weight, of n values.
  float (*dot)(const float* x, const void* weight, int dtype, int64_t n);
  // Row of n values to `dtype`, rounded to nearest even.
  void (*store)(const float* x, int dtype, int64_t n, void* to);
};

const DecoderKernels& decoder_kernels();  // of the instruction set in use

extern const DecoderKernels kScalarDecoder, kAvx2Decoder, kAvx512Decoder;

}  // namespace dbrxq
