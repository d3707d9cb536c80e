// Vectors (GNU vector extensions) of any width. Everything is in an unnamed namespace: every tier has its own
// copy, compiled with its own flags. For the same reason this includes no header that defines inline
// functions.
#pragma once

#include <cstdint>

namespace clipup {
namespace {

template <class V>
inline V load_as(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
inline void store_as(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// The elements of two vectors at these indices, b's after a's. In g++ 11 the builtin has another name.
#if __has_builtin(__builtin_shufflevector)
#define CLIPUP_SHUFFLE __builtin_shufflevector
#else
#define CLIPUP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, U32x{__VA_ARGS__})
#endif

}  // namespace
}  // namespace clipup
