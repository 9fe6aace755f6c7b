// Bodies of repacked linears that lie in a file: their checksums, and reading them ahead of their use.
#include <atomic>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "dbrxq.h"
#include "guard.h"
#include "parallel.h"
#include "repacked.h"

namespace dbrxq {
namespace {

constexpr int64_t kPart = int64_t{1} << 20;       // bytes of a task
constexpr int64_t kReadAhead = int64_t{1} << 20;  // smaller bodies are not worth the system call
constexpr uint64_t kSeed = 0xcbf29ce484222325u;
constexpr uint64_t kFactor = 0x9e3779b185ebca87u;  // odd, so that multiplying loses nothing
constexpr int kLanes = 8;

// One more word. Two words that differ give sums that differ, whatever came before and comes after.
inline uint64_t mix(uint64_t sum, uint64_t word) {
  const uint64_t both = sum ^ word;
  return (both << 29 | both >> 35) * kFactor;
}

uint64_t mix_words(uint64_t sum, const void* data, int64_t bytes) {
  const auto* at = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, at + i, static_cast<size_t>(bytes - i < 8 ? bytes - i : 8));
    sum = mix(sum, word);
  }
  return sum;
}

// Of whole cache lines, a lane for each of their words: one multiplication after the other would take eight times as long.
uint64_t sum_lines(const char* at, int64_t bytes) {
  uint64_t sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = kSeed + static_cast<uint64_t>(lane);
  for (int64_t i = 0; i < bytes; i += 8 * kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t word;
      std::memcpy(&word, at + i + 8 * lane, sizeof word);
      sums[lane] = mix(sums[lane], word);
    }
  return mix_words(kSeed, sums, sizeof sums);
}

}  // namespace

uint64_t checksum(const PackedView& view) {
  const PackedHeader& header = *view.header;
  const int64_t sizes[] = {header.k,        header.n,      header.out_features, header.units,
                           header.segments, header.groups, header.band_bytes,   header.body_bytes};
  uint64_t sum = mix_words(kSeed, sizes, sizeof sizes);
  sum = mix_words(sum, view.segments, header.segments * static_cast<int64_t>(sizeof(Segment)));
  sum = mix_words(sum, view.permutation, header.units * layout::kUnitRows * 4);
  sum = mix_words(sum, view.tables, header.groups * 16 * 4);
  if (view.bias) sum = mix_words(sum, view.bias, header.n * 4);

  const int64_t parts = (header.body_bytes + kPart - 1) / kPart;
  std::vector<uint64_t> sums(static_cast<size_t>(parts));
  parallel_for(parts, [&](int64_t i) {
    const int64_t left = header.body_bytes - i * kPart;
    sums[static_cast<size_t>(i)] = sum_lines(header.body + i * kPart, left < kPart ? left : kPart);
  });
  return mix_words(sum, sums.data(), parts * 8);
}

void read_ahead(const PackedView& view) {
#if defined(__linux__)
  const PackedHeader& header = *view.header;
  if (!header.mapped || header.body_bytes < kReadAhead) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(header.body) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(header.body) + static_cast<uintptr_t>(header.body_bytes);
  (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_WILLNEED);  // only advice
#else
  (void)view;
#endif
}

int check_body(const PackedView& view) {
  std::atomic_ref<int32_t> state(view.header->state);
  if (state.load(std::memory_order_acquire) == kUnchecked)
    state.store(checksum(view) == view.header->checksum ? kTrusted : kDamaged, std::memory_order_release);
  return state.load(std::memory_order_acquire) == kTrusted ? DBRXQ_OK : DBRXQ_DAMAGED;
}

}  // namespace dbrxq

int dbrxq_repacked_checksum(const void* packed, uint64_t* checksum) {
  return dbrxq::guarded([&] {
    dbrxq::PackedView view;
    const int status = dbrxq::view_packed(packed, view);
    if (status == DBRXQ_OK) *checksum = dbrxq::checksum(view);
    return status;
  });
}

int dbrxq_repacked_check(const void* packed) {
  return dbrxq::guarded([&] {
    dbrxq::PackedView view;
    const int status = dbrxq::view_packed(packed, view);
    return status == DBRXQ_OK ? dbrxq::check_body(view) : status;
  });
}
