// What the library was built for, and whether a GPU's driver takes its code.
#include "dbrxq.h"
#include "device.cuh"

#if !defined(DBRXQ_CUDA_TARGETS)
#define DBRXQ_CUDA_TARGETS ""
#endif

const char* dbrxq_cuda_targets(void) { return DBRXQ_CUDA_TARGETS; }

#if defined(__CUDACC__)
namespace {

constexpr int kErrorBase = 1000;  // as in api.cu

__global__ void probe_kernel() {}  // in the same targets as all the others

int status_of(cudaError_t error) { return error == cudaSuccess ? DBRXQ_OK : kErrorBase + static_cast<int>(error); }

}  // namespace

int dbrxq_cuda_runtime_version(void) { return CUDART_VERSION; }

int dbrxq_cuda_probe(int device) {
  int before;
  cudaError_t error = cudaGetDevice(&before);
  if (error != cudaSuccess) return status_of(error);
  error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // an error is reported here, not at somebody's next launch
  const cudaError_t back = cudaSetDevice(before);
  return status_of(error == cudaSuccess ? back : error);
}
#else
int dbrxq_cuda_runtime_version(void) { return 0; }

int dbrxq_cuda_probe(int) { return DBRXQ_OK; }
#endif
