// Vectors of four words without intrinsics, for simd_portable.h and simd_neon.h.
#pragma once

#include "vectors.h"

namespace clipup {
namespace {

constexpr int kLanes = 4, kColumnTile = 4;
constexpr int kFewFloatTiles = 0, kFewHalfTiles = 0;
constexpr std::uint32_t kInt8Offset = 0;
using F32x = float __attribute__((vector_size(kLanes * 4)));
using U32x = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using U16x = std::uint16_t __attribute__((vector_size(kLanes * 2)));
using U8x = std::uint8_t __attribute__((vector_size(kLanes)));

inline void stream_as(void* to, F32x value) { store_as(to, value); }
inline void stream_as(void* to, U16x value) { store_as(to, value); }
inline void streams_done() {}

inline U32x widened(U16x value) { return __builtin_convertvector(value, U32x); }
inline U16x lower_halves(U32x value) { return __builtin_convertvector(value, U16x); }

inline U32x interleave_low(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 4, 1, 5); }
inline U32x interleave_high(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 6, 3, 7); }
inline U32x unpack_low(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 4, 1, 5); }
inline U32x unpack_high(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 6, 3, 7); }
inline U32x unpack_low_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 1, 4, 5); }
inline U32x unpack_high_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 3, 6, 7); }

inline U32x load_quads(const char* rows, std::int64_t) { return load_as<U32x>(rows); }

inline F32x float16_to_float(U16x half) {
  const U32x value = widened(half);
  const U32x magnitude = value & 0x7FFFU;
  const U32x sign = (value & 0x8000U) << 16;
  const U32x infinite = magnitude >= 0x7C00U ? U32x{} + (112U << 23) : U32x{};
  const U32x normal = (magnitude << 13) + (112U << 23) + infinite;
  const F32x subnormal = reinterpret_cast<F32x>(0x3F000000U | magnitude) - 0.5F;
  return reinterpret_cast<F32x>(sign | (magnitude < 0x400U ? reinterpret_cast<U32x>(subnormal) : normal));
}

inline U16x float_to_float16(F32x value) {
  const U32x b = reinterpret_cast<U32x>(value);
  const U32x magnitude = b & 0x7FFFFFFFU;
  const U32x normal = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  const U32x subnormal = reinterpret_cast<U32x>(reinterpret_cast<F32x>(magnitude) + 0.5F) - 0x3F000000U;
  const U32x nan = 0x7E00U | ((magnitude >> 13) & 0x3FFU);
  const U32x special = magnitude > 0x7F800000U ? nan : U32x{} + 0x7C00U;
  const U32x finite = magnitude < 0x38800000U ? subnormal : normal;
  const U32x result = magnitude >= 0x47800000U ? special : finite;
  return lower_halves(result | ((b >> 16) & 0x8000U));
}

}  // namespace
}  // namespace clipup
