// Epilogues: finishing a tile of sums while it is in the cache, and combining rows afterwards.
#pragma once

#include "activations.h"
#include "int8_products.h"

namespace clipup {
namespace {

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

// The sums of a tile, vector by vector: floats, or those of int8 products.
struct FloatSums {
  static constexpr bool kExact = true;
  const float* c;
  FloatSums(const float* c, const Int8Scaling&) : c(c) {}
  F32x at(std::int64_t i, int v) const { return load_as<F32x>(c + i * kPanel + v * kLanes); }
};

struct Int8Sums {
  static constexpr bool kExact = false;
  const float *c, *rows;
  F32x scales[2] = {};
  I32x offsets[2] = {};
  Int8Sums(const float* c, const Int8Scaling& scaling) : c(c), rows(scaling.rows) {
    if (c == nullptr) return;
    for (int v = 0; v < 2; ++v) {
      scales[v] = load_as<F32x>(scaling.columns + v * kLanes);
      offsets[v] = load_as<I32x>(scaling.sums + v * kLanes) * static_cast<std::int32_t>(kInt8Offset);
    }
  }
  F32x at(std::int64_t i, int v) const {
    I32x sums = load_as<I32x>(c + i * kPanel + v * kLanes);
    if constexpr (kInt8Offset != 0) sums -= offsets[v];
    return __builtin_convertvector(sums, F32x) * (scales[v] * rows[i]);
  }
};

// The same of rows from which their middles were subtracted.
struct CentredInt8Sums : Int8Sums {
  const float* middles;
  F32x columns[2];  // the product of a row of ones
  CentredInt8Sums(const float* c, const Int8Scaling& scaling)
      : Int8Sums(c, scaling), middles(scaling.middles) {
    for (int v = 0; v < 2; ++v) {
      columns[v] = __builtin_convertvector(load_as<I32x>(scaling.sums + v * kLanes), F32x) * scales[v];
    }
  }
  F32x at(std::int64_t i, int v) const {
    return multiply_add(columns[v], splat(middles[i]), Int8Sums::at(i, v));
  }
};

template <class Storage, class Operand, class Activation, bool kGated, class Sums>
void finish_hidden_tile(const HiddenTile& tile) {
  using Element = typename Storage::Element;
  const Sums sums(tile.c, tile.scaling);
  const Sums gate_sums(tile.c_gate, tile.scaling_gate);
  const Bias<Storage> bias(tile.bias, tile.columns);
  const Bias<Storage> bias_gate(tile.bias_gate, tile.columns);
  for (int v = 0; v < 2; ++v) {
    const std::int64_t left = tile.columns - v * kLanes;
    auto* z_to = from(static_cast<Element*>(tile.z), v * kLanes);
    auto* z_gate_to = from(static_cast<Element*>(tile.z_gate), v * kLanes);
    Word* a_to = in_a_panel<Operand>(tile.a, tile.rows, tile.column + v * kLanes);
    for (std::int64_t i = tile.begin; i < tile.end; ++i) {
      if constexpr (!Sums::kExact) {
        const F32x z = sums.at(i, v) + bias.values[v];
        F32x a;
        if constexpr (kGated) {
          a = Activation::coarse(gate_sums.at(i, v) + bias_gate.values[v]) * z;
        } else {
          a = Activation::coarse(z);
        }
        store_as(tile.int8_a + i * tile.z_stride + v * kLanes, a);
        continue;
      }
      const F32x z = Storage::rounded(sums.at(i, v) + bias.values[v]);
      if (tile.z != nullptr) store_some<Storage>(z_to + i * tile.z_stride, z, left);
      F32x a;
      if constexpr (kGated) {
        const F32x z_gate = Storage::rounded(gate_sums.at(i, v) + bias_gate.values[v]);
        if (tile.z != nullptr) store_some<Storage>(z_gate_to + i * tile.z_stride, z_gate, left);
        a = Activation::at(z_gate).value * z;
      } else {
        a = Activation::at(z).value;
      }
      if (tile.a != nullptr) Operand::store_along(a_to + i * kLineWords, a);
    }
  }
}

template <class Storage, class Operand, class Activation, class Sums>
void finish_hidden(const HiddenTile& tile) {
  if (tile.c_gate == nullptr) return finish_hidden_tile<Storage, Operand, Activation, false, Sums>(tile);
  finish_hidden_tile<Storage, Operand, Activation, true, Sums>(tile);
}

template <class Storage, class Operand, class Activation, bool kGated>
void finish_hidden_gradient_tile(const HiddenGradientTile& tile) {
  using Element = typename Storage::Element;
  constexpr int kRows = Operand::kPerWord;
  const std::int64_t panel_stride = tile.panel_words * kColumnTile;
  F32x products[kMostTileRows];
  for (std::int64_t i = 0; i < tile.rows; ++i) products[i] = F32x{};
  for (int v = 0; v < 2; ++v) {
    const std::int64_t left = tile.columns - v * kLanes;
    const std::int64_t column = tile.column + v * kLanes;
    const auto* z_from = static_cast<const Element*>(tile.z) + v * kLanes;
    const auto* z_gate_from = from(static_cast<const Element*>(tile.z_gate), v * kLanes);
    Word* const dz_to = in_a_panel<Operand>(tile.dz, tile.rows, column);
    Word* const dz_gate_to = in_a_panel<Operand>(tile.dz_gate, tile.rows, column);
    const std::int64_t column_at = column / kColumnTile * panel_stride + tile.word * kColumnTile;
    const std::int64_t panel_at = (tile.column / kPanel * tile.panel_words + tile.word) * kPanel + v * kLanes;
    for (std::int64_t i = 0; i < tile.rows; i += kRows) {
      F32x dz[kRows], dz_gate[kRows], a[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        dz[r] = dz_gate[r] = a[r] = F32x{};
        if (i + r == tile.rows) break;  // an odd last row is paired with zeros
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
      if (tile.dz_column_panels != nullptr && left > 0) {
        store_columns(tile.dz_column_panels + column_at + word * kColumnTile, panel_stride, left,
                      Operand::across(dz));
        if constexpr (kGated) {
          store_columns(tile.dz_gate_column_panels + column_at + word * kColumnTile, panel_stride, left,
                        Operand::across(dz_gate));
        }
      }
      if (tile.hidden_b_panels != nullptr)
        store_as(tile.hidden_b_panels + panel_at + word * kPanel, Operand::across(a));
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

// The usual case: whole vectors of one type, and nothing added.
template <class Storage, class Bias, class Sums>
void finish_rows(const OutputTile& tile, const Bias& bias, const Sums& sums, typename Storage::Element* out) {
  for (std::int64_t i = tile.begin; i < tile.end; ++i) {
    for (int v = 0; v < 2; ++v) {
      Storage::store(out + i * tile.stride + v * kLanes, sums.at(i, v) + bias.values[v]);
    }
  }
}

template <class Storage, class Sums>
void finish_output(const OutputTile& tile) {
  const Sums sums(tile.c, tile.scaling);
  using Element = typename Storage::Element;
  const Bias<Storage> bias(tile.bias, tile.columns);
  if (tile.columns == kPanel && tile.previous == nullptr && !tile.stream) {
    if (tile.sum == nullptr) return finish_rows<Storage>(tile, bias, sums, static_cast<Element*>(tile.out));
    if (tile.out == nullptr) return finish_rows<Float32>(tile, bias, sums, tile.sum);
  }
  constexpr std::int64_t kVectorBytes = kLanes * sizeof(Element);
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(tile.out) % kVectorBytes == 0 && tile.stride % kLanes == 0;
  for (std::int64_t i = tile.begin; i < tile.end; ++i) {
    for (int v = 0; v < 2; ++v) {
      const std::int64_t left = tile.columns - v * kLanes;
      const std::int64_t at = i * tile.stride + v * kLanes;
      F32x value = sums.at(i, v) + bias.values[v];
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

template <class Storage>
void finish_int8_output(const OutputTile& tile) {
  if (tile.scaling.middles == nullptr) return finish_output<Storage, Int8Sums>(tile);
  finish_output<Storage, CentredInt8Sums>(tile);
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

}  // namespace
}  // namespace clipup
