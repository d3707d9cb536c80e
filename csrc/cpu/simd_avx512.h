// AVX-512 F, BW, VL and DQ, with or without VNNI, BF16, VBMI and AMX (simd.h).
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace clipup {
namespace {

// The accumulators, two vectors of a B panel and a broadcast fill the 32 registers.
constexpr int kLanes = 16, kTileRows = 14, kColumnTile = 8;
constexpr int kFewFloatTiles = 7, kFewHalfTiles = 3;
using F32x = float __attribute__((vector_size(kLanes * 4)));
using U32x = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using U16x = std::uint16_t __attribute__((vector_size(kLanes * 2)));
using U8x = std::uint8_t __attribute__((vector_size(kLanes)));

// The same bits as intrinsics on integers take them.
inline __m512i integers(F32x value) { return reinterpret_cast<__m512i>(value); }
inline __m512i integers(U32x value) { return reinterpret_cast<__m512i>(value); }
inline __m256i integers(U16x value) { return reinterpret_cast<__m256i>(value); }

inline void stream_as(void* to, F32x value) {
  _mm512_stream_si512(static_cast<__m512i*>(to), integers(value));
}
inline void stream_as(void* to, U16x value) {
  _mm256_stream_si256(static_cast<__m256i*>(to), integers(value));
}
inline void streams_done() { _mm_sfence(); }

inline U32x widened(U16x value) { return reinterpret_cast<U32x>(_mm512_cvtepu16_epi32(integers(value))); }
inline U16x lower_halves(U32x value) {
  return reinterpret_cast<U16x>(_mm512_cvtepi32_epi16(integers(value)));
}
inline U8x lowest_bytes(U32x value) { return reinterpret_cast<U8x>(_mm512_cvtepi32_epi8(integers(value))); }

#ifdef __AVX512VBMI__
#define CLIPUP_LOWEST_BYTES_OF_FOUR
// Those of four vectors, one after another.
inline U32x lowest_bytes(U32x a, U32x b, U32x c, U32x d) {
  alignas(64) static constexpr std::uint8_t kEveryFourth[64] = {
      0,  4,  8,  12, 16, 20, 24, 28, 32, 36,  40,  44,  48,  52,  56,  60,
      64, 68, 72, 76, 80, 84, 88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
  const __m512i every_fourth = load_as<__m512i>(kEveryFourth);
  const auto pair = [&](U32x low, U32x high) {
    return _mm512_permutex2var_epi8(integers(low), every_fourth, integers(high));
  };
  return reinterpret_cast<U32x>(_mm512_inserti64x4(pair(a, b), _mm512_castsi512_si256(pair(c, d)), 1));
}
#endif

inline F32x multiply_add(F32x a, F32x b, F32x sum) { return _mm512_fmadd_ps(a, b, sum); }

inline F32x coarse_inverse(F32x value) { return _mm512_rcp14_ps(value); }
inline F32x inverse(F32x value) {
  const F32x estimate = coarse_inverse(value);
  return estimate + estimate * (1.0F - value * estimate);
}

inline F32x integer_part(F32x x, F32x& fraction) {
  const F32x whole = _mm512_roundscale_ps(x, 0);
  fraction = x - whole;
  return whole;
}
inline F32x times_power_of_two(F32x value, F32x whole, F32x) { return _mm512_scalef_ps(value, whole); }

inline U32x interleave_low(U32x a, U32x b) {
  return CLIPUP_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline U32x interleave_high(U32x a, U32x b) {
  return CLIPUP_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline U32x unpack_low(U32x a, U32x b) {
  return CLIPUP_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
inline U32x unpack_high(U32x a, U32x b) {
  return CLIPUP_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
inline U32x unpack_low_pairs(U32x a, U32x b) {
  return CLIPUP_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
inline U32x unpack_high_pairs(U32x a, U32x b) {
  return CLIPUP_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

inline __m256i low_half(U32x value) { return _mm512_castsi512_si256(integers(value)); }
inline __m256i high_half(U32x value) { return _mm512_extracti64x4_epi64(integers(value), 1); }

inline U32x load_quads(const char* rows, std::int64_t stride) {
  __m512i quad = _mm512_castsi128_si512(load_as<__m128i>(rows));
  quad = _mm512_inserti32x4(quad, load_as<__m128i>(rows + 4 * stride), 1);
  quad = _mm512_inserti32x4(quad, load_as<__m128i>(rows + 8 * stride), 2);
  return reinterpret_cast<U32x>(_mm512_inserti32x4(quad, load_as<__m128i>(rows + 12 * stride), 3));
}

inline std::uint32_t largest_of(U32x value) { return _mm512_reduce_max_epu32(integers(value)); }
inline float largest_of(F32x value) { return _mm512_reduce_max_ps(value); }
inline float sum_of(F32x value) { return _mm512_reduce_add_ps(value); }

inline F32x float16_to_float(U16x half) { return _mm512_cvtph_ps(integers(half)); }
inline U16x float_to_float16(F32x value) {
  return reinterpret_cast<U16x>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

#ifdef __AVX512BF16__
#define CLIPUP_BFLOAT16_PAIRS
// The instruction takes subnormals for zero.
inline U16x float_to_bfloat16(F32x value) { return reinterpret_cast<U16x>(_mm512_cvtneps_pbh(value)); }

// sum + the products of the pair of bfloat16 a and every pair of b.
inline F32x add_pairs(F32x sum, std::uint32_t a, U32x b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(U32x{} + a), reinterpret_cast<__m512bh>(b));
}

// The elements of two vectors in turn, as bfloat16.
inline U32x bfloat16_pairs(F32x first, F32x second) {
  using U16x32 = std::uint16_t __attribute__((vector_size(64)));
  const auto pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const U16x32 order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<U32x>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), pairs));
}
#endif

#ifdef __AMX_TILE__
#define CLIPUP_TILES
constexpr std::uint32_t kInt8Offset = 0;
#elif defined(__AVX512VNNI__)
constexpr std::uint32_t kInt8Offset = 128;

inline F32x add_quads(F32x sum, std::uint32_t a, U32x b) {
  return reinterpret_cast<F32x>(_mm512_dpbusd_epi32(integers(sum), integers(U32x{} + a), integers(b)));
}
#else
constexpr std::uint32_t kInt8Offset = 0;

// The bytes in even and in odd places, widened to pairs of int16, whose products are summed in pairs.
inline F32x add_quads(F32x sum, std::uint32_t a, U32x b) {
  const auto odd = [](U32x v) { return _mm512_srai_epi16(integers(v), 8); };
  const auto even = [](U32x v) { return _mm512_srai_epi16(_mm512_slli_epi16(integers(v), 8), 8); };
  const U32x left = U32x{} + a;
  const __m512i products =
      _mm512_add_epi32(_mm512_madd_epi16(even(left), even(b)), _mm512_madd_epi16(odd(left), odd(b)));
  return reinterpret_cast<F32x>(_mm512_add_epi32(integers(sum), products));
}
#endif

}  // namespace
}  // namespace clipup
