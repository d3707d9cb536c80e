// The tier's functions (kernels.h), written once for vectors of any width. A file gemm_<tier>.cpp is compiled with that
// tier's flags, includes this and defines the table. Everything but the table is in an unnamed namespace.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace clipup {
namespace {

// Accumulators, a panel's two vectors and a broadcast fill the 32 (AVX-512) or 16 registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 14, kColumnTile = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kColumnTile = 4;
#else
constexpr int kTileRows = 4, kColumnTile = 4;
#endif
constexpr int kPanel = 2 * kLanes;
static_assert(kTileRows <= kMostTileRows && kTileRows % 2 == 0 && kLineWords % kLanes == 0 &&
              (kColumnTile == kLanes || 2 * kColumnTile == kLanes));

// A null array stays null.
template <class T>
inline T* from(T* array, std::int64_t index) {
  return array == nullptr ? nullptr : array + index;
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------- storage types

struct Float32 {
  using Element = float;
  static F32x load(const Element* from) { return load_as<F32x>(from); }
  static void store(Element* to, F32x value) { store_as(to, value); }
  static void stream(Element* to, F32x value) { stream_as(to, value); }
  static F32x rounded(F32x value) { return value; }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static F32x load(const Element* from) { return bfloat16_to_float(load_as<U16x>(from)); }
  static void store(Element* to, F32x value) { store_as(to, float_to_bfloat16(value)); }
  static void stream(Element* to, F32x value) { stream_as(to, float_to_bfloat16(value)); }
  static F32x rounded(F32x value) { return bfloat16_to_float(float_to_bfloat16(value)); }
};

struct Float16 {
  using Element = std::uint16_t;
  static F32x load(const Element* from) { return float16_to_float(load_as<U16x>(from)); }
  static void store(Element* to, F32x value) { store_as(to, float_to_float16(value)); }
  static void stream(Element* to, F32x value) { stream_as(to, float_to_float16(value)); }
  static F32x rounded(F32x value) { return float16_to_float(float_to_float16(value)); }
};

// The first `count` elements, zeros behind them; count may be negative or beyond the vector.
template <class Storage>
inline F32x load_some(const typename Storage::Element* from, std::int64_t count) {
  if (count >= kLanes) return Storage::load(from);
  typename Storage::Element elements[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) elements[i] = from[i];
  return Storage::load(elements);
}

template <class Storage>
inline void store_some(typename Storage::Element* to, F32x value, std::int64_t count) {
  if (count >= kLanes) return Storage::store(to, value);
  typename Storage::Element elements[kLanes];
  Storage::store(elements, value);
  for (std::int64_t i = 0; i < count; ++i) to[i] = elements[i];
}

// ---------------------------------------------------------------- operands: floats, or pairs of bfloat16

struct Floats {
  static constexpr int kPerWord = 1;
  template <class Storage>
  static constexpr bool kSameBits = sizeof(typename Storage::Element) == 4;

  static F32x multiply_add(F32x sum, Word a, F32x b) {
    float value;
    __builtin_memcpy(&value, &a, sizeof value);
    return sum + value * b;
  }
  // kLanes neighbours of the summed axis, from word `to` on.
  static void store_along(Word* to, F32x value) { store_as(to, value); }
  // One word each: the summed axis runs across `rows`.
  static U32x across(const F32x* rows) { return bits(rows[0]); }
  // The same for elements that are stored as they are multiplied.
  static U32x bits_across(const void* row, const void*) {
    return row == nullptr ? U32x{} : load_as<U32x>(row);
  }
  static F32x sum(U32x words) { return from_bits(words); }
};

#ifdef __AVX512BF16__
using U16x32 = std::uint16_t __attribute__((vector_size(64)));

struct BFloat16Pairs {
  static constexpr int kPerWord = 2;
  template <class Storage>
  static constexpr bool kSameBits = true;  // only bfloat16 is stored like this

  static F32x multiply_add(F32x sum, Word a, F32x b) {
    return reinterpret_cast<F32x>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                   reinterpret_cast<__m512bh>(U32x{} + a),
                                                   reinterpret_cast<__m512bh>(b)));
  }
  static void store_along(Word* to, F32x value) { store_as(to, float_to_bfloat16(value)); }
  // The pairs of two rows: their bfloat16 in turn.
  static U32x across(const F32x* rows) {
    const __m512i pairs = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(rows[1]), reinterpret_cast<__m512>(rows[0])));
    const U16x32 order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<U32x>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), pairs));
  }
  static U32x bits_across(const void* row, const void* next) {
    const U32x low = row == nullptr ? U32x{} : __builtin_convertvector(load_as<U16x>(row), U32x);
    const U32x high = next == nullptr ? U32x{} : __builtin_convertvector(load_as<U16x>(next), U32x);
    return low | high << 16;
  }
  static F32x sum(U32x words) { return from_bits(words << 16) + from_bits(words & 0xFFFF0000U); }
};
#endif

