// Kernels with known faults, which the emulator must show (tests/csrc/test_emulator.py), and their sound twins.
#include "device.cuh"

namespace dbrxq {
namespace {

struct Arguments {
  const int* in;  // [128 blocks' threads]
  int* out;
  int fault;
};

constexpr int kThreads = 128;
enum Fault { kNone = 0, kNoBarrier = 1, kNoWait = 2, kOutOfBounds = 3, kMisaligned = 4 };

// out[i] = in[i ^ 32]: each thread passes its number to one of another warp through shared memory.
__global__ void exchange(Arguments args) {
  struct Shared {
    int values[kThreads];
  };
  DBRXQ_SHARED(Shared, shared);
  const int i = threadIdx.x;
  shared.values[args.fault == kOutOfBounds ? i + 1 : i] = args.in[i];
  if (args.fault != kNoBarrier) __syncthreads();
  args.out[i] = shared.values[i ^ 32];
}

// out = in, 16 bytes a thread, by asynchronous copies.
__global__ void copy(Arguments args) {
  struct alignas(16) Shared {
    int values[kThreads][4];
  };
  DBRXQ_SHARED(Shared, shared);
  const int i = threadIdx.x;
  copy_async(shared.values[i], args.in + 4 * i);
  close_copy_group();
  if (args.fault != kNoWait) copies_done<0>();
  const uint4* from =
      reinterpret_cast<const uint4*>(args.fault == kMisaligned ? &shared.values[i / 2][1] : shared.values[i]);
  *reinterpret_cast<uint4*>(args.out + 4 * i) = *from;
  copies_done<0>();
}

}  // namespace
}  // namespace dbrxq

// `in` and `out`: 512 ints, 16-byte aligned; `copies` runs the second kernel.
extern "C" __attribute__((visibility("default"))) int dbrxq_emulator_selftest(int copies, int fault, const int* in,
                                                                              int* out) {
  using namespace dbrxq;
  return launch(copies ? copy : exchange, dim3(1), kThreads, static_cast<cudaStream_t>(nullptr),
                Arguments{in, out, fault});
}
