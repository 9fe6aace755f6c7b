// Test equipment: a CUDA runtime without a device. The host code of csrc/cuda, compiled by nvcc as ever, is linked with it
// in place of libcudart: every launch goes to a function of the tests, with the kernel's name in the PTX and its
// arguments.
#include <cuda_runtime_api.h>
#include <string.h>

#include <string>
#include <unordered_map>

namespace {

struct Call {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
Call pending;

// Host function -> name in the PTX. Filled before main, by what nvcc puts into each object.
std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> all;
  return all;
}

}  // namespace

#define STUB extern "C" __attribute__((visibility("default")))

using Hook = int (*)(const char* kernel, const unsigned* sizes, void** arguments, unsigned long shared);
STUB Hook stub_hook;
STUB int stub_multiprocessors;
STUB int stub_capability;  // major * 10 + minor
Hook stub_hook = nullptr;
int stub_multiprocessors = 3;  // small, so that small problems are split in every way that the host code knows
int stub_capability = 80;

namespace {

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const auto found = names().find(kernel);
  if (found == names().end() || !stub_hook) return cudaErrorInvalidDeviceFunction;
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return static_cast<cudaError_t>(stub_hook(found->second.c_str(), sizes, arguments, shared));
}

cudaError_t last = cudaSuccess;

}  // namespace

// What nvcc's own code calls.
STUB void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
STUB void __cudaRegisterFatBinaryEnd(void**) {}
STUB void __cudaUnregisterFatBinary(void**) {}
STUB void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                 int*) {
  names()[host] = name;
}
STUB unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
STUB cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<cudaStream_t*>(stream) = pending.stream;
  return cudaSuccess;
}
STUB cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
STUB cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t) {
  return last = launch(kernel, grid, block, arguments, shared);
}

// What the host code calls.
STUB cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                  cudaStream_t) {
  return last = launch(kernel, grid, block, arguments, shared);
}
STUB cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  return last = launch(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}
STUB cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
STUB cudaError_t cudaPeekAtLastError() { return last; }
STUB const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the kernel failed on the PTX interpreter";
}
STUB cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
STUB cudaError_t cudaSetDevice(int) { return cudaSuccess; }
STUB cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
STUB cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
STUB cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
STUB cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
STUB cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
STUB cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
STUB cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = stub_multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = stub_capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = stub_capability % 10; return cudaSuccess;
    default: return cudaErrorNotSupported;
  }
}

// Graphs are the emulator's (csrc/emulator/graphs.cpp).
STUB cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaErrorNotSupported; }
STUB cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaErrorNotSupported; }
STUB cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorNotSupported; }
STUB cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaErrorNotSupported; }
STUB cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t*, cudaGraph_t, unsigned long long) {
  return cudaErrorNotSupported;
}
STUB cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorNotSupported; }
STUB cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaErrorNotSupported; }
STUB cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaErrorNotSupported; }
