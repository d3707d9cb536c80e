// Int8 products: quantizing rows into operands, multiplying words of four int8, and scaling the sums.
//
// A row x of the left operand becomes q = round(x * 127 / max|x|), scale = max|x| / 127; weights are
// quantized in the same way by output channel (packed_weights.cpp). Hidden activations are mostly of one
// sign: from their rows the middle of the least and the greatest element is subtracted first, which halves
// the steps; its products are the middle times the sums of the channels. Sums of products are exact in 32-bit
// integers, so they depend neither on their order nor on the tier.
#pragma once

#include "operands.h"

namespace clipup {
namespace {

// Words of four int8, summed in 32-bit integers, which travel as the bits of floats: multiply() only adds and
// stores them.
struct Int8Quads {
  static constexpr int kPerWord = 4;
  static constexpr int kRows = kMatrixRows;
  static F32x multiply_add(F32x sum, Word a, U32x b) { return add_quads(sum, a, b); }
};

// Quantizes a row of n elements (a multiple of kLanes) into an A panel of `rows` rows, and returns its scale.
// load(e): the kLanes elements from e on. A row with a NaN or an infinity gets the scale NaN, so that its
// results are NaN. kCentred: its middle is subtracted and written.
template <std::uint32_t kOffset = kInt8Offset, bool kCentred = false, class Load>
float quantize(std::int64_t n, std::int64_t rows, Word* a_panel, const Load& load, float* middle = nullptr) {
  U32x most{};
  F32x greatest = splat(-__builtin_inff()), least = splat(__builtin_inff());
  for (std::int64_t e = 0; e < n; e += kLanes) {
    const F32x values = load(e);
    const U32x magnitude = bits(values) & 0x7FFFFFFFU;
    most = magnitude > most ? magnitude : most;
    if constexpr (kCentred) {
      greatest = values > greatest ? values : greatest;
      least = values < least ? values : least;
    }
  }
  const Word largest = largest_of(most);
  constexpr Word kInfinity = 0x7F800000U;
  constexpr float kSmallest = 1e-30F;  // below, the inverse scale would overflow; such a row is zero
  constexpr float kMost = 127.0F;
  float range = 0.0F;
  __builtin_memcpy(&range, &largest, sizeof range);
  const bool finite = largest < kInfinity;
  float centre = 0.0F;
  if constexpr (kCentred) {
    if (finite && largest > 0) {
      const float high = 0.5F * largest_of(greatest), low = -0.5F * largest_of(-least);
      centre = high + low;
      range = high - low;
    }
    *middle = centre;
  }
  const float inverse_scale = finite && range > kSmallest ? kMost / range : 0.0F;
  // Adding 3 * 2^22 rounds to an integer, ties to even, and leaves it in the lower bits.
  constexpr float kRound = 12582912.0F;
  const auto rounded = [&](std::int64_t e) {
    F32x values = finite ? load(e) : F32x{};
    if constexpr (kCentred) values -= splat(centre);
    return bits(multiply_add(values, splat(inverse_scale), splat(kRound))) + kOffset;
  };
  constexpr std::int64_t kLine = kLineWords * Int8Quads::kPerWord;
  std::int64_t e = 0;
#ifdef CLIPUP_LOWEST_BYTES_OF_FOUR
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

// The same for a row of hidden activations.
inline float quantize_hidden_row(const float* row, const float* inputs, std::int64_t n, std::int64_t rows,
                                 Word* a_panel, float* middle) {
  const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  const float* const shifts = inputs + (n + kInputPadding - 1) / kInputPadding * kInputPadding;
  const auto scaled = [&](std::int64_t e) {
    return multiply_add(load_as<F32x>(row + e), load_as<F32x>(inputs + e), load_as<F32x>(shifts + e));
  };
  return quantize<kInt8Offset, true>(
      padded, rows, a_panel,
      [&](std::int64_t e) {
        if (n - e >= kLanes) return scaled(e);
        float elements[kLanes];  // past the row's end, its weights are 0: any of its elements will do
        store_as(elements, scaled(e));
        for (std::int64_t i = n - e; i < kLanes; ++i) elements[i] = elements[0];
        return load_as<F32x>(elements);
      },
      middle);
}

}  // namespace
}  // namespace clipup
