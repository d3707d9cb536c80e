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

// Scores and shares in floats. at(c, key): the scores of a vector of keys, but for a factor that a row has in
// common.
struct FloatScores {
  static constexpr bool kExact = true;
  static constexpr float kOne = 1.0F;  // a share of 1 as it is stored
  explicit FloatScores(const AttentionTile&) {}
  F32x at(const float* c, std::int64_t) const { return load_as<F32x>(c); }
  static float factor(const AttentionTile& tile, std::int64_t) { return tile.scale; }
  // Stores share_of(c) for all panels of a row, whose scores are `rows` panels apart.
  template <class Operand, class Shares>
  static void store(Word* to, std::int64_t rows, std::int64_t panels, const float* c,
                    const Shares& share_of) {
    for (std::int64_t panel = 0; panel < panels; ++panel, c += rows * kPanel) {
      for (int v = 0; v < 2; ++v) {
        Operand::store_along(in_a_panel<Operand>(to, rows, panel * kPanel + v * kLanes),
                             share_of(c + v * kLanes));
      }
    }
  }
};

// Those of int8 products; shares are integers up to 255.
struct Int8Scores {
  static constexpr bool kExact = false;
  static constexpr float kOne = 255.0F;
  const float* columns;
  const std::int32_t* sums;
  explicit Int8Scores(const AttentionTile& tile) : columns(tile.scaling.columns), sums(tile.scaling.sums) {}
  F32x at(const float* c, std::int64_t key) const {
    const I32x offset = load_as<I32x>(sums + key) * static_cast<std::int32_t>(kInt8Offset);
    return __builtin_convertvector(load_as<I32x>(c) - offset, F32x) * load_as<F32x>(columns + key);
  }
  // Never 0, whose product with the -infinity of what is no key is NaN: where the query is 0, so are its
  // products.
  static float factor(const AttentionTile& tile, std::int64_t row) {
    const float factor = tile.scaling.rows[row] * tile.scale;
    return factor == 0.0F ? 1.0F : factor;
  }
  template <class Operand, class Shares>
  static void store(Word* to, std::int64_t rows, std::int64_t panels, const float* c,
                    const Shares& share_of) {
    // Adding 3 * 2^22 rounds to an integer, ties to even, and leaves it in the lower bits.
    const auto levels = [&](const float* c) {
      return bits(multiply_add(share_of(c), splat(kOne), splat(12582912.0F))) + (kInt8Offset - 128U);
    };
    std::int64_t panel = 0;
#ifdef CLIPUP_LOWEST_BYTES_OF_FOUR
    const std::int64_t next = rows * kPanel;
    for (; panel + 2 <= panels; panel += 2, c += 2 * next) {
      U32x words[4];  // in order: the shares are summed as they are computed
      for (int v = 0; v < 4; ++v) words[v] = levels(c + v / 2 * next + v % 2 * kLanes);
      store_as(in_a_panel<Operand>(to, rows, panel * kPanel),
               lowest_bytes(words[0], words[1], words[2], words[3]));
    }
#endif
    for (; panel < panels; ++panel, c += rows * kPanel) {
      for (int v = 0; v < 2; ++v) {
        store_as(in_a_panel<Operand>(to, rows, panel * kPanel + v * kLanes),
                 lowest_bytes(levels(c + v * kLanes)));
      }
    }
  }
};

template <class Storage, class Operand, class Scores>
void attention_shares(const AttentionTile& tile) {
  constexpr bool kExact = sizeof(typename Storage::Element) == 4 && Scores::kExact;
  const Scores scores(tile);
  const std::int64_t rows = tile.rows, keys = tile.keys, whole = keys / kPanel * kPanel;
  const std::int64_t panels = (keys + kPanel - 1) / kPanel;
  const F32x lowest = splat(-__builtin_inff());
  U32x lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  // All rows' largest scores first: the shares of a row would wait for its own.
  float largest[kMostTileRows], factors[kMostTileRows];
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* const mask = from(tile.mask, row * tile.mask_stride);
    const float factor = Scores::factor(tile, row);
    F32x most = lowest;
    const auto keep = [&](float* c, F32x score) {
      store_as(c, score);
      most = score > most ? score : most;
    };
    float* c = tile.scores + row * kPanel;
    std::int64_t key = 0;
    if (mask == nullptr) {
      for (; key < whole; key += kPanel, c += rows * kPanel) {
        for (int v = 0; v < 2; ++v) keep(c + v * kLanes, scores.at(c + v * kLanes, key + v * kLanes));
      }
    }
    for (; key < keys; key += kPanel, c += rows * kPanel) {
      for (int v = 0; v < 2; ++v) {
        const std::int64_t first = key + v * kLanes, left = keys - first;
        F32x score = scores.at(c + v * kLanes, first);
        if (mask != nullptr) score = score * factor + load_some<Float32>(mask + first, left);
        keep(c + v * kLanes, lane < static_cast<std::uint32_t>(left < 0 ? 0 : left) ? score : lowest);
      }
    }
    largest[row] = largest_of(most);
    factors[row] = (mask == nullptr ? factor : 1.0F) * (kExact ? 1.0F : kLog2E);
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    F32x sum{};
    const float factor = factors[row], most = largest[row];
    const auto share = [&](const float* c) {
      const F32x power = (load_as<F32x>(c) - most) * factor;  // a mask may have the smallest of floats
      const F32x e = kExact ? exp_of(power) : coarse_exp2(power);
      sum += power == power ? e : power;  // exp_of shifts bits of a NaN's payload into its exponent
      return e;
    };
    const auto none = [&](const float* c) {  // but the sum is NaN where a score is
      const F32x score = load_as<F32x>(c);
      sum += score == score ? F32x{} : score;
      return F32x{};
    };
    Word* const to = tile.shares + row * kLineWords;
    const float* const c = tile.scores + row * kPanel;
    if (largest[row] == -__builtin_inff()) {
      Scores::template store<Operand>(to, rows, panels, c, none);
    } else {
      Scores::template store<Operand>(to, rows, panels, c, share);
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
    const U32x offset = load_as<U32x>(values.sums + at) * (128U - kInt8Offset);  // wraps beside a NaN
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

// means[kVectors * kLanes]: sums that do not wait for each other, of elements of which d exist.
template <class Storage, int kVectors>
void mean_of_columns(const typename Storage::Element* rows, std::int64_t stride, std::int64_t count,
                     std::int64_t d, float* means) {
  F32x sums[kVectors] = {};
  for (std::int64_t row = 0; row < count; ++row, rows += stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] += load_some<Storage>(rows + v * kLanes, d - v * kLanes);
  }
  const float share = 1.0F / static_cast<float>(count);
  for (int v = 0; v < kVectors; ++v) store_as(means + v * kLanes, sums[v] * share);
}

// means[d, rounded up to kPanel]
template <class Storage>
void mean_of_rows(const typename Storage::Element* rows, std::int64_t stride, std::int64_t count,
                  std::int64_t d, float* means) {
  constexpr int kTogether = 4;
  std::int64_t e = 0;
  for (; e + kTogether * kLanes <= d; e += kTogether * kLanes) {
    mean_of_columns<Storage, kTogether>(rows + e, stride, count, d - e, means + e);
  }
  for (; e < (d + kPanel - 1) / kPanel * kPanel; e += kLanes) {
    mean_of_columns<Storage, 1>(rows + e, stride, count, d - e, means + e);
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
                     std::int64_t key_words, const Int8Operand& to) {
  const auto* const first = static_cast<const typename Storage::Element*>(rows);
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
