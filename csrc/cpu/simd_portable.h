// The compiler's baseline (simd.h).
#pragma once

#include "simd_128.h"

namespace clipup {
namespace {

constexpr int kTileRows = 4;

inline U8x lowest_bytes(U32x value) { return __builtin_convertvector(value, U8x); }
inline F32x multiply_add(F32x a, F32x b, F32x sum) { return sum + a * b; }

}  // namespace
}  // namespace clipup
