// Keeps exceptions inside the library: of a whole call, and of the tasks of a parallel loop.
#pragma once
#include <atomic>
#include <new>

#include "dbrxq.h"
#include "parallel.h"

namespace dbrxq {

template <class Body>
int guarded(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return DBRXQ_NO_MEMORY;
  }
}

// parallel_for whose tasks may run out of memory; then the others finish and the caller gets std::bad_alloc.
template <class Body>
void parallel_tasks(int64_t tasks, Body&& body) {
  std::atomic<bool> failed{false};
  parallel_for(tasks, [&](int64_t task) {
    try {
      body(task);
    } catch (const std::bad_alloc&) {
      failed.store(true);
    }
  });
  if (failed.load()) throw std::bad_alloc();
}

}  // namespace dbrxq
