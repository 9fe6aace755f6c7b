// One process-wide pool of threads. `parallel_for(tasks, body)` runs body(0) … body(tasks - 1), each once, in no
// particular order, and returns when all are done. Callers that need results independent of the number of
// threads reduce per-task partial results in task order afterwards.
#pragma once
#include <cstdint>
#include <functional>

namespace dbrxq {

int threads();
void set_threads(int count);  // 1 or more; takes effect at the next parallel_for
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body);

}  // namespace dbrxq
