// The matrix products of a decode step, each with the norm before it and the sum behind it (few/few.cuh).
#pragma once
#include "../few/few.cuh"
#include "arena.h"
#include "decoder.cuh"

namespace dbrxq {

using Decoder = dbrxq_cuda_decoder;
using Layer = dbrxq_cuda_decoder_layer;

// The products of any layer of a decoder for up to kMostRows rows; their memory is a piece of the step's workspace, zero
// before its first step. Functions enqueue on `stream` and return a cudaError_t. One launch takes 8 rows of activations in
// halves; models in fp32 have two rows a token, and more launches for more than 4 of them.
class Products {
 public:
  Products(const Decoder& decoder, int rows, Arena& arena);

  // Queries, keys and values, each dense [rows, out_features], of norm(x).
  int qkv(const Layer& layer, const float* x, float* const (&outputs)[3], cudaStream_t stream) const;

  // logits [rows, vocabulary] of norm(x).
  int head(const float* x, float* logits, cudaStream_t stream) const;

  // x += output(attended), and what the router of the layer's experts needs of it.
  int output(const Layer& layer, const float* attended, float* x, cudaStream_t stream) const;

  // x += sum over a of weight_a * down_e(activation(gate_e(norm(x))) * up_e(norm(x))) of the experts e_a that the router
  // chooses, or of the only one. `output` came before.
  int experts(const Layer& layer, float* x, cudaStream_t stream) const;

 private:
  // Weights are code times scale, not rounded to halves, where activations have the precision of halves anyway.
  int folded() const { return parts_ == 1; }
  FewRouter router(const Layer& layer, int first) const;
  FewInput input(const float* x, int64_t k, int first, int rows, const void* norm) const;

  // Calls body(first row, rows) for rows that fit in a launch, `active` slots each.
  template <class Body>
  int by_launches(int64_t active, Body&& body) const;

  const Decoder& decoder_;
  int rows_, parts_;
  float* inner_;    // [slots, ffn]
  float* largest_;  // [slots, column tiles of ffn]
  float* partial_;  // as in FewRouter, as the next three
  float* constants_;
  int64_t* index_;
  float* weights_;
  void* workspace_;
};

}  // namespace dbrxq
