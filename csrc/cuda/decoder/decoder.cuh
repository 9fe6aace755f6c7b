// The kernels of a decode step beside its products (products.cuh), as the layer loop calls them (decoder.cu).
//
// Axes: B sequences, T new tokens of each, rows = B T <= kMostRows, D hidden, H query heads, J key heads. Activations are
// fp32 from the embedding to the last norm. What changes from step to step (tokens, positions, where the cache is) is in
// device memory, so a captured launch can be repeated. Tickets are zero before a launch and after it. Each function only
// enqueues on `stream` and returns a cudaError_t.
#pragma once
#include "../device.cuh"
#include "dbrxq.h"

namespace dbrxq {

constexpr int kMostRows = 8;
constexpr int kMostHead = 256;    // channels of a head; a multiple of 16
constexpr int kMostSplits = 256;  // of a context

// A norm before a product: the weight [D] of a type, RMSNorm or LayerNorm.
struct Norm {
  const void* weight;
  int dtype;
  int layer_norm;
  float eps;
};

// ends.cu: x [rows, D] = embedding[tokens]; and y [rows, D], of `dtype`, = norm(x). A token outside the table is row 0.
struct Embed {
  const int64_t* tokens;  // [rows]
  const void* table;      // [vocabulary, D]
  int dtype;
  int64_t vocabulary, hidden;
  int rows;
  float* x;
};
int embed(const Embed& args, cudaStream_t stream);

struct Normalise {
  const float* x;
  Norm norm;
  int64_t hidden;
  int rows;
  int dtype;
  void* y;
};
int normalise(const Normalise& args, cudaStream_t stream);

// attention.cu: head norms, clip, rotation, the cache's new rows, and attention over the cache.
struct Attention {
  const float* queries;           // [rows, H head_dim], as the product made them
  const float* keys;              // [rows, J head_dim], likewise
  const float* values;            // [rows, J head_dim]
  const void* query_norm;         // [head_dim] of `dtype`, or null
  const void* key_norm;           // likewise
  const float* cosines;           // [positions, head_dim]
  const float* sines;             // likewise
  const dbrxq_cuda_cache* cache;  // device, of this layer
  const int32_t* past;            // [B]
  int sequences, tokens, heads, key_heads, head_dim;
  int dtype;       // of head norms and, unless cache_bits is 8, of the cache
  int cache_bits;  // 16 (the cache is of `dtype`) or 8
  int splits;      // blocks that share a context, at most
  float scale, clip, eps;
  float* attended;   // [rows, H head_dim]
  float* partial;    // [B, J, splits, T H / J, head_dim + 2], where splits > 1
  int32_t* tickets;  // [B J]
};
int attention(const Attention& args, cudaStream_t stream);
int64_t attention_partial_floats(const Attention& args);

// sample.cu: the next token of each sequence in place of the last one, its position, and a note of it.
struct Sample {
  const float* logits;                  // [B, vocabulary]
  const dbrxq_cuda_sampling* sampling;  // device
  int64_t vocabulary;                   // below 2^24
  int sequences;
  int64_t* tokens;     // [B], out
  int32_t* past;       // [B], one more afterwards
  int64_t* generated;  // [B, room]; token number made[b]
  int32_t* made;       // [B], one more afterwards
  int64_t room;
};
int sample(const Sample& args, cudaStream_t stream);

}  // namespace dbrxq
