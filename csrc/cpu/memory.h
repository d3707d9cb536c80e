// Working memory of the ops. Large blocks come back to a pool, so that a call does not pay the kernel for fresh pages
// each time; the pool keeps a limited number of bytes
// (moe.h: kept_memory, release_memory).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../moe.h"

namespace clipup {

// Lets the system back a large output that nobody has touched yet with huge pages, where it knows them: a fresh
// gradient of a hundred megabytes otherwise costs as many page faults as time to compute.
void expect_whole_write(void* block, std::int64_t bytes);

// `count` uninitialised elements, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t count)
      : elements_(count > 0 ? static_cast<T*>(acquire_memory(count * sizeof(T))) : nullptr) {}
  ~Buffer() { reset(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : elements_(other.elements_) { other.elements_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      reset();
      elements_ = other.elements_;
      other.elements_ = nullptr;
    }
    return *this;
  }

  T* get() const { return elements_; }

 private:
  void reset() {
    if (elements_ != nullptr) return_memory(elements_);
    elements_ = nullptr;
  }

  T* elements_ = nullptr;
};

}  // namespace clipup
