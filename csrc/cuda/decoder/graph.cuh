// Capture of what some host code enqueues as a CUDA graph that can be launched again and again.
#pragma once
#include "../device.cuh"
#include "arena.h"

namespace dbrxq {

// `graph` becomes a cudaGraphExec_t of what enqueue(stream) enqueues, which returns a status. Nothing runs. The stream
// is one of its own: the default stream, which torch uses, cannot be captured. Kernels should have run before, so that
// their code is on the device.
template <class Enqueue>
int capture(Enqueue&& enqueue, void** graph) {
  cudaStream_t stream;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return status_of(static_cast<int>(error));
  int status = DBRXQ_OK;
  error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  if (error == cudaSuccess) {
    status = enqueue(stream);
    cudaGraph_t captured = nullptr;
    error = cudaStreamEndCapture(stream, &captured);
    cudaGraphExec_t executable = nullptr;
    if (error == cudaSuccess && status == DBRXQ_OK) error = cudaGraphInstantiateWithFlags(&executable, captured, 0);
    if (captured) cudaGraphDestroy(captured);
    *graph = executable;
  }
  cudaStreamDestroy(stream);
  return status != DBRXQ_OK ? status : status_of(static_cast<int>(error));
}

}  // namespace dbrxq
