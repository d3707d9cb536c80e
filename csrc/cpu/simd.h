// Vectors of floats (GNU vector extensions), as wide as the instructions of the including file's tier.
// Everything is in an unnamed namespace: every tier has its own copy, compiled with its own flags. For the
// same reason this includes no header that defines inline functions.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace clipup {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using F32x = float __attribute__((vector_size(kLanes * 4)));
using U32x = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using U32half = std::uint32_t __attribute__((vector_size(kLanes * 2)));
using U16x = std::uint16_t __attribute__((vector_size(kLanes * 2)));
using U8x = std::uint8_t __attribute__((vector_size(kLanes)));

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

// Streaming store: bypasses the caches, so that a line that is written whole is not read first. `to` is
// aligned.
template <class V>
inline void stream_as(void* to, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
  if constexpr (sizeof(V) == 16)
    return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
#endif
  store_as(to, value);
}

inline void streams_done() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Conversions between widths that GCC 12 splits in pieces, down to one integer register for every byte, if it
// is left to find the instruction.
inline U32x widened(U16x value) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32x>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32x>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(value)));
#else
  return __builtin_convertvector(value, U32x);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The lower halves of words that are below 65536, in the lower half of the result.
inline __m128i packed_halves(U32x value) {
  const __m256i words = reinterpret_cast<__m256i>(value);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#endif

inline U16x lower_halves(U32x value) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16x>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<U16x>(packed_halves(value & 0xFFFFU));
#else
  return __builtin_convertvector(value, U16x);
#endif
}

inline U8x lowest_bytes(U32x value) {
#if defined(__AVX512F__)
  return reinterpret_cast<U8x>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(value)));
#elif defined(__AVX2__)
  const __m128i halves = packed_halves(value & 0xFFU), bytes = _mm_packus_epi16(halves, halves);
  return load_as<U8x>(&bytes);
#elif defined(__ARM_NEON)
  const uint16x4_t halves = vmovn_u32(reinterpret_cast<uint32x4_t>(value));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  return load_as<U8x>(&bytes);
#else
  return __builtin_convertvector(value, U8x);
#endif
}

#ifdef __AVX512VBMI__
// Those of four vectors, one after another.
inline U32x lowest_bytes(U32x a, U32x b, U32x c, U32x d) {
  alignas(64) static constexpr std::uint8_t kEveryFourth[64] = {
      0,  4,  8,  12, 16, 20, 24, 28, 32, 36,  40,  44,  48,  52,  56,  60,
      64, 68, 72, 76, 80, 84, 88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
  const __m512i every_fourth = load_as<__m512i>(kEveryFourth);
  const auto pair = [&](U32x low, U32x high) {
    return _mm512_permutex2var_epi8(reinterpret_cast<__m512i>(low), every_fourth,
                                    reinterpret_cast<__m512i>(high));
  };
  return reinterpret_cast<U32x>(_mm512_inserti64x4(pair(a, b), _mm512_castsi512_si256(pair(c, d)), 1));
}
#endif

inline F32x splat(float value) { return F32x{} + value; }
inline U32x bits(F32x value) { return reinterpret_cast<U32x>(value); }
inline F32x from_bits(U32x value) { return reinterpret_cast<F32x>(value); }

// a * b + sum, fused where the tier can: a compiler that may fuse could decide differently for the same sum
// in two loops.
inline F32x multiply_add(F32x a, F32x b, F32x sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32x>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                reinterpret_cast<__m512>(sum)));
#elif defined(__AVX2__)
  return reinterpret_cast<F32x>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                reinterpret_cast<__m256>(sum)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<F32x>(vfmaq_f32(reinterpret_cast<float32x4_t>(sum),
                                          reinterpret_cast<float32x4_t>(a),
                                          reinterpret_cast<float32x4_t>(b)));
#else
  return sum + a * b;
#endif
}

// 1 / value, to a unit in the last place, for finite values of usual size.
inline F32x inverse(F32x value) {
#if defined(__AVX512F__)
  const F32x estimate = reinterpret_cast<F32x>(_mm512_rcp14_ps(reinterpret_cast<__m512>(value)));
  return estimate + estimate * (1.0F - value * estimate);
#else
  return 1.0F / value;
#endif
}

// 1 / value to 1e-4, for finite values of usual size.
inline F32x coarse_inverse(F32x value) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32x>(_mm512_rcp14_ps(reinterpret_cast<__m512>(value)));
#else
  return 1.0F / value;
#endif
}

// The elements of two vectors at these indices, b's after a's. In g++ 11 the builtin has another name.
#if __has_builtin(__builtin_shufflevector)
#define CLIPUP_SHUFFLE __builtin_shufflevector
#else
#define CLIPUP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, U32x{__VA_ARGS__})
#endif

// The lower (upper) halves of two vectors, element by element in turn.
inline U32x interleave_low(U32x a, U32x b) {
#if defined(__AVX512F__)
  return CLIPUP_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return CLIPUP_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return CLIPUP_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

inline U32x interleave_high(U32x a, U32x b) {
#if defined(__AVX512F__)
  return CLIPUP_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return CLIPUP_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return CLIPUP_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// The same within every sixteen bytes, by words and by pairs of words.
#if defined(__AVX512F__)
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
#elif defined(__AVX2__)
inline U32x unpack_low(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
inline U32x unpack_high(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
inline U32x unpack_low_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
inline U32x unpack_high_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
#else
inline U32x unpack_low(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 4, 1, 5); }
inline U32x unpack_high(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 6, 3, 7); }
inline U32x unpack_low_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 0, 1, 4, 5); }
inline U32x unpack_high_pairs(U32x a, U32x b) { return CLIPUP_SHUFFLE(a, b, 2, 3, 6, 7); }
#endif

