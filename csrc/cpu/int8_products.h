// Int8 products: quantizing rows into operands, multiplying words of four int8, and scaling the sums.
//
// A row x of the left operand becomes q = round(x * 127 / max|x|), scale = max|x| / 127; weights are
// quantized in the same way by output channel (packed_weights.cpp). Sums of products are exact in 32-bit
// integers, so they depend neither on their order nor on the tier.
#pragma once

#include "operands.h"

namespace clipup {
namespace {

using I32x = std::int32_t __attribute__((vector_size(kLanes * 4)));

// Words of four int8, summed in 32-bit integers, which travel as the bits of floats: multiply() only adds and
// stores them.
struct Int8Quads {
  static constexpr int kPerWord = 4;

#ifdef __AMX_INT8__
  static constexpr int kRows = kMatrixRows;
  static constexpr std::uint32_t kOffset = 0;

  template <bool kTwo>
  static void multiply_tiles() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kTwo) {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
#else
  static constexpr int kRows = kTileRows;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  // The instruction multiplies unsigned by signed: left operands are stored with this much added to each, and
  // 128 times the sum of a column of the right operand is subtracted afterwards.
  static constexpr std::uint32_t kOffset = 128;

  static F32x multiply_add(F32x sum, Word a, U32x b) {
#ifdef __AVX512VNNI__
    return reinterpret_cast<F32x>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(U32x{} + a), reinterpret_cast<__m512i>(b)));
#else
    return reinterpret_cast<F32x>(_mm256_dpbusd_avx_epi32(
        reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(U32x{} + a), reinterpret_cast<__m256i>(b)));
#endif
  }
#else
  static constexpr std::uint32_t kOffset = 0;

#ifdef __ARM_FEATURE_DOTPROD
  static F32x multiply_add(F32x sum, Word a, U32x b) {
    return reinterpret_cast<F32x>(vdotq_lane_s32(reinterpret_cast<int32x4_t>(sum),
                                                 reinterpret_cast<int8x16_t>(b),
                                                 vreinterpret_s8_u32(uint32x2_t{a}), 0));
  }
#else
  // The bytes in even and in odd places, widened to pairs of int16, whose products are summed in pairs.
  static F32x multiply_add(F32x sum, Word a, U32x b) {
    const I32x words = reinterpret_cast<I32x>(U32x{} + a);
#if defined(__AVX512BW__)
    const auto pairs = [](I32x left, U32x right) {
      return reinterpret_cast<I32x>(
          _mm512_madd_epi16(reinterpret_cast<__m512i>(left), reinterpret_cast<__m512i>(right)));
    };
    const auto odd = [](auto v) { return _mm512_srai_epi16(reinterpret_cast<__m512i>(v), 8); };
    const auto even = [](auto v) {
      return _mm512_srai_epi16(_mm512_slli_epi16(reinterpret_cast<__m512i>(v), 8), 8);
    };
#elif defined(__AVX2__)
    const auto pairs = [](I32x left, U32x right) {
      return reinterpret_cast<I32x>(
          _mm256_madd_epi16(reinterpret_cast<__m256i>(left), reinterpret_cast<__m256i>(right)));
    };
    const auto odd = [](auto v) { return _mm256_srai_epi16(reinterpret_cast<__m256i>(v), 8); };
    const auto even = [](auto v) {
      return _mm256_srai_epi16(_mm256_slli_epi16(reinterpret_cast<__m256i>(v), 8), 8);
    };
#endif
#if defined(__AVX2__)
    const I32x products = pairs(reinterpret_cast<I32x>(even(words)), reinterpret_cast<U32x>(even(b))) +
                          pairs(reinterpret_cast<I32x>(odd(words)), reinterpret_cast<U32x>(odd(b)));
#else
    const I32x right = reinterpret_cast<I32x>(b);
    I32x products = (words >> 24) * (right >> 24);
    for (int byte = 0; byte < 3; ++byte) {
      const int up = 24 - 8 * byte;
      products += ((words << up) >> 24) * ((right << up) >> 24);
    }
#endif
    return reinterpret_cast<F32x>(reinterpret_cast<I32x>(sum) + products);
  }
#endif
#endif
#endif
};

// Quantizes a row of n elements (a multiple of kLanes) into an A panel of `rows` rows, and returns its scale.
// load(e): the kLanes elements from e on. A row with a NaN or an infinity gets the scale NaN, so that its
// results are NaN.
template <std::uint32_t kOffset = Int8Quads::kOffset, class Load>
float quantize(std::int64_t n, std::int64_t rows, Word* a_panel, const Load& load) {
  U32x most{};
  for (std::int64_t e = 0; e < n; e += kLanes) {
    const U32x magnitude = bits(load(e)) & 0x7FFFFFFFU;
    most = magnitude > most ? magnitude : most;
  }
  const Word largest = largest_of(most);
  constexpr Word kInfinity = 0x7F800000U;
  constexpr float kSmallest = 1e-30F;  // below, the inverse scale would overflow; such a row is zero
  constexpr float kMost = 127.0F;
  float range = 0.0F;
  __builtin_memcpy(&range, &largest, sizeof range);
  const bool finite = largest < kInfinity;
  const float inverse_scale = finite && range > kSmallest ? kMost / range : 0.0F;
  // Adding 3 * 2^22 rounds to an integer, ties to even, and leaves it in the lower bits.
  constexpr float kRound = 12582912.0F;
  const auto rounded = [&](std::int64_t e) {
    const F32x values = finite ? load(e) : F32x{};
    return bits(multiply_add(values, splat(inverse_scale), splat(kRound))) + kOffset;
  };
  constexpr std::int64_t kLine = kLineWords * Int8Quads::kPerWord;
  std::int64_t e = 0;
#ifdef __AVX512VBMI__
  for (; e + kLine <= n; e += kLine, a_panel += rows * kLineWords) {
    store_as(a_panel,
             lowest_bytes(rounded(e), rounded(e + kLanes), rounded(e + 2 * kLanes), rounded(e + 3 * kLanes)));
  }
#endif
  for (std::int64_t rest = 0; e + rest < n; rest += kLanes) {
    auto* const line = reinterpret_cast<std::uint8_t*>(a_panel + rest / kLine * rows * kLineWords);
    store_as(line + rest % kLine, lowest_bytes(rounded(e + rest)));
  }
  if (!finite) return __builtin_nanf("");
  return range > kSmallest ? range / kMost : 0.0F;
}

template <class Storage>
float quantize_row(const void* row, const float* inputs, std::int64_t n, std::int64_t rows, Word* a_panel) {
  const auto* const elements = static_cast<const typename Storage::Element*>(row);
  const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  const auto plain = [&](std::int64_t e) { return load_some<Storage>(elements + e, n - e); };
  if (inputs == nullptr) return quantize(padded, rows, a_panel, plain);
  const float* const shifts = inputs + (n + kInputPadding - 1) / kInputPadding * kInputPadding;
  return quantize(padded, rows, a_panel, [&](std::int64_t e) {
    return multiply_add(plain(e), load_as<F32x>(inputs + e), load_as<F32x>(shifts + e));
  });
}

}  // namespace
}  // namespace clipup
