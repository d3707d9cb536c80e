// NEON, with or without dot products of bytes (simd.h).
#pragma once

#include <arm_neon.h>

#include "simd_128.h"

namespace clipup {
namespace {

// With dot products, 32 registers could hold more rows, but GCC loads many broadcasts early, and from 11 rows
// on it moves accumulators to memory.
#ifdef __ARM_FEATURE_DOTPROD
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

inline U8x lowest_bytes(U32x value) {
  const uint16x4_t halves = vmovn_u32(reinterpret_cast<uint32x4_t>(value));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  return load_as<U8x>(&bytes);
}

inline F32x multiply_add(F32x a, F32x b, F32x sum) {
  return reinterpret_cast<F32x>(vfmaq_f32(reinterpret_cast<float32x4_t>(sum),
                                          reinterpret_cast<float32x4_t>(a),
                                          reinterpret_cast<float32x4_t>(b)));
}

#ifdef __ARM_FEATURE_DOTPROD
inline F32x add_quads(F32x sum, std::uint32_t a, U32x b) {
  return reinterpret_cast<F32x>(vdotq_lane_s32(reinterpret_cast<int32x4_t>(sum),
                                               reinterpret_cast<int8x16_t>(b),
                                               vreinterpret_s8_u32(uint32x2_t{a}), 0));
}
#endif

}  // namespace
}  // namespace clipup
