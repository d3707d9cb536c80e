// Forward pass of the experts, wave by wave: gather and pack rows, first product with bias and activation,
// second product with bias; at the end combine every token's rows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "expert_rows.h"

namespace clipup {

void expert_mlp_forward(const Experts& experts, const Routing& routing, const void* x, void* y, void* z) {
  check_experts(experts);
  check_routing(routing, experts.E);
  const DType dtype = experts.dtype;
  const std::int64_t E = experts.E, D = experts.D, H = experts.H;
  const std::int64_t T = routing.T;
  const std::int64_t R = T * routing.K;
  check_pointer("x", x, T * D);
  check_pointer("y", y, T * D);
  check(z == nullptr || experts.packed_type == PackedType::kExact,
        "z: expected null with int8 weights, which have no backward pass");

  expect_whole_write(y, T * D * element_size(dtype));
  expect_whole_write(z, (experts.gated() ? 2 : 1) * R * H * element_size(dtype));

  const Kernels& ks = kernels();
  const TypedKernels& typed = ks.of(dtype);
  const bool gated = experts.gated();
  const bool identity =  // the rows are y's
      routing.K == 1 && routing.choice_of_row == nullptr && routing.gates == nullptr;
  const std::int64_t used = routing.offsets[E];
  const bool int8 = experts.packed_type == PackedType::kInt8;
  const Products& products = ks.products(dtype, experts.packed_type);
  const ForwardWaves waves(routing.offsets, E, int8, products);
  const std::int64_t wave_rows = waves.rows_in_memory();
  const std::int64_t hidden = round_up(H, ks.panel);
  const std::int64_t x_words = a_row_words(D, products);
  const std::int64_t a_words = a_row_words(hidden, typed);
  const std::int64_t int8_words = a_row_words(hidden, ks.int8);
  const Buffer<Word> all_x(wave_rows * x_words);
  const Buffer<Word> all_hidden(int8 ? 0 : wave_rows * a_words);
  const Buffer<float> all_rows(int8 ? wave_rows * hidden : 0);     // rows of floats
  const Buffer<Word> all_int8(int8 ? wave_rows * int8_words : 0);  // the same, quantized
  const Buffer<float> all_scales(int8 ? wave_rows : 0);
  const Int8Scales in_scales(int8 ? experts.packed_in : nullptr, E, H, D);
  const Int8Scales gate_scales(int8 ? experts.packed_gate : nullptr, E, H, D);
  const Int8Scales out_scales(int8 ? experts.packed_out : nullptr, E, D, H);
  check(!(int8 && gated) || gate_scales.same_inputs(in_scales, E),
        "packed_gate: expected the input scales and offsets of packed_in, got others");
  const Buffer<float> out_rows(identity ? 0 : used * D);
  const Workspace workspace(ks, gated ? 2 : 1);

  waves.each([&](const Wave& wave, Team team, std::int64_t row) {
    Word* const x_a_panels = all_x.get() + row * x_words;
    Word* const hidden_a_panels = int8 ? nullptr : all_hidden.get() + row * a_words;
    float* const rows = all_rows.get() + row * hidden;
    Word* const int8_a_panels = all_int8.get() + row * int8_words;
    float* const scales = all_scales.get() + row;
    for_row_tiles(
        wave, products,
        [&](const RowTile& tile) {
          pack_a_panels(ks, experts, routing, tile, x, x_a_panels, int8 ? &in_scales : nullptr, scales);
        },
        team);
    std::vector<PreActivations> places;
    for (const Piece& piece : wave.pieces) {
      places.push_back(
          {element(z, dtype, piece.begin * H), gated ? element(z, dtype, (R + piece.begin) * H) : nullptr});
    }
    const Int8Hidden int8_hidden{in_scales, gate_scales, scales, rows, hidden};
    hidden_product(experts, wave, x_a_panels, hidden_a_panels, places, workspace,
                   int8 ? &int8_hidden : nullptr, team);
    if (int8) {
      for_row_tiles(
          wave, products,
          [&](const RowTile& tile) {
            const std::int64_t at = tile.piece->at + tile.row;
            Word* const to = a_panel_at(int8_a_panels, at, int8_words);
            for (std::int64_t i = 0; i < tile.rows; ++i) {
              scales[at + i] =
                  ks.of(DType::kFloat32)
                      .quantize_row(rows + (at + i) * hidden, out_scales.of_inputs(tile.piece->expert), H,
                                    tile.rows, to + i * kLineWords);
            }
          },
          team);
    }
    const Word* const second_a_panels = int8 ? int8_a_panels : hidden_a_panels;
    const std::int64_t second_words = int8 ? int8_words : a_words;

    const std::vector<Block> blocks =
        make_blocks(wave, D, ks, products, experts.packed_out == nullptr ? typed.few_rows : 0, team);
    const auto out_matrix = [&](const Piece& piece) {
      return forward_matrix(experts, experts.out_weight, experts.packed_out, piece.expert, D, H, D * H);
    };
    team.tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
      const Block& block = blocks[task];
      const Piece& piece = *block.piece;
      const Term term{a_panel_at(second_a_panels, piece.at + block.row, second_words), second_words,
                      out_matrix(piece)};
      multiply_block(
          ks, products, &term, 1, 1, block, following_region(blocks, task, ks, products, out_matrix, team),
          workspace, thread,
          [&](std::int64_t row, std::int64_t rows, std::int64_t panel) {
            const std::int64_t at = (piece.begin + block.row + row) * D + panel * ks.panel;
            const std::int64_t size = identity ? element_size(dtype) : sizeof(float);
            const void* const to = identity ? element(y, dtype, at) : out_rows.get() + at;
            ask_for_output(products, to, D * size, rows, ks.panel * size);
          },
          [&](std::int64_t row, std::int64_t, std::int64_t panel, const float* const* c, std::int64_t begin,
              std::int64_t end) {
            const std::int64_t column = panel * ks.panel;
            const std::int64_t at = (piece.begin + block.row + row) * D + column;
            OutputTile tile{};
            tile.begin = begin;
            tile.end = end;
            tile.columns = std::min(ks.panel, D - column);
            tile.c = c[0];
            tile.bias = element(experts.out_bias, dtype, piece.expert * D + column);
            tile.stride = D;
            if (identity) {
              tile.out = element(y, dtype, at);
            } else {
              tile.sum = out_rows.get() + at;
            }
            if (!int8) return typed.finish_output(tile);
            tile.scaling = out_scales.at(piece.expert, column, scales + piece.at + block.row + row);
            typed.finish_int8_output(tile);
          });
    });
  });

  if (z != nullptr) {
    for (std::int64_t part = 0; part < (gated ? 2 : 1); ++part) {
      void* const rest = element(z, dtype, (part * R + used) * H);
      std::memset(rest, 0, (R - used) * H * element_size(dtype));
    }
  }
  if (!identity) sum_rows(ks, dtype, routing, routing.gates, out_rows.get(), D, y);
}

}  // namespace clipup
