// Test equipment: the CUDA that the kernels of csrc/cuda use, for a host compiler. Included by cuda/device.cuh in place
// of the PTX when no CUDA compiler runs; the tests build it into a shared library with the C ABI of the real one.
//
// Every thread of a block is a fiber (emulator.cpp) that runs until it must wait for others: at a barrier, a vote or an
// mma. Who runs next is drawn from a seeded generator, and blocks run one after another in random order, so code that
// relies on an order it has not asked for gives wrong results under some seed. Shared memory is an allocation of
// exactly its size, filled with noise before each block; async copies land when the thread waits for them, no sooner.
// With the address and undefined-behaviour sanitizers on, wild and misaligned accesses are errors.
//
// Not modelled: the order of memory accesses between barriers, block-level concurrency, time.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#include "half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// The runtime API that host code uses, as graphs.cpp plays it.
typedef struct EmulatedStream* cudaStream_t;
typedef struct EmulatedGraph* cudaGraph_t;
typedef struct EmulatedGraph* cudaGraphExec_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureImplicit = 906,
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
constexpr unsigned cudaStreamNonBlocking = 1;
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

namespace dbrxq {
namespace emulator {

// Where the running fiber is.
struct Position {
  dim3 block, grid;
  unsigned thread, threads;
};
extern Position here;

// Runs body() on every thread of every block.
void run(dim3 grid, unsigned threads, void (*body)(void*), void* context);
// Runs a launch, or records it where its stream is being captured; `what` names its arguments' types. A cudaError_t.
int submit(cudaStream_t stream, const char* what, std::function<void()> launch);
// The block's shared object.
void* shared_memory(size_t bytes);
// Waits until all running threads of the block are at a barrier.
void block_barrier();
// Waits until the 32 lanes of the warp have come; the last one to come first calls work(context).
void warp_meeting(void (*work)(void*), void* context);
// Memory of the warp that outlives its meetings.
void* warp_scratch();
void queue_copy(void* to, const void* from);
void close_copy_group();
void finish_copies(int pending);

struct MmaScratch {
  uint32_t a[32][4], b[32][2];
  float c[32][4];
};
struct VoteScratch {
  uint32_t ballot;
  uint32_t values[32];
};
void multiply(void* scratch);  // MmaScratch: c += a b
constexpr size_t kScratchBytes = sizeof(MmaScratch);
static_assert(sizeof(VoteScratch) <= kScratchBytes, "one scratch serves all meetings");

}  // namespace emulator

using Half2 = uint32_t;

template <class Operation>
static inline Half2 each_half(Half2 a, Half2 b, Half2 c, Operation operation) {
  const auto one = [&](int shift) {
    const auto at = [&](Half2 v) { return half_to_float(static_cast<uint16_t>(v >> shift)); };
    return static_cast<uint32_t>(operation(at(a), at(b), at(c))) << shift;
  };
  return one(0) | one(16);
}
// Sums, products and fused products of halves are exact in double: one rounding remains.
uint16_t round_to_half(double value);
static inline Half2 add2(Half2 a, Half2 b) {
  return each_half(a, b, 0, [](double x, double y, double) { return round_to_half(x + y); });
}
static inline Half2 mul2(Half2 a, Half2 b) {
  return each_half(a, b, 0, [](double x, double y, double) { return round_to_half(x * y); });
}
static inline Half2 fma2(Half2 a, Half2 b, Half2 c) {
  return each_half(a, b, c, [](double x, double y, double z) { return round_to_half(x * y + z); });
}
static inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
static inline Half2 low_twice(Half2 a) { return (a & 0xffffu) * 0x10001u; }
static inline Half2 high_twice(Half2 a) { return (a >> 16) * 0x10001u; }
static inline uint16_t to_half(float value) { return float_to_half(value); }
static inline float from_half(uint16_t half) { return half_to_float(half); }
static inline uint32_t bits_of(float value) { return float_to_bits(value); }
static inline float float_of(uint32_t bits) { return bits_to_float(bits); }

static inline void mma(float (&c)[4], const Half2 (&a)[4], Half2 b0, Half2 b1) {
  auto* scratch = static_cast<emulator::MmaScratch*>(emulator::warp_scratch());
  const unsigned lane = emulator::here.thread % 32;
  memcpy(scratch->a[lane], a, sizeof a);
  scratch->b[lane][0] = b0;
  scratch->b[lane][1] = b1;
  memcpy(scratch->c[lane], c, sizeof c);
  emulator::warp_meeting(emulator::multiply, scratch);
  memcpy(c, scratch->c[lane], sizeof c);
}

static inline void mma_from(float (&d)[4], const Half2 (&a)[4], Half2 b0, Half2 b1, const float (&c)[4]) {
  float sums[4] = {c[0], c[1], c[2], c[3]};
  mma(sums, a, b0, b1);
  memcpy(d, sums, sizeof d);
}

static inline uint4 load_once(const uint4* from) { return *from; }
static inline float load_shared_result(const float* from) { return *from; }
static inline void copy_async(void* to, const void* from) { emulator::queue_copy(to, from); }
static inline void close_copy_group() { emulator::close_copy_group(); }
template <int Pending>
static inline void copies_done() {
  emulator::finish_copies(Pending);
}

static inline void warp_barrier() { emulator::warp_meeting(nullptr, nullptr); }

inline int clear_memory(void* memory, int64_t bytes, cudaStream_t) {
  memset(memory, 0, static_cast<size_t>(bytes));
  return 0;
}

template <class... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Parameters... arguments) {
  return emulator::submit(stream, __PRETTY_FUNCTION__, [=] {
    auto call = [&] { kernel(arguments...); };
    emulator::run(
        grid, static_cast<unsigned>(threads), [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
  });
}

constexpr int64_t kPassTokens = 512;  // few enough to try what comes after a pass

inline int multiprocessors(int* count) {
  *count = 3;  // small, so that small problems are split in every way that the host code knows
  return 0;
}

}  // namespace dbrxq

#define threadIdx (::dim3(::dbrxq::emulator::here.thread))
#define blockIdx (::dbrxq::emulator::here.block)
#define gridDim (::dbrxq::emulator::here.grid)
#define blockDim (::dim3(::dbrxq::emulator::here.threads))
#define DBRXQ_SHARED(type, name) type& name = *static_cast<type*>(::dbrxq::emulator::shared_memory(sizeof(type)))

static inline void __syncthreads() { ::dbrxq::emulator::block_barrier(); }
static inline void __threadfence() {}
static inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
static inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address += value;
  return before;
}
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

static inline uint32_t __ballot_sync(uint32_t, bool vote) {
  using ::dbrxq::emulator::VoteScratch;
  auto* scratch = static_cast<VoteScratch*>(::dbrxq::emulator::warp_scratch());
  const unsigned lane = ::dbrxq::emulator::here.thread % 32;
  scratch->values[lane] = vote;
  ::dbrxq::emulator::warp_meeting(
      [](void* context) {
        auto* votes = static_cast<VoteScratch*>(context);
        votes->ballot = 0;
        for (unsigned i = 0; i < 32; ++i) votes->ballot |= votes->values[i] << i;
      },
      scratch);
  return scratch->ballot;
}

static inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  using ::dbrxq::emulator::VoteScratch;
  auto* scratch = static_cast<VoteScratch*>(::dbrxq::emulator::warp_scratch());
  const unsigned lane = ::dbrxq::emulator::here.thread % 32;
  scratch->values[lane] = ::dbrxq::float_to_bits(value);
  ::dbrxq::emulator::warp_meeting(nullptr, nullptr);
  return ::dbrxq::bits_to_float(scratch->values[lane ^ static_cast<unsigned>(mask)]);
}
