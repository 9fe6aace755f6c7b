// How fast this machine reads memory: what every figure of scripts/dev/bench_kernels.py is measured against.
#include <cstdint>
#include <cstring>
#include <vector>

#include "dbrxq.h"
#include "guard.h"
#include "parallel.h"

namespace dbrxq {
namespace {

typedef uint64_t Vector __attribute__((vector_size(16)));
constexpr int64_t kLine = 64, kAhead = 4096;
constexpr int64_t kPart = int64_t{1} << 20;  // bytes of a task: a few bands of a matrix

// Sum of 64-bit words, two cache lines a step.
uint64_t sum_words(const char* at, int64_t bytes) {
  Vector sums[8] = {};
  for (int64_t i = 0; i + 2 * kLine <= bytes; i += 2 * kLine) {
    __builtin_prefetch(at + i + kAhead);
    __builtin_prefetch(at + i + kAhead + kLine);
    for (int j = 0; j < 8; ++j) {
      Vector words;
      std::memcpy(&words, at + i + 16 * j, sizeof words);
      sums[j] += words;
    }
  }
  uint64_t total = 0;
  for (const Vector& sum : sums) total += sum[0] + sum[1];
  return total;
}

}  // namespace
}  // namespace dbrxq

int dbrxq_read_memory(const void* data, int64_t bytes, uint64_t* sum) {
  return dbrxq::guarded([&] {
    if (bytes < 0) return static_cast<int>(DBRXQ_BAD_SHAPE);
    const int64_t parts = (bytes + dbrxq::kPart - 1) / dbrxq::kPart;
    std::vector<uint64_t> sums(static_cast<size_t>(parts), 0);
    dbrxq::parallel_for(parts, [&](int64_t i) {
      const int64_t first = i * dbrxq::kPart, left = bytes - first;
      sums[static_cast<size_t>(i)] =
          dbrxq::sum_words(static_cast<const char*>(data) + first, left < dbrxq::kPart ? left : dbrxq::kPart);
    });
    *sum = 0;
    for (const uint64_t part : sums) *sum += part;
    return static_cast<int>(DBRXQ_OK);
  });
}
