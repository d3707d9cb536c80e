// AVX2 with FMA and F16C, with or without AVX-VNNI (simd.h).
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace clipup {
namespace {

// The accumulators, two vectors of a B panel and a broadcast fill the 16 registers.
constexpr int kLanes = 8, kTileRows = 6, kColumnTile = 4;
constexpr int kFewFloatTiles = 7, kFewHalfTiles = 0;
using F32x = float __attribute__((vector_size(kLanes * 4)));
using U32x = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using U16x = std::uint16_t __attribute__((vector_size(kLanes * 2)));
using U8x = std::uint8_t __attribute__((vector_size(kLanes)));

// The same bits as intrinsics on integers take them.
inline __m256i integers(F32x value) { return reinterpret_cast<__m256i>(value); }
inline __m256i integers(U32x value) { return reinterpret_cast<__m256i>(value); }
inline __m128i integers(U16x value) { return reinterpret_cast<__m128i>(value); }

inline void stream_as(void* to, F32x value) {
  _mm256_stream_si256(static_cast<__m256i*>(to), integers(value));
}
inline void stream_as(void* to, U16x value) { _mm_stream_si128(static_cast<__m128i*>(to), integers(value)); }
inline void streams_done() { _mm_sfence(); }

inline U32x widened(U16x value) { return reinterpret_cast<U32x>(_mm256_cvtepu16_epi32(integers(value))); }

// The lower halves of words that are below 65536, in the lower half of the result.
inline __m128i packed_halves(U32x value) {
  const __m256i words = integers(value);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline U16x lower_halves(U32x value) { return reinterpret_cast<U16x>(packed_halves(value & 0xFFFFU)); }

inline U8x lowest_bytes(U32x value) {
  const __m128i halves = packed_halves(value & 0xFFU), bytes = _mm_packus_epi16(halves, halves);
  return load_as<U8x>(&bytes);
}

inline F32x multiply_add(F32x a, F32x b, F32x sum) { return _mm256_fmadd_ps(a, b, sum); }

inline U32x interleave_low(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline U32x interleave_high(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline U32x unpack_low(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
inline U32x unpack_high(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
inline U32x unpack_low_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
inline U32x unpack_high_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }

inline __m128i low_half(U32x value) { return _mm256_castsi256_si128(integers(value)); }
inline __m128i high_half(U32x value) { return _mm256_extracti128_si256(integers(value), 1); }

inline U32x load_quads(const char* rows, std::int64_t stride) {
  const __m256i quad = _mm256_castsi128_si256(load_as<__m128i>(rows));
  return reinterpret_cast<U32x>(_mm256_inserti128_si256(quad, load_as<__m128i>(rows + 4 * stride), 1));
}

inline F32x float16_to_float(U16x half) { return _mm256_cvtph_ps(integers(half)); }
inline U16x float_to_float16(F32x value) {
  return reinterpret_cast<U16x>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

#ifdef __AVXVNNI__
constexpr std::uint32_t kInt8Offset = 128;

inline F32x add_quads(F32x sum, std::uint32_t a, U32x b) {
  return reinterpret_cast<F32x>(_mm256_dpbusd_avx_epi32(integers(sum), integers(U32x{} + a), integers(b)));
}
#else
constexpr std::uint32_t kInt8Offset = 0;

// The bytes in even and in odd places, widened to pairs of int16, whose products are summed in pairs.
inline F32x add_quads(F32x sum, std::uint32_t a, U32x b) {
  const auto odd = [](U32x v) { return _mm256_srai_epi16(integers(v), 8); };
  const auto even = [](U32x v) { return _mm256_srai_epi16(_mm256_slli_epi16(integers(v), 8), 8); };
  const U32x left = U32x{} + a;
  const __m256i products =
      _mm256_add_epi32(_mm256_madd_epi16(even(left), even(b)), _mm256_madd_epi16(odd(left), odd(b)));
  return reinterpret_cast<F32x>(_mm256_add_epi32(integers(sum), products));
}
#endif

}  // namespace
}  // namespace clipup
