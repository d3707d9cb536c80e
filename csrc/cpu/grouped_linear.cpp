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

// out[r] = the row times its expert's matrix, [n, k] if transposed, else [k, n].
void multiply_rows(DType dtype, const void* rows, const void* weight, const void* packed,
                   PackedType packed_type, const void* bias, bool transposed, const std::int32_t* offsets,
                   std::int64_t E, std::int64_t n, std::int64_t k, void* out) {
  const Kernels& ks = kernels();
  const TypedKernels& typed = ks.of(dtype);
  const bool int8 = packed_type == PackedType::kInt8;
  const Products& products = ks.products(dtype, packed_type);
  const ForwardWaves waves(offsets, E, int8, products);
  const std::int64_t words = a_row_words(k, products);
  const Buffer<Word> all_panels(waves.rows_in_memory() * words);
  const Buffer<float> all_scales(int8 ? waves.rows_in_memory() : 0);
  const Int8Scales scales(int8 ? packed : nullptr, E, n, k);
  const Workspace workspace(ks, 1);
  waves.each([&](const Wave& wave, Team team, std::int64_t first_row) {
    Word* const a_panels = all_panels.get() + first_row * words;
    float* const row_scales = all_scales.get() + first_row;
    for_row_tiles(
        wave, products,
        [&](const RowTile& tile) {
          const std::int64_t at = tile.piece->at + tile.row;
          Word* const first = a_panel_at(a_panels, at, words);
          for (std::int64_t i = 0; i < tile.rows; ++i) {
            const void* const row = element(rows, dtype, (tile.piece->begin + tile.row + i) * k);
            Word* const to = first + i * kLineWords;
            if (int8) {
              row_scales[at + i] =
                  typed.quantize_row(row, scales.of_inputs(tile.piece->expert), k, tile.rows, to);
            } else {
              typed.row_to_a_panel(row, k, tile.rows, to);
            }
          }
        },
        team);
    const std::int64_t few_rows = transposed && packed == nullptr ? typed.few_rows : 0;
    const std::vector<Block> blocks = make_blocks(wave, n, ks, products, few_rows, team);
    const auto right_of = [&](const Piece& piece) {
      return Right{element(weight, dtype, piece.expert * n * k),       dtype, transposed, n, k,
                   packed_matrix(packed, products, piece.expert, n, k)};
    };
    team.tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
      const Block& block = blocks[task];
      const Piece& piece = *block.piece;
      const Term term{a_panel_at(a_panels, piece.at + block.row, words), words, right_of(piece)};
      multiply_block(
          ks, products, &term, 1, 1, block, following_region(blocks, task, ks, products, right_of, team),
          workspace, thread,
          [&](std::int64_t row, std::int64_t tile_rows, std::int64_t panel) {
            const std::int64_t size = element_size(dtype);
            void* const to = element(out, dtype, (piece.begin + block.row + row) * n + panel * ks.panel);
            ask_for_output(products, to, n * size, tile_rows, ks.panel * size);
          },
          [&](std::int64_t row, std::int64_t, std::int64_t panel, const float* const* c, std::int64_t begin,
              std::int64_t end) {
            const std::int64_t column = panel * ks.panel;
            OutputTile tile{};
            tile.begin = begin;
            tile.end = end;
            tile.columns = std::min(ks.panel, n - column);
            tile.c = c[0];
            tile.bias = element(bias, dtype, piece.expert * n + column);
            tile.out = element(out, dtype, (piece.begin + block.row + row) * n + column);
            tile.stride = n;
            if (!int8) return typed.finish_output(tile);
            tile.scaling = scales.at(piece.expert, column, row_scales + piece.at + block.row + row);
            typed.finish_int8_output(tile);
          });
    });
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
  multiply_rows(dtype, rows, weight, packed, packed_type, bias, true, offsets, E, O, I, out);
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
    multiply_rows(dtype, d_out, weight, nullptr, PackedType::kExact, nullptr, false, offsets, E, I, O,
                  d_rows);
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
