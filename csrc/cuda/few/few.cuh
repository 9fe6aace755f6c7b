// Products of at most 8 rows, as a decode step needs them: each is one launch, with what comes before and after inside.
//
// Every launch only enqueues on its stream and returns a cudaError_t; grids follow from sizes, so all can be captured in a
// graph. Rows are tokens times parts. Results depend on the numbers and sizes alone: sums have a fixed order.
// Oracle: tests/helpers/oracles_ops.py through tests/runtime/kernels/test_cuda_few.py.
#pragma once
#include "linear.cuh"

namespace dbrxq {

constexpr int kFewRows = 8;
constexpr int kFewSlots = 64;  // tokens times experts a token
constexpr int kFewLinears = 3;
constexpr int kMostExperts = 1024;  // of a router

// Activations, taken as they are or normalized: (x - mean) / sqrt(variance + eps) * norm in fp32, without the mean for
// RMS norms.
struct FewInput {
  const void* x;     // [tokens, k], 16-byte aligned
  int64_t k;         // a multiple of 16
  int tokens;        // 1..8; times parts, 8 at most
  int dtype;         // of x
  int parts;         // halves that hold an activation: 1, or 2 for 22 bits of it
  int norm_dtype;    // of norm
  const void* norm;  // [k], 16-byte aligned; null: taken as they are
  int layer_norm;    // 1: minus the mean; 0: RMS norm
  float eps;
  int folded;  // 0: weights are exact halves; 1: they are code times scale, not rounded, at half the work (folded.cuh)
};

struct FewResult {
  void* y;               // [tokens, stride]
  const void* residual;  // [tokens, residual_stride], added to y, may be y itself; null: nothing
  int64_t stride;        // elements from token to token
  int64_t residual_stride;
  int dtype;  // of y
  int residual_dtype;
};

// A router between two launches: what few_linears leaves of its first result, few_gate_up chooses by (router.cuh). Its
// numbers are the logits of the result's norm, their softmax, the likeliest `active` experts of few_gate_up's routing.
struct FewRouter {
  const void* weight;  // [experts, k], of `dtype`; null: no router
  const void* norm;    // [k], likewise
  int dtype;
  int layer_norm;     // as in FewInput
  int experts;        // kMostExperts at most
  float expert_norm;  // weights are divided by their p-norm of this p; 0: they are not
  float* partial;     // [tokens, column tiles of k, experts]
  float* constants;   // [column tiles of k, experts]
  int64_t* index;     // out [tokens, active], for few_down
  float* weights;     // out [tokens, active]
};

// y_i = norm(x) W_i + bias_i + residual_i of up to three linears of the same k.
struct FewLinears {
  FewInput input;
  Linear linears[kFewLinears];  // by value; pointers to device memory
  FewResult results[kFewLinears];
  int count;
  void* workspace;
  FewRouter router;  // behind the only linear
};
int few_linears(const FewLinears& args, cudaStream_t stream);

// Who computes which token: expert top_k_index[t, a]; outside 0..experts - 1: nobody.
struct FewRouting {
  const void* top_k_index;     // [tokens, active] of index_bytes each; null: expert 0, so the MLP of a dense model
  const float* top_k_weights;  // [tokens, active]; null: 1
  int index_bytes;             // 4 or 8
  int tokens, active;          // their product: kFewSlots at most
  int experts;
};

// inner[slot] = activation(norm(x) gate_e) * (norm(x) up_e), slot = t * active + a; rows of slots without an expert are
// left as they are. `largest`: of each row of inner the largest magnitude in every 128 columns, for few_down.
struct FewGateUp {
  FewInput input;
  FewRouting routing;
  const Linear* gate;  // device [experts], hidden -> ffn
  const Linear* up;
  int64_t ffn;
  int activation;
  float* inner;    // device [slots, ffn], 16-byte aligned
  float* largest;  // device [slots, column tiles of ffn]
  void* workspace;
  FewRouter router;  // in place of the routing's index and weights
};
int few_gate_up(const FewGateUp& args, cudaStream_t stream);

// y[t] = residual + sum over a of top_k_weights[t, a] * (inner[slot] down_e), summed in the order of the experts.
struct FewDown {
  FewRouting routing;
  const Linear* down;  // device [experts], ffn -> hidden
  int64_t ffn, hidden;
  int parts;  // as in FewInput, of inner
  int folded;
  const float* inner;  // as few_gate_up left them
  const float* largest;
  FewResult result;
  void* workspace;
};
int few_down(const FewDown& args, cudaStream_t stream);

// What `workspace` takes, the same for all of these; 256-byte aligned. few_clear makes it ready, once: every launch leaves
// it so for the next on the same stream.
int few_workspace(int64_t* bytes);
int few_clear(void* workspace, cudaStream_t stream);

}  // namespace dbrxq
