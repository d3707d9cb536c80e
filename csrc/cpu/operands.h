// Storage types of elements, the types they are multiplied in, and their positions in packed operands
// (kernels.h).
#pragma once

#include "kernels.h"
#include "simd.h"

namespace clipup {
namespace {

constexpr int kPanel = 2 * kLanes;
// Rows of an A panel of more than one element in a word.
#ifdef CLIPUP_TILES
constexpr int kMatrixRows = 32;
#else
constexpr int kMatrixRows = kTileRows;
#endif
static_assert(kTileRows <= kMostTileRows && kTileRows % 2 == 0 && kLineWords % kLanes == 0 &&
              (kColumnTile == kLanes || 2 * kColumnTile == kLanes));

// A null array stays null.
template <class T>
inline T* from(T* array, std::int64_t index) {
  return array == nullptr ? nullptr : array + index;
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------- storage types

struct Float32 {
  using Element = float;
  static F32x load(const Element* from) { return load_as<F32x>(from); }
  static void store(Element* to, F32x value) { store_as(to, value); }
  static void stream(Element* to, F32x value) { stream_as(to, value); }
  static F32x rounded(F32x value) { return value; }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static F32x load(const Element* from) { return bfloat16_to_float(load_as<U16x>(from)); }
  static void store(Element* to, F32x value) { store_as(to, float_to_bfloat16(value)); }
  static void stream(Element* to, F32x value) { stream_as(to, float_to_bfloat16(value)); }
  static F32x rounded(F32x value) { return bfloat16_to_float(float_to_bfloat16(value)); }
};

struct Float16 {
  using Element = std::uint16_t;
  static F32x load(const Element* from) { return float16_to_float(load_as<U16x>(from)); }
  static void store(Element* to, F32x value) { store_as(to, float_to_float16(value)); }
  static void stream(Element* to, F32x value) { stream_as(to, float_to_float16(value)); }
  static F32x rounded(F32x value) { return float16_to_float(float_to_float16(value)); }
};

// The first `count` elements, then zeros; count may be negative or larger than the vector.
template <class Storage>
inline F32x load_some(const typename Storage::Element* from, std::int64_t count) {
  if (count >= kLanes) return Storage::load(from);
  typename Storage::Element elements[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) elements[i] = from[i];
  return Storage::load(elements);
}

template <class Storage>
inline void store_some(typename Storage::Element* to, F32x value, std::int64_t count) {
  if (count >= kLanes) return Storage::store(to, value);
  typename Storage::Element elements[kLanes];
  Storage::store(elements, value);
  for (std::int64_t i = 0; i < count; ++i) to[i] = elements[i];
}

// ---------------------------------------------------------------- operands: floats, or pairs of bfloat16

struct Floats {
  static constexpr int kPerWord = 1;
  static constexpr int kRows = kTileRows;
  template <class Storage>
  static constexpr bool kSameBits = sizeof(typename Storage::Element) == 4;

  static F32x multiply_add(F32x sum, Word a, U32x b) {
    float value;
    __builtin_memcpy(&value, &a, sizeof value);
    return sum + value * from_bits(b);
  }
  // kLanes neighbours of the summed axis, from word `to` on.
  static void store_along(Word* to, F32x value) { store_as(to, value); }
  static F32x load_along(const Word* from) { return load_as<F32x>(from); }
  // One word each: the summed axis runs across `rows`.
  static U32x across(const F32x* rows) { return bits(rows[0]); }
  // The same for elements whose storage type is the operand type.
  static U32x bits_across(const void* row, const void*) {
    return row == nullptr ? U32x{} : load_as<U32x>(row);
  }
  static F32x sum(U32x words) { return from_bits(words); }
};

#ifdef CLIPUP_BFLOAT16_PAIRS
struct BFloat16Pairs {
  static constexpr int kPerWord = 2;
  static constexpr int kRows = kMatrixRows;
  template <class Storage>
  static constexpr bool kSameBits = true;  // only bfloat16 is stored like this

  static F32x multiply_add(F32x sum, Word a, U32x b) { return add_pairs(sum, a, b); }
  static void store_along(Word* to, F32x value) { store_as(to, float_to_bfloat16(value)); }
  static F32x load_along(const Word* from) { return bfloat16_to_float(load_as<U16x>(from)); }
  // The pairs of two rows: their bfloat16 in turn.
  static U32x across(const F32x* rows) { return bfloat16_pairs(rows[0], rows[1]); }
  static U32x bits_across(const void* row, const void* next) {
    const U32x low = row == nullptr ? U32x{} : widened(load_as<U16x>(row));
    const U32x high = next == nullptr ? U32x{} : widened(load_as<U16x>(next));
    return low | high << 16;
  }
  static F32x sum(U32x words) { return from_bits(words << 16) + from_bits(words & 0xFFFF0000U); }
};
using BFloat16Operand = BFloat16Pairs;
#else
using BFloat16Operand = Floats;
#endif

// Address of kLanes neighbours, from element `e` of the first row on, in an A panel of `rows` rows; those of
// row i are i * kLineWords further. e is a multiple of kLanes.
template <class Operand, class W>
inline W* in_a_panel(W* a_panel, std::int64_t rows, std::int64_t e) {
  const std::int64_t word = e / Operand::kPerWord;
  return from(a_panel, word / kLineWords * rows * kLineWords + word % kLineWords);
}

// Stores words of kLanes neighbouring columns into column A panels, `panel_stride` words apart.
template <class V>
inline void store_columns(Word* to, std::int64_t panel_stride, std::int64_t columns, V words) {
  if constexpr (kColumnTile == kLanes) {
    store_as(to, words);
  } else {
    store_as(to, low_half(words));
    if (columns > kColumnTile) store_as(to + panel_stride, high_half(words));
  }
}

}  // namespace
}  // namespace clipup