#if __has_builtin(__builtin_shufflevector)
inline U32half low_half(U32x value) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(value, value, 0, 1, 2, 3);
#else
  return __builtin_shufflevector(value, value, 0, 1);
#endif
}

inline U32half high_half(U32x value) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(value, value, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(value, value, 2, 3);
#endif
}
#else  // g++ 11, which keeps the copies in registers
inline U32half low_half(U32x value) {
  U32half half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}

inline U32half high_half(U32x value) {
  U32half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&value) + sizeof half, sizeof half);
  return half;
}
#endif

// A square of words, transposed: interleaving row i with row i + half, log2(rows) times.
inline void transpose(U32x (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    U32x next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Four words each of kLanes rows that lie `stride` bytes apart, transposed: columns[k] holds word k of every
// row. Rows are combined in 16-byte pieces while loading, which leaves two steps of shuffles.
inline void load_columns(const void* rows, std::int64_t stride, U32x (&columns)[4]) {
  const auto* const first = static_cast<const char*>(rows);
  U32x quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const char* const row = first + i * stride;
#if defined(__AVX512F__)
    __m512i quad = _mm512_castsi128_si512(load_as<__m128i>(row));
    quad = _mm512_inserti32x4(quad, load_as<__m128i>(row + 4 * stride), 1);
    quad = _mm512_inserti32x4(quad, load_as<__m128i>(row + 8 * stride), 2);
    quads[i] = reinterpret_cast<U32x>(_mm512_inserti32x4(quad, load_as<__m128i>(row + 12 * stride), 3));
#elif defined(__AVX2__)
    const __m256i quad = _mm256_castsi128_si256(load_as<__m128i>(row));
    quads[i] = reinterpret_cast<U32x>(_mm256_inserti128_si256(quad, load_as<__m128i>(row + 4 * stride), 1));
#else
    quads[i] = load_as<U32x>(row);
#endif
  }
  const U32x low = unpack_low(quads[0], quads[1]), low_next = unpack_low(quads[2], quads[3]);
  const U32x high = unpack_high(quads[0], quads[1]), high_next = unpack_high(quads[2], quads[3]);
  columns[0] = unpack_low_pairs(low, low_next);
  columns[1] = unpack_high_pairs(low, low_next);
  columns[2] = unpack_low_pairs(high, high_next);
  columns[3] = unpack_high_pairs(high, high_next);
}

inline std::uint32_t largest_of(U32x value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32(reinterpret_cast<__m512i>(value));
#else
  std::uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
#endif
}

// NaN is passed over.
inline float largest_of(F32x value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(value));
#else
  float largest = -__builtin_inff();
  for (int i = 0; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
#endif
}

// Each half added to the other, until one is left.
inline float sum_of(F32x value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
#else
  float lanes[kLanes];
  store_as(lanes, value);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
#endif
}

// Rounded to nearest, ties to even; a NaN stays one. (The instruction takes subnormals for zero.)
inline U16x float_to_bfloat16(F32x value) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<U16x>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
#else
  const U32x b = bits(value);
  const U32x rounded = b + 0x7FFFU + ((b >> 16) & 1U);
  const U32x quiet = b | 0x400000U;
  return lower_halves(((b & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded) >> 16);
#endif
}

inline F32x bfloat16_to_float(U16x value) { return from_bits(widened(value) << 16); }

// IEEE binary16, as in element.h: rounds to nearest, ties to even, beyond 65504 to infinity.
inline F32x float16_to_float(U16x half) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32x>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(half)));
#elif defined(__F16C__)
  return reinterpret_cast<F32x>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(half)));
#else
  const U32x value = __builtin_convertvector(half, U32x);
  const U32x magnitude = value & 0x7FFFU;
  const U32x sign = (value & 0x8000U) << 16;
  const U32x infinite = magnitude >= 0x7C00U ? U32x{} + (112U << 23) : U32x{};
  const U32x normal = (magnitude << 13) + (112U << 23) + infinite;
  const U32x subnormal = bits(from_bits(0x3F000000U | magnitude) - 0.5F);
  return from_bits(sign | (magnitude < 0x400U ? subnormal : normal));
#endif
}

inline U16x float_to_float16(F32x value) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16x>(_mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<U16x>(_mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const U32x b = bits(value);
  const U32x magnitude = b & 0x7FFFFFFFU;
  const U32x normal = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  const U32x subnormal = bits(from_bits(magnitude) + 0.5F) - 0x3F000000U;
  const U32x nan = 0x7E00U | ((magnitude >> 13) & 0x3FFU);
  const U32x special = magnitude > 0x7F800000U ? nan : U32x{} + 0x7C00U;
  const U32x finite = magnitude < 0x38800000U ? subnormal : normal;
  const U32x result = magnitude >= 0x47800000U ? special : finite;
  return __builtin_convertvector(result | ((b >> 16) & 0x8000U), U16x);
#endif
}

}  // namespace
}  // namespace clipup
