// The matrix products of a decode step, each with the norm before it and the sum behind it.
#pragma once
#include "arena.h"
#include "decoder.cuh"

namespace dbrxq {

using Decoder = dbrxq_cuda_decoder;
using Layer = dbrxq_cuda_decoder_layer;

// The products of any layer of a decoder for up to kMostRows rows; their memory is a piece of the step's workspace.
// Functions enqueue on `stream` and return a status.
class Products {
 public:
  Products(const Decoder& decoder, int rows, Arena& arena);

  // Queries, keys and values, each dense [rows, out_features], of norm(x).
  int qkv(const Layer& layer, const float* x, float* const (&outputs)[3], cudaStream_t stream) const;

  // x += output(attended).
  int output(const Layer& layer, const float* attended, float* x, cudaStream_t stream) const;

  // x += sum over a of weights[row, a] * down_e(activation(gate_e(norm(x))) * up_e(norm(x))), e = index[row, a].
  int experts(const Layer& layer, int64_t active, const int64_t* index, const float* weights, float* x,
              cudaStream_t stream) const;

 private:
  int normed(const void* weight, const float* x, cudaStream_t stream) const;

  const Decoder& decoder_;
  int rows_;
  float* normed_;  // [rows, D]
  float* added_;   // [rows, D]
  void* workspace_;
};

}  // namespace dbrxq
