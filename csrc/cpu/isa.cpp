#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "dbrxq.h"

namespace dbrxq {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
constexpr int kUnusable = -1;

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::scalar;
}

int find(const char* name) {
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return cpu_has(static_cast<Isa>(i)) ? i : kUnusable;
  return kUnusable;
}

std::atomic<int>& current() {
  static std::atomic<int> value{[] {
    const char* wanted = std::getenv("DBRXQ_ISA");
    if (wanted && *wanted) return find(wanted);
    for (int i = 2; i > 0; --i)
      if (cpu_has(static_cast<Isa>(i))) return i;
    return 0;
  }()};
  return value;
}

}  // namespace

bool isa_usable() { return current().load() != kUnusable; }
Isa isa() { return static_cast<Isa>(current().load()); }

}  // namespace dbrxq

const char* dbrxq_isa(void) {
  return dbrxq::isa_usable() ? dbrxq::kNames[static_cast<int>(dbrxq::isa())] : "unusable";
}

int dbrxq_set_isa(const char* name) {
  const int found = name ? dbrxq::find(name) : dbrxq::kUnusable;
  if (found == dbrxq::kUnusable) return DBRXQ_BAD_ISA;
  dbrxq::current().store(found);
  return DBRXQ_OK;
}

const char* dbrxq_status_text(int status) {
  switch (status) {
    case DBRXQ_OK:
      return "ok";
    case DBRXQ_BAD_SHAPE:
      return "a size is negative, not the multiple it must be, or two sizes disagree";
    case DBRXQ_BAD_GROUPS:
      return "q_groups is not a legal map of K rows in the word rows of q_weight";
    case DBRXQ_BAD_PERMUTATION:
      return "q_invperm does not name every row once";
    case DBRXQ_BAD_EXPERT:
      return "an expert index is below 0 or above the number of experts";
    case DBRXQ_BAD_ACTIVATION:
      return "no such activation";
    case DBRXQ_BAD_ISA:
      return "no such instruction set, or this CPU lacks it (scalar, avx2, avx512; see DBRXQ_ISA)";
    case DBRXQ_NO_MEMORY:
      return "out of memory";
    default:
      return "unknown status";
  }
}
