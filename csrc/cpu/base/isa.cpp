// The instruction set that the kernels run on: found at the first call, or forced.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "dbrxq.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dbrxq {
namespace {

// What DBRXQ_ISA can name, worst first.
enum Level { kScalar, kAvx2, kAvxVnni, kAvx512, kLevels };
constexpr const char* kNames[kLevels] = {"scalar", "avx2", "avxvnni", "avx512"};
constexpr int kUnusable = -1;

#if defined(__x86_64__)
// AVX-VNNI, which __builtin_cpu_supports does not know in every compiler: leaf 7, subleaf 1, EAX bit 4.
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1u);
}
#endif

bool cpu_has(int level) {
#if defined(__x86_64__)
  switch (level) {
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case kAvxVnni: return cpu_has(kAvx2) && has_avxvnni();
    case kAvx512:
      return cpu_has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    default: return true;
  }
#endif
  return level == kScalar;
}

int find(const char* name) {
  for (int i = 0; i < kLevels; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return cpu_has(i) ? i : kUnusable;
  return kUnusable;
}

std::atomic<int>& current() {
  static std::atomic<int> value{[] {
    const char* wanted = std::getenv("DBRXQ_ISA");
    if (wanted && *wanted) return find(wanted);
    int best = kLevels - 1;
    while (!cpu_has(best)) --best;
    return best;
  }()};
  return value;
}

}  // namespace

bool isa_usable() { return current().load() != kUnusable; }
Isa isa() {
  switch (current().load()) {
    case kAvx512: return Isa::avx512;
    case kAvx2:
    case kAvxVnni: return Isa::avx2;
    default: return Isa::scalar;
  }
}
bool isa_has_vnni() { return current().load() >= kAvxVnni; }

}  // namespace dbrxq

const char* dbrxq_isa(void) { return dbrxq::isa_usable() ? dbrxq::kNames[dbrxq::current().load()] : "unusable"; }

int dbrxq_set_isa(const char* name) {
  const int found = name ? dbrxq::find(name) : dbrxq::kUnusable;
  if (found == dbrxq::kUnusable) return DBRXQ_BAD_ISA;
  dbrxq::current().store(found);
  return DBRXQ_OK;
}

const char* dbrxq_status_text(int status) {
  switch (status) {
    case DBRXQ_OK: return "ok";
    case DBRXQ_BAD_SHAPE: return "a size is negative, not the multiple it must be, or two sizes disagree";
    case DBRXQ_BAD_GROUPS: return "q_groups is not a legal map of K rows in the word rows of q_weight";
    case DBRXQ_BAD_PERMUTATION: return "q_invperm does not name every row once";
    case DBRXQ_BAD_EXPERT: return "an expert index is below 0 or above the number of experts";
    case DBRXQ_BAD_ACTIVATION: return "no such activation";
    case DBRXQ_BAD_ISA:
      return "no such instruction set, or this CPU lacks it (scalar, avx2, avxvnni, avx512; see DBRXQ_ISA)";
    case DBRXQ_NO_MEMORY: return "out of memory";
    case DBRXQ_NOT_FINITE: return "a scale is infinite, NaN or so large that weights may be infinite";
    case DBRXQ_BAD_REPACKED: return "not a repacked linear";
    case DBRXQ_DAMAGED: return "a repacked linear in a file is damaged";
    default: return "unknown status";
  }
}
