#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "dbrxq.h"

namespace dbrxq {
namespace {

// A worker sleeps until the generation changes, takes tasks from the shared counter until there are none left,
// and reports itself idle. The caller works too, so `count - 1` threads are started.
class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { loop(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t tasks, const std::function<void(int64_t)>& body) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      tasks_ = tasks;
      next_.store(0);
      busy_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void take() {
    for (int64_t i = next_.fetch_add(1); i < tasks_; i = next_.fetch_add(1)) (*body_)(i);
  }

  void loop() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        if (stopping_) return;
        seen = generation_;
      }
      take();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (--busy_ == 0) done_.notify_one();
      }
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t tasks_ = 0;
  int busy_ = 0;
  uint64_t generation_ = 0;
  bool stopping_ = false;
};

std::mutex caller_mutex;  // one parallel_for at a time: callers from several Python threads take turns
std::unique_ptr<Pool> pool;
std::atomic<int> wanted{0};

}  // namespace

int threads() {
  const int set = wanted.load();
  if (set > 0) return set;
  const unsigned found = std::thread::hardware_concurrency();
  return found ? static_cast<int>(found) : 1;
}

void set_threads(int count) { wanted.store(count < 1 ? 1 : count); }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  const int count = threads();
  if (tasks <= 1 || count == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  std::lock_guard<std::mutex> lock(caller_mutex);
  if (!pool || pool->size() != count) pool = std::make_unique<Pool>(count);
  pool->run(tasks, body);
}

}  // namespace dbrxq

void dbrxq_set_threads(int count) { dbrxq::set_threads(count); }
int dbrxq_threads(void) { return dbrxq::threads(); }
