// Arrays of a storage type that is chosen at run time, in memory of exactly their size, and what they should
// hold.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../cpu/element.h"
#include "../moe.h"
#include "tests.h"

namespace clipup::tests {

constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16"};

// Full of NaN until something is stored. `shift` elements after a 64-byte boundary.
class Array {
 public:
  Array() = default;  // null
  Array(DType dtype, std::int64_t size, std::int64_t shift = 0)
      : dtype_(dtype), size_(size), shift_(shift), memory_(allocate(bytes() + shift * element_size())) {
    poison();
  }

  void* data() { return memory_ == nullptr ? nullptr : memory_.get() + shift_ * element_size(); }
  const void* data() const { return const_cast<Array*>(this)->data(); }
  std::int64_t size() const { return size_; }
  DType dtype() const { return dtype_; }

  void poison() {
    if (bytes() > 0) std::memset(data(), 0xFF, bytes());  // a NaN in every storage type
  }
  bool untouched() const {
    const auto* const first = static_cast<const unsigned char*>(data());
    for (std::int64_t i = 0; i < bytes(); ++i) {
      if (first[i] != 0xFF) return false;
    }
    return true;
  }

  double at(std::int64_t i) const {
    if (dtype_ == DType::kFloat32) return static_cast<const float*>(data())[i];
    const std::uint16_t stored = static_cast<const std::uint16_t*>(data())[i];
    return dtype_ == DType::kBFloat16 ? BFloat16::load(stored) : Float16::load(stored);
  }
  void set(std::int64_t i, float value) {
    if (dtype_ == DType::kFloat32) {
      static_cast<float*>(data())[i] = value;
    } else {
      static_cast<std::uint16_t*>(data())[i] =
          dtype_ == DType::kBFloat16 ? BFloat16::store(value) : Float16::store(value);
    }
  }
  void fill_normal(float deviation) {
    for (std::int64_t i = 0; i < size_; ++i) set(i, normal() * deviation);
  }
  std::vector<double> values() const {
    std::vector<double> all(size_);
    for (std::int64_t i = 0; i < size_; ++i) all[i] = at(i);
    return all;
  }

  bool same_bits(const Array& other) const {
    return size_ == other.size_ && (bytes() == 0 || std::memcmp(data(), other.data(), bytes()) == 0);
  }

 private:
  struct Release {
    void operator()(unsigned char* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  using Memory = std::unique_ptr<unsigned char, Release>;

  static Memory allocate(std::int64_t bytes) {
    return Memory(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(64))));
  }
  std::int64_t element_size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  std::int64_t bytes() const { return size_ * element_size(); }

  DType dtype_ = DType::kFloat32;
  std::int64_t size_ = 0, shift_ = 0;
  Memory memory_;
};

// What an array should hold, and how far the sum that is stored there may be off.
struct Expected {
  explicit Expected(std::int64_t size = 0) : value(size, 0.0), error(size, 0.0) {}
  std::vector<double> value, error;
};

// A float sum's error, relative to the sum of its terms' magnitudes.
constexpr double kSum = 1e-6;
// A sum of products of numbers that may be off.
struct Sum {
  double value = 0.0, size = 0.0, inherited = 0.0;

  void add(double left, double right, double right_error = 0.0) {
    value += left * right;
    size += std::abs(left * right);
    inherited += std::abs(left) * right_error;
  }
  void add_uncertain(double left, double left_error, double right, double right_error) {
    add(left, right, right_error);
    inherited += std::abs(right) * left_error + left_error * right_error;
  }
  double error() const { return inherited + kSum * size; }
  void into(Expected& expected, std::int64_t i) const {
    expected.value[i] = value;
    expected.error[i] = error();
  }
};

// Every element within its error and one rounding to the storage type.
void expect_close(const char* name, const Array& array, const Expected& expected, const char* file, int line);
#define EXPECT_CLOSE(array, expected) \
  ::clipup::tests::expect_close(#array, (array), (expected), __FILE__, __LINE__)

}  // namespace clipup::tests
