// The table of functions of an instruction tier (kernels.h), written once for vectors of any width.
// gemm_<tier>.cpp is compiled with the tier's flags, includes this file and defines the table. Everything but
// the table is in an unnamed namespace.
#pragma once

#include "attention_tiles.h"
#include "epilogues.h"
#include "products.h"
#include "router_products.h"
#ifdef CLIPUP_TILES
#include "tile_products.h"
#endif

namespace clipup {
namespace {

#ifndef CLIPUP_TILES
template <class Operand, int kRows>
constexpr Multiply multiply_tiles = nullptr;
constexpr void (*configure_tiles)(std::int64_t m) = nullptr;
constexpr void (*release_tiles)() = nullptr;
#endif

// Measured (docs/performance_log.md): with more rows, packing in small steps costs more time, for storing and
// loading sums, than it saves in waiting for the second-level cache.
template <class Storage>
constexpr std::int64_t few_rows() {
  return (sizeof(typename Storage::Element) == sizeof(Word) ? kFewFloatTiles : kFewHalfTiles) * kTileRows;
}

// by_rows[1] to by_rows[kRows]
template <class Operand, int kRows>
constexpr void fill_by_rows(Products& table) {
  if constexpr (Operand::kRows > kTileRows) {
    table.by_rows[kRows] = multiply_tiles<Operand, kRows>;
  } else {
    table.by_rows[kRows] = multiply<Operand, kRows, true>;
  }
  if constexpr (kRows > 1) fill_by_rows<Operand, kRows - 1>(table);
}

template <class Operand>
constexpr Products products_of() {
  Products table{};
  table.per_word = Operand::kPerWord;
  table.tile_rows = Operand::kRows;
  fill_by_rows<Operand, Operand::kRows>(table);
  if constexpr (Operand::kRows > kTileRows) {
    table.interleaves = true;
    table.before_rows = configure_tiles;
  }
  return table;
}

template <class Storage, class Operand>
constexpr TypedKernels typed_kernels() {
  TypedKernels table{};
  static_cast<Products&>(table) = products_of<Operand>();
  table.few_rows = few_rows<Storage>();
  table.by_columns = multiply<Operand, kColumnTile, false>;
  table.row_to_a_panel = row_to_a_panel<Storage, Operand>;
  table.rows_to_column_panels = rows_to_column_panels<Storage, Operand>;
  table.transposed_b_panel = transposed_b_panel<Storage, Operand>;
  table.sum_column_panel = sum_column_panel<Operand>;
#define CLIPUP_FINISH(Type, name)                                       \
  table.finish_hidden[static_cast<int>(Activation::k##Type)] =          \
      finish_hidden<Storage, Operand, Type, FloatSums>;                 \
  table.finish_int8_hidden[static_cast<int>(Activation::k##Type)] =     \
      finish_hidden<Storage, Operand, Type, Int8Sums>;                  \
  table.finish_hidden_gradient[static_cast<int>(Activation::k##Type)] = \
      finish_hidden_gradient<Storage, Operand, Type>;
  CLIPUP_ACTIVATIONS(CLIPUP_FINISH)
#undef CLIPUP_FINISH
  table.finish_output = finish_output<Storage, FloatSums>;
  table.finish_int8_output = finish_int8_output<Storage>;
  table.attention_shares = attention_shares<Storage, Operand, FloatScores>;
  table.int8_attention_shares = attention_shares<Storage, Int8Quads, Int8Scores>;
  table.quantize_keys = quantize_keys<Storage>;
  table.quantize_values = quantize_values<Storage>;
  table.finish_attention = finish_attention<Storage>;
  table.finish_int8_attention = finish_int8_attention<Storage>;
  table.weighted_sum = weighted_sum<Storage>;
  table.dot = dot<Storage>;
  table.quantize_row = quantize_row<Storage>;
  table.quantize_hidden_row = quantize_hidden_row;
  table.router_logits = router_logits<Storage>;
  table.router_input_gradient = router_input_gradient<Storage>;
  table.router_weight_gradient = router_weight_gradient<Storage>;
  return table;
}

constexpr Kernels tier(const char* name) {
  return {name,
          kPanel,
          kColumnTile,
          streams_done,
          release_tiles,
          {typed_kernels<Float32, Floats>(), typed_kernels<BFloat16, BFloat16Operand>(),
           typed_kernels<Float16, Floats>()},
          products_of<Int8Quads>()};
}

}  // namespace
}  // namespace clipup
