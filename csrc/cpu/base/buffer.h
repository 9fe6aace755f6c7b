// Uninitialised, 64-byte aligned scratch memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace dbrxq {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) { reserve(count); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Room for `count` elements; what was there is lost when it must grow. Throws std::bad_alloc.
  T* reserve(int64_t count) {
    if (count <= count_) return data_;
    std::free(data_);
    count_ = 0;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    count_ = count;
    return data_;
  }

  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Memory of the calling thread that outlives the call, so that a task costs no allocation. Throws std::bad_alloc.
inline float* thread_scratch(int64_t count) {
  thread_local Buffer<float> buffer;
  return buffer.reserve(count);
}

}  // namespace dbrxq
