// The products of a step by the kernels of the operators, with a norm before and a sum behind in launches of their own.
#include "products.cuh"

#include <algorithm>

namespace dbrxq {
namespace {

constexpr int kThreads = 256;

struct Add {
  const float* added;
  float* x;
  int64_t count;
};

__global__ void __launch_bounds__(kThreads) add_kernel(Add args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.count) args.x[i] += args.added[i];
}

int add(const Add& args, cudaStream_t stream) {
  return launch(add_kernel, dim3(static_cast<unsigned>((args.count + kThreads - 1) / kThreads)), kThreads, stream,
                args);
}

int64_t workspace_bytes(const Decoder& decoder, int rows) {
  int64_t most = 0, bytes = 0;
  for (int64_t i = 0; i < decoder.layer_count; ++i) {
    const Layer& layer = decoder.layers[i];
    for (const dbrxq_cuda_linear* linear : {layer.qkv[0], layer.qkv[1], layer.qkv[2], layer.output}) {
      dbrxq_cuda_linear_workspace(linear, rows, DBRXQ_FLOAT32, &bytes);
      most = std::max(most, bytes);
    }
    const int64_t active = layer.router ? layer.active : 1;
    dbrxq_cuda_experts_workspace(layer.experts, rows, active, DBRXQ_FLOAT32, &bytes);
    most = std::max(most, bytes);
  }
  return most;
}

}  // namespace

Products::Products(const Decoder& decoder, int rows, Arena& arena) : decoder_(decoder), rows_(rows) {
  normed_ = arena.take<float>(rows * decoder.hidden);
  added_ = arena.take<float>(rows * decoder.hidden);
  workspace_ = arena.take<char>(workspace_bytes(decoder, rows));
}

int Products::normed(const void* weight, const float* x, cudaStream_t stream) const {
  const Norm norm = {weight, decoder_.dtype, decoder_.layer_norm, decoder_.eps};
  return status_of(normalise({x, norm, decoder_.hidden, rows_, DBRXQ_FLOAT32, normed_}, stream));
}

int Products::qkv(const Layer& layer, const float* x, float* const (&outputs)[3], cudaStream_t stream) const {
  int status = normed(layer.attention_norm, x, stream);
  for (int i = 0; i < 3 && status == DBRXQ_OK; ++i)
    status = dbrxq_cuda_linear_forward(layer.qkv[i], normed_, rows_, DBRXQ_FLOAT32, outputs[i], workspace_, stream);
  return status;
}

int Products::output(const Layer& layer, const float* attended, float* x, cudaStream_t stream) const {
  const int status =
      dbrxq_cuda_linear_forward(layer.output, attended, rows_, DBRXQ_FLOAT32, added_, workspace_, stream);
  return status != DBRXQ_OK ? status : status_of(add({added_, x, rows_ * decoder_.hidden}, stream));
}

int Products::experts(const Layer& layer, int64_t active, const int64_t* index, const float* weights, float* x,
                      cudaStream_t stream) const {
  int status = normed(layer.mlp_norm, x, stream);
  if (status == DBRXQ_OK)
    status = dbrxq_cuda_experts_forward(layer.experts, normed_, index, weights, rows_, active, DBRXQ_FLOAT32, added_,
                                        workspace_, stream);
  return status != DBRXQ_OK ? status : status_of(add({added_, x, rows_ * decoder_.hidden}, stream));
}

}  // namespace dbrxq
