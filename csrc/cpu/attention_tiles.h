// Attention, tile by tile while it is in the cache (attention.cpp): softmax of scores, finished rows, and the
// operands of int8 products.
//
// Keys are quantized after their mean over the sequence is subtracted, which changes every score of a query
// by the same amount and so no share; values too, and their mean is added to the result, since shares sum to
// 1. What is common to all tokens therefore costs no accuracy. Shares are integers up to 255, but are summed
// before they are rounded: what rounding takes from them then goes to the mean. Many keys beside a large one
// would otherwise count for nothing at all.
#pragma once

#include "activations.h"
#include "int8_products.h"
#include "products.h"

namespace clipup {
namespace {

// ---------------------------------------------------------------- shares

// Scores and shares in floats.
struct FloatScores {
  static constexpr bool kExact = true;
  static constexpr float kOne = 1.0F;  // a share of 1 as it is stored
  explicit FloatScores(const AttentionTile&) {}
  F32x at(const float* c, std::int64_t, std::int64_t, float scale) const { return load_as<F32x>(c) * scale; }
  static F32x share(F32x e) { return e; }
  template <class Operand>
  static void store(Word* to, F32x share) {
    Operand::store_along(to, share);
  }
};

// Those of int8 products.
struct Int8Scores {
  static constexpr bool kExact = false;
  static constexpr float kOne = 255.0F;
  const Int8Scaling& scaling;
  explicit Int8Scores(const AttentionTile& tile) : scaling(tile.scaling) {}
  F32x at(const float* c, std::int64_t row, std::int64_t key, float scale) const {
    const I32x offset = load_as<I32x>(scaling.sums + key) * static_cast<std::int32_t>(Int8Quads::kOffset);
    const F32x sum = __builtin_convertvector(load_as<I32x>(c) - offset, F32x);
    return sum * (load_as<F32x>(scaling.columns + key) * (scaling.rows[row] * scale));
  }
  // An integer up to 255.
  static F32x share(F32x e) {
    const F32x kRound = splat(12582912.0F);  // 3 * 2^22 rounds to an integer, ties to even
    return multiply_add(e, splat(kOne), kRound) - kRound;
  }
  template <class Operand>
  static void store(Word* to, F32x share) {
    const U32x levels =
        reinterpret_cast<U32x>(__builtin_convertvector(share, I32x)) + (Int8Quads::kOffset - 128U);
    store_as(to, lowest_bytes(levels));
  }
};

template <class Storage, class Operand, class Scores>
void attention_shares(const AttentionTile& tile) {
  const Scores scores(tile);
  const std::int64_t rows = tile.rows, keys = tile.keys, end = (keys + kPanel - 1) / kPanel * kPanel;
  const F32x lowest = splat(-__builtin_inff());
  U32x lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (std::int64_t row = 0; row < rows; ++row) {
    float* const of_row = tile.scores + row * kPanel;
    Word* const shares = tile.shares + row * kLineWords;
    const float* const mask = from(tile.mask, row * tile.mask_stride);
    F32x most = lowest, unordered{};
    float* panel = of_row;
    for (std::int64_t first = 0; first < end; first += kPanel, panel += rows * kPanel) {
      for (int v = 0; v < 2; ++v) {
        const std::int64_t key = first + v * kLanes, left = keys - key;
        F32x score = scores.at(panel + v * kLanes, row, key, tile.scale);
        if (mask != nullptr) score += load_some<Float32>(mask + key, left);
        if (left < kLanes) score = lane < static_cast<std::uint32_t>(left < 0 ? 0 : left) ? score : lowest;
        store_as(panel + v * kLanes, score);
        most = score > most ? score : most;
        unordered = score == score ? unordered : score;
      }
    }
    const float largest = largest_of(most);
    const bool masked = largest == -__builtin_inff();
    F32x sum = unordered;
    panel = of_row;
    for (std::int64_t key = 0; key < end; key += kPanel, panel += rows * kPanel) {
      for (int v = 0; v < 2; ++v) {
        const F32x score = load_as<F32x>(panel + v * kLanes) - largest;
        const F32x e =
            sizeof(typename Storage::Element) == 4 && Scores::kExact ? exp_of(score) : coarse_exp(score);
        const F32x share = masked ? F32x{} : e;
        sum += share;
        Scores::template store<Operand>(in_a_panel<Operand>(shares, rows, key + v * kLanes),
                                        Scores::share(share));
      }
    }
    const float total = sum_of(sum) * Scores::kOne;
    tile.inverse_sums[row] = total == 0.0F ? 0.0F : 1.0F / total;
  }
}

// ---------------------------------------------------------------- finished rows

template <class Storage>
void finish_attention(const float* c, const float* scales, std::int64_t rows, std::int64_t columns, void* out,
                      std::int64_t stride) {
  auto* const to = static_cast<typename Storage::Element*>(out);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (int v = 0; v < 2; ++v) {
      const F32x value = load_as<F32x>(c + i * kPanel + v * kLanes) * scales[i];
      store_some<Storage>(to + i * stride + v * kLanes, value, columns - v * kLanes);
    }
  }
}

template <class Storage>
void finish_int8_attention(const float* c, const float* scales, std::int64_t rows, std::int64_t columns,
                           void* out, std::int64_t stride, const Int8Operand& values, std::int64_t column) {
  auto* const to = static_cast<typename Storage::Element*>(out);
  for (int v = 0; v < 2; ++v) {
    const std::int64_t at = column + v * kLanes;
    const U32x offset = load_as<U32x>(values.sums + at) * (128U - Int8Quads::kOffset);  // wraps beside a NaN
    const F32x channel = load_as<F32x>(values.scales + at), mean = load_as<F32x>(values.means + at);
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto sum = reinterpret_cast<I32x>(load_as<U32x>(c + i * kPanel + v * kLanes) + offset);
      const F32x value =
          __builtin_convertvector(sum, F32x) * (channel * scales[i]) + (scales[i] == 0.0F ? F32x{} : mean);
      store_some<Storage>(to + i * stride + v * kLanes, value, columns - v * kLanes);
    }
  }
}

