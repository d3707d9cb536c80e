// grouped_linear: one linear layer per expert, and its gradients.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "element.h"
#include "expert_rows.h"
#include "weight_gradient.h"

namespace clipup {
namespace {

void check_grouped(DType dtype, const std::int32_t* offsets, std::int64_t R, std::int64_t E, std::int64_t O,
                   std::int64_t I) {
  check_dtype(dtype);
  check_size("E", E, 0);
  check_size("O", O, 0);
  check_size("I", I, 0);
  check_size("R", R, 0);
  check_row_count(R, 1);
  check_offsets(offsets, E, R);
}

// Zeroes rows [R, n] past the last expert's.
void clear_rest(void* rows, DType dtype, std::int64_t used, std::int64_t R, std::int64_t n) {
  if (rows != nullptr && R > used && n > 0) {
    std::memset(element(rows, dtype, used * n), 0, (R - used) * n * element_size(dtype));
  }
}

void multiply_rows(const void* rows, const Matrices& matrices, const void* bias, const std::int32_t* offsets,
                   std::int64_t E, void* out) {
  const Kernels& ks = kernels();
  const bool int8 = matrices.packed_type == PackedType::kInt8;
  const Products& products = matrices.products(ks);
  const ForwardWaves waves(offsets, E, int8, products);
  const std::int64_t words = a_row_words(matrices.k, products);
  const Buffer<Word> all_panels(waves.rows_in_memory() * words);
  const Buffer<float> all_scales(int8 ? waves.rows_in_memory() : 0);
  const RowProduct product{matrices, bias, out, nullptr, Int8Scales(matrices, E)};
  const Routing in_order{offsets[E], 1, nullptr, offsets, nullptr, nullptr};
  const Workspace workspace(ks, 1);
  waves.each([&](const Wave& wave, Team team, std::int64_t row) {
    Word* const a_panels = all_panels.get() + row * words;
    float* const scales = all_scales.get() + row;
    for_row_tiles(
        wave, products,
        [&](const RowTile& tile) {
          pack_a_panels(ks, matrices.dtype, matrices.k, in_order, tile, rows, a_panels,
                        int8 ? &product.scales : nullptr, scales);
        },
        team);
    product.run(wave, a_panels, words, scales, nullptr, workspace, team);
  });
}

}  // namespace

void grouped_linear(DType dtype, const void* rows, const void* weight, const void* bias,
                    const std::int32_t* offsets, std::int64_t R, std::int64_t E, std::int64_t O,
                    std::int64_t I, void* out, const void* packed, PackedType packed_type) {
  check_grouped(dtype, offsets, R, E, O, I);
  check_pointer("rows", rows, R * I);
  check_packed_type(packed_type, I);
  if (packed == nullptr) check_pointer("weight", weight, E * O * I);
  check(packed != nullptr || packed_type == PackedType::kExact, "packed: expected an int8 weight, got none");
  check_pointer("out", out, R * O);
  multiply_rows(rows, {dtype, true, O, I, weight, O * I, packed, packed_type}, bias, offsets, E, out);
  clear_rest(out, dtype, offsets[E], R, O);
}

void grouped_linear_backward(DType dtype, const void* d_out, const void* rows, const void* weight,
                             const std::int32_t* offsets, std::int64_t R, std::int64_t E, std::int64_t O,
                             std::int64_t I, void* d_rows, void* d_weight, void* d_bias) {
  check_grouped(dtype, offsets, R, E, O, I);
  check_pointer("d_out", d_out, R * O);
  check_pointer("rows", rows, R * I);
  check_pointer("weight", weight, E * O * I);
  if (d_rows != nullptr) {
    multiply_rows(d_out, {dtype, false, I, O, weight, O * I}, nullptr, offsets, E, d_rows);
    clear_rest(d_rows, dtype, offsets[E], R, I);
  }
  if (d_weight == nullptr && d_bias == nullptr) return;

  const Kernels& ks = kernels();
  const TypedKernels& typed = ks.of(dtype);
  const std::vector<Wave> waves = make_waves(offsets, E, kWaveRows, typed);
  const ColumnPanels left(waves, O, ks.column_tile);
  const ColumnPanels right(waves, I, ks.panel);
  const Workspace workspace(ks, 1);
  const WeightGradient gradient(ks, dtype, E, O, I, O * I, d_weight, d_bias, waves, left, right);
  for (const Wave& wave : waves) {
    for_row_tiles(wave, typed, [&](const RowTile& tile) {
      const Piece& piece = *tile.piece;
      const std::int64_t panel_words = ceil_div(piece.count, typed.per_word);
      for (std::int64_t i = 0; i < tile.rows; i += typed.per_word) {
        const void* left_rows[2] = {nullptr, nullptr};
        const void* right_rows[2] = {nullptr, nullptr};
        for (std::int64_t r = 0; r < typed.per_word && i + r < tile.rows; ++r) {
          const std::int64_t row = piece.begin + tile.row + i + r;
          left_rows[r] = element(d_out, dtype, row * O);
          right_rows[r] = element(rows, dtype, row * I);
        }
        const std::int64_t word = (tile.row + i) / typed.per_word;
        typed.rows_to_column_panels(left_rows, nullptr, O, ks.column_tile, panel_words,
                                    left.of(piece) + word * ks.column_tile);
        typed.rows_to_column_panels(right_rows, nullptr, I, ks.panel, panel_words,
                                    right.of(piece) + word * ks.panel);
      }
    });
    const std::vector<Block> blocks = gradient.blocks(wave);
    parallel_tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
      gradient.run(blocks[task], workspace, thread);
    });
  }
  gradient.finish(offsets);
}

}  // namespace clipup
