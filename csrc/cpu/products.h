// Micro-kernels: multiplying tiles in registers, and packing their operands.
#pragma once

#include "operands.h"

namespace clipup {
namespace {

// ---------------------------------------------------------------- products

inline void ask_for_line(Prefetch& prefetch) {
  __builtin_prefetch(prefetch.next, 0, 2);
  prefetch.next += kLineWords * sizeof(Word);
  if (--prefetch.left > 0) return;
  prefetch.next += prefetch.skip;
  prefetch.left = prefetch.lines;
  if (--prefetch.rows == 0) prefetch.each = 0;
}

template <class Operand, int kRows, bool kByRows>
void multiply(const Word* a, const Word* b, std::int64_t words, float* c, bool add, Beside& beside) {
  // One request a word leaves fill buffers free for what is multiplied now. Narrower vectors have no
  // instructions to spare in the loop over words.
  constexpr bool kSpread = kLanes == 16;
  F32x sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = add ? load_as<F32x>(c + i * kPanel) : F32x{};
    sum[i][1] = add ? load_as<F32x>(c + i * kPanel + kLanes) : F32x{};
  }
  for (std::int64_t line = 0; line < words; line += kLineWords) {
    const std::int64_t count = smaller(kLineWords, words - line);
    for (std::int64_t ask = kSpread ? 0 : beside.prefetch.each; ask > 0; --ask) {
      ask_for_line(beside.prefetch);
    }
    for (std::int64_t k = 0; k < count; ++k) {
      if (kSpread && k < beside.prefetch.each) ask_for_line(beside.prefetch);
      if (kSpread && kLineWords - 1 - k < beside.next_tile.each) ask_for_line(beside.next_tile);
      const U32x low = load_as<U32x>(b);
      const U32x high = load_as<U32x>(b + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Word word = a[kByRows ? i * kLineWords + k : k * kRows + i];
        sum[i][0] = Operand::multiply_add(sum[i][0], word, low);
        sum[i][1] = Operand::multiply_add(sum[i][1], word, high);
      }
      b += kPanel;
    }
    a += kRows * kLineWords;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store_as(c + i * kPanel, sum[i][0]);
    store_as(c + i * kPanel + kLanes, sum[i][1]);
  }
}

// ---------------------------------------------------------------- packing

template <class Storage, class Operand>
void row_to_a_panel(const void* row, std::int64_t n, std::int64_t rows, Word* a_panel) {
  using Element = typename Storage::Element;
  const auto* from = static_cast<const Element*>(row);
  if constexpr (Operand::template kSameBits<Storage>) {
    constexpr std::int64_t kLine = kLineWords * Operand::kPerWord;
    for (std::int64_t e = 0; e < n; e += kLine, a_panel += rows * kLineWords) {
      if (e + kLine <= n) {
        __builtin_memcpy(a_panel, from + e, kLine * sizeof(Element));
      } else {
        __builtin_memset(a_panel, 0, kLineWords * sizeof(Word));
        __builtin_memcpy(a_panel, from + e, (n - e) * sizeof(Element));
      }
    }
  } else {
    for (std::int64_t e = 0; e < n; e += kLanes) {
      Operand::store_along(in_a_panel<Operand>(a_panel, rows, e), load_some<Storage>(from + e, n - e));
    }
  }
}

template <class Storage, class Operand>
void rows_to_column_panels(const void* const* rows, const float* scales, std::int64_t n, std::int64_t width,
                           std::int64_t panel_words, Word* panels) {
  using Element = typename Storage::Element;
  const std::int64_t end = (n + width - 1) / width * width;
  const std::int64_t panel_stride = panel_words * width;
  const std::int64_t step = width < kLanes ? kLanes / width * panel_stride
                                           : panel_stride;  // vectors of a narrow strip's neighbours
  for (std::int64_t e = 0; e < end; e += kLanes) {
    U32x words;
    if (Operand::template kSameBits<Storage> && scales == nullptr && e + kLanes <= n) {
      words = Operand::bits_across(from(static_cast<const Element*>(rows[0]), e),
                                   from(static_cast<const Element*>(rows[Operand::kPerWord - 1]), e));
    } else {
      F32x values[Operand::kPerWord];
      for (int i = 0; i < Operand::kPerWord; ++i) {
        const auto* row = static_cast<const Element*>(rows[i]);
        const float scale = scales == nullptr ? 1.0F : scales[i];
        values[i] = row == nullptr ? F32x{} : load_some<Storage>(row + e, n - e) * scale;
      }
      words = Operand::across(values);
    }
    if (width == kPanel) {
      store_as(panels + e / kPanel * panel_stride + e % kPanel, words);
    } else {
      store_columns(panels + e / kLanes * step, panel_stride, end - e, words);
    }
  }
}

template <class Storage, class Operand>
void transposed_b_panel(const void* rows, std::int64_t stride, std::int64_t count, std::int64_t k,
                        Word* b_panel) {
  using Element = typename Storage::Element;
  const auto* from = static_cast<const Element*>(rows);
  const std::int64_t words = (k + Operand::kPerWord - 1) / Operand::kPerWord;
  // The rows are too many streams for the CPU's own prefetcher. Measured: one to two lines ahead is best;
  // narrower vectors gain nothing.
  constexpr std::int64_t kAheadWords = 2 * kLineWords;
  for (std::int64_t word = 0; word < words; word += kLanes) {
    const std::int64_t left = k - word * Operand::kPerWord;
    for (int half = 0; half < kPanel; half += kLanes) {
      U32x square[kLanes];
      if (Operand::template kSameBits<Storage> && half + kLanes <= count &&
          left >= kLanes * Operand::kPerWord) {
        const Element* const first = from + half * stride + word * Operand::kPerWord;
        for (int i = 0; kLanes == 16 && i < kLanes; ++i) {
          __builtin_prefetch(first + i * stride + kAheadWords * Operand::kPerWord);
        }
        for (int k = 0; k < kLanes; k += 4) {
          U32x columns[4];
          load_columns(first + k * Operand::kPerWord, stride * sizeof(Element), columns);
          for (int i = 0; i < 4; ++i) store_as(b_panel + (word + k + i) * kPanel + half, columns[i]);
        }
        continue;
      }
      for (int i = 0; i < kLanes; ++i) {
        const Element* row = from + (half + i) * stride + word * Operand::kPerWord;
        if (half + i >= count) {
          square[i] = U32x{};
        } else if constexpr (Operand::template kSameBits<Storage>) {
          if (left >= kLanes * Operand::kPerWord) {
            square[i] = load_as<U32x>(row);
          } else {
            square[i] = U32x{};
            __builtin_memcpy(&square[i], row, left * sizeof(Element));
          }
        } else {
          square[i] = bits(load_some<Storage>(row, left));
        }
      }
      transpose(square);
      const std::int64_t real = smaller(kLanes, words - word);
      for (std::int64_t i = 0; i < real; ++i) store_as(b_panel + (word + i) * kPanel + half, square[i]);
    }
  }
}

template <class Operand>
void sum_column_panel(const Word* panel, std::int64_t words, float* sums) {
  constexpr int kStep = kLanes / kColumnTile;  // words of a strip in a vector
  F32x total{};
  for (std::int64_t word = 0; word + kStep <= words; word += kStep) {
    total += Operand::sum(load_as<U32x>(panel + word * kColumnTile));
  }
  float lanes[kLanes];
  store_as(lanes, total);
  Word rest[kLanes] = {};
  __builtin_memcpy(rest, panel + words / kStep * kLanes, words % kStep * kColumnTile * sizeof(Word));
  float tail[kLanes];
  store_as(tail, Operand::sum(load_as<U32x>(rest)));
  for (int i = 0; i < kLanes; ++i) sums[i % kColumnTile] += lanes[i] + tail[i];
}

}  // namespace
}  // namespace clipup