// ---------------------------------------------------------------- int8 operands

// means[d, rounded up to kPanel]
template <class Storage>
void mean_of_rows(const typename Storage::Element* rows, std::int64_t stride, std::int64_t count,
                  std::int64_t d, float* means) {
  const float share = 1.0F / static_cast<float>(count);
  for (std::int64_t e = 0; e < (d + kPanel - 1) / kPanel * kPanel; e += kLanes) {
    F32x sum{};
    for (std::int64_t row = 0; row < count; ++row) sum += load_some<Storage>(rows + row * stride + e, d - e);
    store_as(means + e, sum * share);
  }
}

template <class Storage>
void quantize_keys(const void* rows, std::int64_t stride, std::int64_t keys, std::int64_t d, Word* scratch,
                   const Int8Operand& to) {
  const auto* const first = static_cast<const typename Storage::Element*>(rows);
  const std::int64_t d_words = (d + 3) / 4;
  const std::int64_t row_words = (d_words + kLineWords - 1) / kLineWords * kLineWords;
  mean_of_rows<Storage>(first, stride, keys, d, to.means);
  for (std::int64_t panel = 0; panel * kPanel < keys; ++panel) {
    const std::int64_t count = smaller(kPanel, keys - panel * kPanel);
    float* const scales = to.scales + panel * kPanel;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto* const row = first + (panel * kPanel + i) * stride;
      const std::int64_t padded = (d + kLanes - 1) / kLanes * kLanes;
      scales[i] = quantize<0>(padded, 1, scratch + i * row_words, [&](std::int64_t e) {
        return load_some<Storage>(row + e, d - e) - load_as<F32x>(to.means + e);
      });
    }
    for (std::int64_t i = count; i < kPanel; ++i) scales[i] = 0.0F;
    Word* const b_panel = to.panels + panel * d_words * kPanel;
    transposed_b_panel<Float32, Floats>(scratch, row_words, count, d_words, b_panel);
    for (int v = 0; v < 2; ++v) {
      I32x sum{};
      for (std::int64_t word = 0; word < d_words; ++word) {
        const I32x quad = load_as<I32x>(b_panel + word * kPanel + v * kLanes);
        sum += (quad >> 24) + ((quad << 8) >> 24) + ((quad << 16) >> 24) + ((quad << 24) >> 24);
      }
      store_as(to.sums + panel * kPanel + v * kLanes, sum);
    }
  }
}

template <class Storage>
void quantize_values(const void* rows, std::int64_t stride, std::int64_t keys, std::int64_t d,
                     const Int8Operand& to) {
  const auto* const first = static_cast<const typename Storage::Element*>(rows);
  const std::int64_t key_words = (keys + 3) / 4;
  mean_of_rows<Storage>(first, stride, keys, d, to.means);
  for (std::int64_t e = 0; e < (d + kPanel - 1) / kPanel * kPanel; e += kLanes) {
    const F32x mean = load_as<F32x>(to.means + e);
    const auto value = [&](std::int64_t key) {
      return key < keys ? load_some<Storage>(first + key * stride + e, d - e) - mean : F32x{};
    };
    F32x most{}, unordered{};
    for (std::int64_t key = 0; key < keys; ++key) {
      const F32x magnitude = from_bits(bits(value(key)) & 0x7FFFFFFFU);
      most = magnitude > most ? magnitude : most;
      unordered += magnitude * 0.0F;  // NaN where a value is not finite
    }
    const F32x inverse = most > 1e-30F ? 127.0F / most : F32x{};
    store_as(to.scales + e, (most > 1e-30F ? most / 127.0F : F32x{}) + unordered);
    const F32x kRound = splat(12582912.0F);
    U32x sum{};
    Word* const b_panel = to.panels + e / kPanel * key_words * kPanel + e % kPanel;
    for (std::int64_t word = 0; word < key_words; ++word) {
      U32x quad{};
      for (int i = 3; i >= 0; --i) {
        const U32x level = bits(multiply_add(value(word * 4 + i), inverse, kRound));
        sum += level - bits(kRound);
        quad = quad << 8 | (level & 255U);
      }
      store_as(b_panel + word * kPanel, quad);
    }
    store_as(to.sums + e, sum);
  }
}

}  // namespace
}  // namespace clipup
