// Kernels with known faults, which the emulator must show (tests/csrc/test_emulator.py), and their sound twins.
#include "decoder/graph.cuh"
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

__global__ void count_up(int* counter) {
  if (threadIdx.x == 0) *counter += 1;
}
int enqueue_count(int* counter, cudaStream_t stream) { return launch(count_up, dim3(1), kThreads, stream, counter); }

}  // namespace
}  // namespace dbrxq

// `in` and `out`: 512 ints, 16-byte aligned; `copies` runs the second kernel.
extern "C" __attribute__((visibility("default"))) int dbrxq_emulator_selftest(int copies, int fault, const int* in,
                                                                              int* out) {
  using namespace dbrxq;
  return launch(copies ? copy : exchange, dim3(1), kThreads, static_cast<cudaStream_t>(nullptr),
                Arguments{in, out, fault});
}

// What capturing says and does. said: 0 beginning on the default stream; 1 a launch into that while another is captured, and
// 2 the end of this capture; 3 a sound capture, 4 the count after it; 5 a launch of its graph, 6 the count after it; 7 the
// count after two more.
extern "C" __attribute__((visibility("default"))) void dbrxq_emulator_graphs(int (&said)[8], int* counter) {
  using namespace dbrxq;
  said[0] = cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeThreadLocal);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  said[1] = enqueue_count(counter, nullptr);
  cudaGraph_t spoilt;
  said[2] = cudaStreamEndCapture(stream, &spoilt);
  cudaStreamDestroy(stream);
  void* graph = nullptr;
  said[3] = capture([&](cudaStream_t own) { return status_of(enqueue_count(counter, own)); }, &graph);
  said[4] = *counter;
  const auto executable = static_cast<cudaGraphExec_t>(graph);
  said[5] = cudaGraphLaunch(executable, nullptr);
  said[6] = *counter;
  cudaGraphLaunch(executable, nullptr);
  cudaGraphLaunch(executable, nullptr);
  said[7] = *counter;
  cudaGraphExecDestroy(executable);
}