// Where kLanes neighbours from element `e` of the first row on lie in a tile of `rows` rows in lines; those of row i are
// i * kLineWords further. e is a multiple of kLanes.
template <class Operand>
inline Word* in_lines(Word* lines, std::int64_t rows, std::int64_t e) {
  const std::int64_t word = e / Operand::kPerWord;
  return from(lines, word / kLineWords * rows * kLineWords + word % kLineWords);
}

// Stores words of kLanes columns side by side into strips of kColumnTile, `strip` words from one to the next.
inline void store_columns(Word* to, std::int64_t strip, std::int64_t columns, U32x words) {
  if constexpr (kColumnTile == kLanes) {
    store_as(to, words);
  } else {
    store_as(to, low_half(words));
    if (columns > kColumnTile) store_as(to + strip, high_half(words));
  }
}

// ---------------------------------------------------------------- products

inline void ask_for_line(Prefetch& prefetch) {
  __builtin_prefetch(prefetch.next, 0, 2);
  prefetch.next += kLineWords * sizeof(Word);
  if (--prefetch.left > 0) return;
  prefetch.next += prefetch.skip;
  prefetch.left = prefetch.lines;
  if (--prefetch.rows == 0) prefetch.each = 0;
}

template <class Operand, int kRows, bool kLines>
void multiply(const Word* a, const Word* b, std::int64_t words, float* c, bool add, Prefetch& prefetch) {
  F32x sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = add ? load_as<F32x>(c + i * kPanel) : F32x{};
    sum[i][1] = add ? load_as<F32x>(c + i * kPanel + kLanes) : F32x{};
  }
  for (std::int64_t line = 0; line < words; line += kLineWords) {
    const std::int64_t count = smaller(kLineWords, words - line);
    for (std::int64_t ask = prefetch.each; ask > 0; --ask) ask_for_line(prefetch);
    for (std::int64_t k = 0; k < count; ++k) {
      const F32x low = load_as<F32x>(b);
      const F32x high = load_as<F32x>(b + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Word word = a[kLines ? i * kLineWords + k : k * kRows + i];
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
void row_to_lines(const void* row, std::int64_t n, std::int64_t rows, Word* lines) {
  using Element = typename Storage::Element;
  const auto* from = static_cast<const Element*>(row);
  if constexpr (Operand::template kSameBits<Storage>) {
    constexpr std::int64_t kLine = kLineWords * Operand::kPerWord;
    for (std::int64_t e = 0; e < n; e += kLine, lines += rows * kLineWords) {
      if (e + kLine <= n) {
        __builtin_memcpy(lines, from + e, kLine * sizeof(Element));
      } else {
        __builtin_memset(lines, 0, kLineWords * sizeof(Word));
        __builtin_memcpy(lines, from + e, (n - e) * sizeof(Element));
      }
    }
  } else {
    for (std::int64_t e = 0; e < n; e += kLanes) {
      Operand::store_along(in_lines<Operand>(lines, rows, e), load_some<Storage>(from + e, n - e));
    }
  }
}

template <class Storage, class Operand>
void rows_to_strips(const void* const* rows, const float* scales, std::int64_t n, std::int64_t width,
                    std::int64_t strip_words, Word* strips) {
  using Element = typename Storage::Element;
  const std::int64_t end = (n + width - 1) / width * width;
  const std::int64_t strip = strip_words * width;
  const std::int64_t step =
      width < kLanes ? kLanes / width * strip : strip;  // vectors of a narrow strip's neighbours
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
      store_as(strips + e / kPanel * strip + e % kPanel, words);
    } else {
      store_columns(strips + e / kLanes * step, strip, end - e, words);
    }
  }
}

template <class Storage, class Operand>
void transposed_strip(const void* rows, std::int64_t stride, std::int64_t count, std::int64_t k,
                      Word* strip) {
  using Element = typename Storage::Element;
  const auto* from = static_cast<const Element*>(rows);
  const std::int64_t words = (k + Operand::kPerWord - 1) / Operand::kPerWord;
  for (std::int64_t word = 0; word < words; word += kLanes) {
    const std::int64_t left = k - word * Operand::kPerWord;
    for (int half = 0; half < kPanel; half += kLanes) {
      U32x square[kLanes];
      if (Operand::template kSameBits<Storage> && half + kLanes <= count &&
          left >= kLanes * Operand::kPerWord) {
        const Element* const first = from + half * stride + word * Operand::kPerWord;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load_as<U32x>(first + i * stride);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_as(strip + (word + i) * kPanel + half, square[i]);
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
      for (std::int64_t i = 0; i < real; ++i) store_as(strip + (word + i) * kPanel + half, square[i]);
    }
  }
}

template <class Operand>
void sum_strip(const Word* strip, std::int64_t words, float* sums) {
  constexpr int kStep = kLanes / kColumnTile;  // words of a strip in a vector
  F32x total{};
  for (std::int64_t word = 0; word + kStep <= words; word += kStep) {
    total += Operand::sum(load_as<U32x>(strip + word * kColumnTile));
  }
  float lanes[kLanes];
  store_as(lanes, total);
  Word rest[kLanes] = {};
  __builtin_memcpy(rest, strip + words / kStep * kLanes, words % kStep * kColumnTile * sizeof(Word));
  float tail[kLanes];
  store_as(tail, Operand::sum(load_as<U32x>(rest)));
  for (int i = 0; i < kLanes; ++i) sums[i % kColumnTile] += lanes[i] + tail[i];
}

// ---------------------------------------------------------------- finishing a tile

template <class Storage>
struct Bias {
  F32x values[2];
  Bias(const void* bias, std::int64_t columns) {
    const auto* from = static_cast<const typename Storage::Element*>(bias);
    for (int v = 0; v < 2; ++v) {
      values[v] = bias == nullptr ? F32x{} : load_some<Storage>(from + v * kLanes, columns - v * kLanes);
    }
  }
};

template <class Storage, class Operand, class Activation, bool kGated>
void finish_hidden_tile(const HiddenTile& tile) {
  using Element = typename Storage::Element;
  const Bias<Storage> bias(tile.bias, tile.columns);
  const Bias<Storage> bias_gate(tile.bias_gate, tile.columns);
  for (int v = 0; v < 2; ++v) {
    const std::int64_t left = tile.columns - v * kLanes;
    auto* z_to = from(static_cast<Element*>(tile.z), v * kLanes);
    auto* z_gate_to = from(static_cast<Element*>(tile.z_gate), v * kLanes);
    Word* a_to = in_lines<Operand>(tile.a, tile.rows, tile.column + v * kLanes);
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t at = i * kPanel + v * kLanes;
      const F32x z = Storage::rounded(load_as<F32x>(tile.c + at) + bias.values[v]);
      if (tile.z != nullptr) store_some<Storage>(z_to + i * tile.z_stride, z, left);
      F32x a;
      if constexpr (kGated) {
        const F32x z_gate = Storage::rounded(load_as<F32x>(tile.c_gate + at) + bias_gate.values[v]);
        if (tile.z != nullptr) store_some<Storage>(z_gate_to + i * tile.z_stride, z_gate, left);
        a = Activation::at(z_gate).value * z;
      } else {
        a = Activation::at(z).value;
      }
      if (tile.a != nullptr) Operand::store_along(a_to + i * kLineWords, a);
    }
  }
}

template <class Storage, class Operand, class Activation>
void finish_hidden(const HiddenTile& tile) {
  if (tile.c_gate == nullptr) return finish_hidden_tile<Storage, Operand, Activation, false>(tile);
  finish_hidden_tile<Storage, Operand, Activation, true>(tile);
}

template <class Storage, class Operand, class Activation, bool kGated>
void finish_hidden_gradient_tile(const HiddenGradientTile& tile) {
  using Element = typename Storage::Element;
  constexpr int kRows = Operand::kPerWord;
  const std::int64_t strip = tile.strip_words * kColumnTile;
  F32x products[kTileRows];
  for (std::int64_t i = 0; i < tile.rows; ++i) products[i] = F32x{};
  for (int v = 0; v < 2; ++v) {
    const std::int64_t left = tile.columns - v * kLanes;
    const std::int64_t column = tile.column + v * kLanes;
    const auto* z_from = static_cast<const Element*>(tile.z) + v * kLanes;
    const auto* z_gate_from = from(static_cast<const Element*>(tile.z_gate), v * kLanes);
    Word* const dz_to = in_lines<Operand>(tile.dz, tile.rows, column);
    Word* const dz_gate_to = in_lines<Operand>(tile.dz_gate, tile.rows, column);
    const std::int64_t strip_at = column / kColumnTile * strip + tile.word * kColumnTile;
    const std::int64_t panel_at = (tile.column / kPanel * tile.strip_words + tile.word) * kPanel + v * kLanes;
    for (std::int64_t i = 0; i < tile.rows; i += kRows) {
      F32x dz[kRows], dz_gate[kRows], a[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        dz[r] = dz_gate[r] = a[r] = F32x{};
        if (i + r == tile.rows) break;  // an odd last row has zeros for its partner
        const F32x da = load_as<F32x>(tile.da + (i + r) * kPanel + v * kLanes);
        const F32x scaled = da * tile.gates[i + r];
        const F32x z = load_some<Storage>(z_from + (i + r) * tile.z_stride, left);
        if constexpr (kGated) {
          const ValueSlope gate =
              Activation::at(load_some<Storage>(z_gate_from + (i + r) * tile.z_stride, left));
          a[r] = gate.value * z;
          dz[r] = scaled * gate.value;
          dz_gate[r] = scaled * z * gate.slope;
          if (tile.dz != nullptr) Operand::store_along(dz_gate_to + (i + r) * kLineWords, dz_gate[r]);
        } else {
          const ValueSlope hidden = Activation::at(z);
          a[r] = hidden.value;
          dz[r] = scaled * hidden.slope;
        }
        products[i + r] += a[r] * da;
        if (tile.dz != nullptr) Operand::store_along(dz_to + (i + r) * kLineWords, dz[r]);
      }
      const std::int64_t word = i / kRows;
      if (tile.dz_strips != nullptr && left > 0) {
        store_columns(tile.dz_strips + strip_at + word * kColumnTile, strip, left, Operand::across(dz));
        if constexpr (kGated) {
          store_columns(tile.dz_gate_strips + strip_at + word * kColumnTile, strip, left,
                        Operand::across(dz_gate));
        }
      }
      if (tile.a_strips != nullptr) store_as(tile.a_strips + panel_at + word * kPanel, Operand::across(a));
    }
  }
  for (std::int64_t i = 0; tile.d_gates != nullptr && i < tile.rows; ++i) {
    tile.d_gates[i * tile.d_gates_stride] = sum_of(products[i]);
  }
}

template <class Storage, class Operand, class Activation>
void finish_hidden_gradient(const HiddenGradientTile& tile) {
  if (tile.z_gate == nullptr) return finish_hidden_gradient_tile<Storage, Operand, Activation, false>(tile);
  finish_hidden_gradient_tile<Storage, Operand, Activation, true>(tile);
}

template <class Storage>
void finish_output(const OutputTile& tile) {
  using Element = typename Storage::Element;
  const Bias<Storage> bias(tile.bias, tile.columns);
  constexpr std::int64_t kVectorBytes = kLanes * sizeof(Element);
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(tile.out) % kVectorBytes == 0 && tile.stride % kLanes == 0;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    for (int v = 0; v < 2; ++v) {
      const std::int64_t left = tile.columns - v * kLanes;
      const std::int64_t at = i * tile.stride + v * kLanes;
      F32x value = load_as<F32x>(tile.c + i * kPanel + v * kLanes) + bias.values[v];
      if (tile.previous != nullptr) value += load_some<Float32>(tile.previous + at, left);
      if (tile.sum != nullptr) store_some<Float32>(tile.sum + at, value, left);
      auto* const out = static_cast<Element*>(tile.out);
      if (out == nullptr) continue;
      if (tile.stream && aligned && left >= kLanes) {
        Storage::stream(out + at, value);
      } else {
        store_some<Storage>(out + at, value, left);
      }
    }
  }
}

