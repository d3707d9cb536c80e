// Working memory of the ops. Blocks return to a pool, so that a call does not pay for page faults each time;
// the pool keeps a limited number of bytes (moe.h: kept_memory, release_memory).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../moe.h"

namespace clipup {

// Asks the system for huge pages behind a large output that is still untouched: otherwise page faults of a
// fresh gradient of a hundred megabytes take as long as computing it.
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
