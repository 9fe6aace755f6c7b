// What the host code of the C ABI shares: pieces of a workspace, and statuses.
#pragma once
#include "dbrxq.h"

namespace dbrxq {

constexpr int kErrorBase = 1000;  // statuses above are 1000 + cudaError_t
inline int status_of(int error) { return error == 0 ? static_cast<int>(DBRXQ_OK) : kErrorBase + error; }

// Hands out pieces of the workspace, each aligned to 256 bytes.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

}  // namespace dbrxq