// ---------------------------------------------------------------- rows

template <class Storage>
void weighted_sum(const float* rows, const std::int32_t* row_of_choice, const float* gates, std::int64_t K,
                  std::int64_t D, void* y) {
  for (std::int64_t d = 0; d < D; d += kLanes) {
    F32x total{};
    for (std::int64_t k = 0; k < K; ++k) {
      if (row_of_choice[k] < 0) continue;
      const F32x row = load_some<Float32>(rows + row_of_choice[k] * D + d, D - d);
      total += gates == nullptr ? row : row * gates[k];
    }
    store_some<Storage>(static_cast<typename Storage::Element*>(y) + d, total, D - d);
  }
}

template <class Storage>
float dot(const void* a, const void* b, std::int64_t n) {
  using Element = typename Storage::Element;
  F32x total{};
  for (std::int64_t e = 0; e < n; e += kLanes) {
    total += load_some<Storage>(static_cast<const Element*>(a) + e, n - e) *
             load_some<Storage>(static_cast<const Element*>(b) + e, n - e);
  }
  return sum_of(total);
}

// ---------------------------------------------------------------- tables

template <class Storage, class Operand>
constexpr TypedKernels typed_kernels() {
  TypedKernels table{};
  table.per_word = Operand::kPerWord;
  table.by_rows[1] = multiply<Operand, 1, true>;
  table.by_rows[2] = multiply<Operand, 2, true>;
  table.by_rows[3] = multiply<Operand, 3, true>;
  table.by_rows[4] = multiply<Operand, 4, true>;
  if constexpr (kTileRows > 4) {
    table.by_rows[5] = multiply<Operand, 5, true>;
    table.by_rows[6] = multiply<Operand, 6, true>;
  }
  if constexpr (kTileRows > 6) {
    table.by_rows[7] = multiply<Operand, 7, true>;
    table.by_rows[8] = multiply<Operand, 8, true>;
    table.by_rows[9] = multiply<Operand, 9, true>;
    table.by_rows[10] = multiply<Operand, 10, true>;
    table.by_rows[11] = multiply<Operand, 11, true>;
    table.by_rows[12] = multiply<Operand, 12, true>;
    table.by_rows[13] = multiply<Operand, 13, true>;
    table.by_rows[14] = multiply<Operand, 14, true>;
  }
  table.by_columns = multiply<Operand, kColumnTile, false>;
  table.row_to_lines = row_to_lines<Storage, Operand>;
  table.rows_to_strips = rows_to_strips<Storage, Operand>;
  table.transposed_strip = transposed_strip<Storage, Operand>;
  table.sum_strip = sum_strip<Operand>;
  table.finish_hidden[static_cast<int>(Activation::kGelu)] = finish_hidden<Storage, Operand, Gelu>;
  table.finish_hidden[static_cast<int>(Activation::kGeluTanh)] = finish_hidden<Storage, Operand, GeluTanh>;
  table.finish_hidden[static_cast<int>(Activation::kQuickGelu)] = finish_hidden<Storage, Operand, QuickGelu>;
  table.finish_hidden[static_cast<int>(Activation::kRelu)] = finish_hidden<Storage, Operand, Relu>;
  table.finish_hidden[static_cast<int>(Activation::kSilu)] = finish_hidden<Storage, Operand, Silu>;
  auto& gradient = table.finish_hidden_gradient;
  gradient[static_cast<int>(Activation::kGelu)] = finish_hidden_gradient<Storage, Operand, Gelu>;
  gradient[static_cast<int>(Activation::kGeluTanh)] = finish_hidden_gradient<Storage, Operand, GeluTanh>;
  gradient[static_cast<int>(Activation::kQuickGelu)] = finish_hidden_gradient<Storage, Operand, QuickGelu>;
  gradient[static_cast<int>(Activation::kRelu)] = finish_hidden_gradient<Storage, Operand, Relu>;
  gradient[static_cast<int>(Activation::kSilu)] = finish_hidden_gradient<Storage, Operand, Silu>;
  table.finish_output = finish_output<Storage>;
  table.weighted_sum = weighted_sum<Storage>;
  table.dot = dot<Storage>;
  return table;
}

constexpr Kernels tier(const char* name) {
#ifdef __AVX512BF16__
  using BFloat16Operand = BFloat16Pairs;
#else
  using BFloat16Operand = Floats;
#endif
  return {name,
          kTileRows,
          kPanel,
          kColumnTile,
          streams_done,
          {typed_kernels<Float32, Floats>(), typed_kernels<BFloat16, BFloat16Operand>(),
           typed_kernels<Float16, Floats>()}};
}

}  // namespace
}  // namespace clipup
