// Fibers, schedules, meetings and deferred copies of the emulator (device.h tells what it stands for).
#include "device.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef threadIdx
#undef blockIdx
#undef gridDim
#undef blockDim

namespace dbrxq {
namespace emulator {

Position here;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
std::mt19937_64 generator(0);

unsigned draw(unsigned limit) { return static_cast<unsigned>(generator() % limit); }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u %u %u, thread %u)\n", what, here.block.x, here.block.y, here.block.z,
               here.thread);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
};

enum class State { ready, at_barrier, at_meeting, finished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  State state = State::ready;
  std::deque<std::vector<Copy>> groups;  // closed groups, oldest first
  std::vector<Copy> open;
};

struct Warp {
  unsigned waiting = 0;
  alignas(16) unsigned char scratch[2][kScratchBytes];  // two in turn: a meeting may begin while the last is read
  unsigned turn = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::unique_ptr<unsigned char[]> shared;
size_t shared_bytes;
ucontext_t scheduler;
void (*running_body)(void*);
void* running_context;
unsigned at_barrier, finished;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

#if defined(__SANITIZE_ADDRESS__)
void leaving(void** fake, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(fake, stack, bytes); }
void arrived(void* fake, const void** stack, size_t* bytes) { __sanitizer_finish_switch_fiber(fake, stack, bytes); }
#else
void leaving(void**, const void*, size_t) {}
void arrived(void*, const void**, size_t*) {}
#endif

Fiber& self() { return fibers[here.thread]; }

void pause_as(State state) {
  Fiber& fiber = self();
  fiber.state = state;
  leaving(state == State::finished ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber.context, &scheduler);
  arrived(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void start() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  running_body(running_context);
  if (!self().open.empty() || !self().groups.empty()) fail("a thread ends with copies under way");
  ++finished;
  pause_as(State::finished);
}

void resume(unsigned thread) {
  here.thread = thread;
  Fiber& fiber = fibers[thread];
  void* fake = nullptr;
  leaving(&fake, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  arrived(fake, nullptr, nullptr);
}

void run_block(unsigned threads) {
  shared.reset();
  at_barrier = finished = 0;
  for (Warp& warp : warps) warp.waiting = warp.turn = 0;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
  }
  std::vector<unsigned> ready;
  while (finished < threads) {
    ready.clear();
    for (unsigned i = 0; i < threads; ++i)
      if (fibers[i].state == State::ready) ready.push_back(i);
    if (ready.empty()) {
      if (at_barrier == 0 || at_barrier + finished != threads) fail("threads wait for each other forever");
      for (Fiber& fiber : fibers)
        if (fiber.state == State::at_barrier) fiber.state = State::ready;
      at_barrier = 0;
      continue;
    }
    // One sweep in random order over those that can run; each runs until it waits.
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[draw(static_cast<unsigned>(i))]);
    for (unsigned thread : ready) resume(thread);
  }
}

}  // namespace

void run(dim3 grid, unsigned threads, void (*body)(void*), void* context) {
  if (threads % 32 != 0 || threads > 1024) fail("a block is whole warps, 1024 threads at most");
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  warps = std::vector<Warp>(threads / 32);
  running_body = body;
  running_context = context;
  here.grid = grid;
  here.threads = threads;
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back(dim3(x, y, z));
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[draw(static_cast<unsigned>(i))]);
  for (const dim3& block : blocks) {
    here.block = block;
    run_block(threads);
  }
  shared.reset();
}

void* shared_memory(size_t bytes) {
  if (!shared) {
    shared.reset(new unsigned char[bytes]);  // aligned to 16 bytes, as new does here
    shared_bytes = bytes;
    for (size_t i = 0; i < bytes; ++i) shared[i] = static_cast<unsigned char>(generator());
  }
  if (bytes != shared_bytes) fail("a kernel shares one object");
  return shared.get();
}

void block_barrier() {
  ++at_barrier;
  pause_as(State::at_barrier);
}

void* warp_scratch() {
  Warp& warp = warps[here.thread / 32];
  return warp.scratch[warp.turn];
}

void warp_meeting(void (*work)(void*), void* context) {
  const unsigned index = here.thread / 32;
  if (++warps[index].waiting < 32) {
    pause_as(State::at_meeting);
    return;
  }
  if (work) work(context);
  warps[index].waiting = 0;
  warps[index].turn ^= 1;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (fibers[index * 32 + lane].state == State::at_meeting) fibers[index * 32 + lane].state = State::ready;
}

void queue_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy is not aligned");
  self().open.push_back({to, from});
}

void close_copy_group() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void finish_copies(int pending) {
  auto& groups = self().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
    groups.pop_front();
  }
}

void multiply(void* scratch) {
  auto& mma = *static_cast<MmaScratch*>(scratch);
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned g = lane / 4, q = lane % 4;
    for (unsigned i = 0; i < 2; ++i) {  // the low and the high half of a register
      const auto half = [&](uint32_t v) { return half_to_float(static_cast<uint16_t>(v >> (16 * i))); };
      a[g][2 * q + i] = half(mma.a[lane][0]);
      a[g + 8][2 * q + i] = half(mma.a[lane][1]);
      a[g][2 * q + 8 + i] = half(mma.a[lane][2]);
      a[g + 8][2 * q + 8 + i] = half(mma.a[lane][3]);
      b[2 * q + i][g] = half(mma.b[lane][0]);
      b[2 * q + 8 + i][g] = half(mma.b[lane][1]);
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = mma.c[lane][i];
      for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      mma.c[lane][i] = sum;
    }
}

}  // namespace emulator

uint16_t round_to_half(double value) {
  // To odd in float first: then the second rounding, to half, is that of the exact value.
  float near = static_cast<float>(value);
  if (static_cast<double>(near) != value && near - near == 0.0f) {
    uint32_t bits = float_to_bits(near);
    if (fabs(static_cast<double>(near)) > fabs(value)) --bits;  // towards zero
    near = bits_to_float(bits | 1u);
  }
  return float_to_half(near);
}

}  // namespace dbrxq

extern "C" __attribute__((visibility("default"))) void dbrxq_emulator_seed(uint64_t seed) {
  dbrxq::emulator::generator.seed(seed);
}
