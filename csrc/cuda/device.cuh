// Everything the kernels ask of the machine beyond plain C++: packed half arithmetic, matrix products, loads, copies.
// Here each is the PTX instruction; csrc/emulator/device.h gives the same functions host bodies.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
#error "the CUDA kernels need compute capability 7.5 (Turing) or newer: DBRXQ_CUDA_ARCHITECTURES names an older one"
#endif
// Turing multiplies tiles of half the depth and has no copies that go on by themselves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define DBRXQ_TURING 1
#else
#define DBRXQ_TURING 0
#endif

// The one object of a kernel that its block shares.
#define DBRXQ_SHARED(type, name) __shared__ type name

namespace dbrxq {

// Two halves in one register, the lower index in the low bits. Rounded to nearest even, subnormals kept, never fused
// (`.rn`): the exact weights of the format depend on it.
using Half2 = uint32_t;

__device__ __forceinline__ Half2 add2(Half2 a, Half2 b) {
  Half2 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ Half2 mul2(Half2 a, Half2 b) {
  Half2 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ Half2 fma2(Half2 a, Half2 b, Half2 c) {
  Half2 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// (a & b) | c in one instruction: written in C, two constants become two instructions.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// One half of a pair, twice.
__device__ __forceinline__ Half2 low_twice(Half2 a) {
  Half2 d;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ Half2 high_twice(Half2 a) {
  Half2 d;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ uint16_t to_half(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
__device__ __forceinline__ float from_half(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// c [16, 8] += a [16, 16] b [16, 8] of one warp, products of halves summed in fp32. With lane = 4 g + q:
//   a[0], a[1]: rows g, g + 8, columns 2q and 2q + 1;  a[2], a[3]: the same rows, columns 2q + 8 and 2q + 9
//   b0: rows 2q and 2q + 1, column g;  b1: rows 2q + 8 and 2q + 9
//   c[0], c[1]: row g, columns 2q and 2q + 1;  c[2], c[3]: row g + 8
__device__ __forceinline__ void mma(float (&c)[4], const Half2 (&a)[4], Half2 b0, Half2 b1) {
#if DBRXQ_TURING
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d = c + a b.
__device__ __forceinline__ void mma_from(float (&d)[4], const Half2 (&a)[4], Half2 b0, Half2 b1, const float (&c)[4]) {
#if DBRXQ_TURING
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  mma(d, a, b0, b1);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// 16 bytes that no other block reads: past the L1, where the activations stay.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}
// A float that another block wrote during this launch: from the L2.
__device__ __forceinline__ float load_shared_result(const float* from) { return __ldcg(from); }

// A 16-byte copy from global to shared memory, done when a `copies_done` covers its group; the block sees it after the
// barrier that follows. It may be done at once, as it is on Turing: nobody may be reading what it overwrites.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if DBRXQ_TURING
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#endif
}
__device__ __forceinline__ void close_copy_group() {
#if !DBRXQ_TURING
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Pending` of this thread's latest groups are under way.
template <int Pending>
__device__ __forceinline__ void copies_done() {
#if !DBRXQ_TURING
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Waits for all lanes of the warp; they see each other's writes to memory.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

inline int clear_memory(void* memory, int64_t bytes, cudaStream_t stream) {
  return static_cast<int>(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream));
}

template <class... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Parameters... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// Tokens of a pass through the experts: bounds the workspace (about 1 GB for DBRX), and fills tiles of 64 rows to 94 %.
constexpr int64_t kPassTokens = 2048;

inline int multiprocessors(int* count) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return static_cast<int>(error);
  return static_cast<int>(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

}  // namespace dbrxq
#else
#include "emulator/device.h"
#endif
