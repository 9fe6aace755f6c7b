// The threads that share out a kernel's tasks.
#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "dbrxq.h"

namespace dbrxq {
namespace {

// How long a thread looks for work (or for the end of it) before it sleeps: decoding one token calls the pool every
// few tens of microseconds, and waking a thread takes as long as some of these calls.
constexpr std::chrono::microseconds kSpin{50};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether `condition` came true while looking at it for kSpin.
template <class Condition>
bool spin(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return condition();
}

// A worker waits until the generation changes, takes tasks from the shared counter until there are none left, and
// reports itself idle. The caller works too, so `count - 1` threads are started.
class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { loop(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t tasks, const std::function<void(int64_t)>& body) {
    bool sleepers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      tasks_ = tasks;
      next_.store(0);
      busy_.store(static_cast<int>(workers_.size()));
      generation_.fetch_add(1);  // publishes all of the above to workers that spin
      sleepers = sleeping_ > 0;
    }
    if (sleepers) wake_.notify_all();
    take();
    if (spin([this] { return busy_.load() == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_.load() == 0; });
  }

 private:
  void take() {
    for (int64_t i = next_.fetch_add(1); i < tasks_; i = next_.fetch_add(1)) (*body_)(i);
  }

  void loop() {
    uint64_t seen = 0;
    const auto ready = [&] { return stopping_.load() || generation_.load() != seen; };
    for (;;) {
      if (!spin(ready)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, ready);
        --sleeping_;
      }
      if (stopping_.load()) return;
      seen = generation_.load();
      take();
      if (busy_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);  // so that the caller is either not yet or already waiting
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> stopping_{false};
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t tasks_ = 0;
  int sleeping_ = 0;
};

// What callers share: one parallel_for at a time, those from several Python threads take turns.
struct Shared {
  std::mutex mutex;
  std::unique_ptr<Pool> pool;
};

// Never destroyed. A forked child has none of its parent's threads, and whoever held the mutex may not be in it:
// so the child lets go of both and begins anew.
std::atomic<Shared*> shared{new Shared};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { shared.store(new Shared); });

std::atomic<int> wanted{0};

}  // namespace

int threads() {
  const int set = wanted.load();
  if (set > 0) return set;
  static const unsigned found = std::thread::hardware_concurrency();
  return found ? static_cast<int>(found) : 1;
}

void set_threads(int count) { wanted.store(count < 1 ? 1 : count); }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  const int count = threads();
  if (tasks <= 1 || count == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  Shared& all = *shared.load();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (!all.pool || all.pool->size() != count) all.pool = std::make_unique<Pool>(count);
  all.pool->run(tasks, body);
}

}  // namespace dbrxq

void dbrxq_set_threads(int count) { dbrxq::set_threads(count); }
int dbrxq_threads(void) { return dbrxq::threads(); }
