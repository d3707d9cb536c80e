// Forward pass of the experts, wave by wave: gather and pack rows, first product with bias and activation,
// second product with bias; at the end combine every token's rows.
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
  const bool gated = experts.gated();
  const bool identity =  // the rows are y's
      routing.K == 1 && routing.choice_of_row == nullptr && routing.gates == nullptr;
  const std::int64_t used = routing.offsets[E];
  const bool int8 = experts.packed_type == PackedType::kInt8;
  const Matrices in = in_matrices(experts), gate = gate_matrices(experts), out = out_matrices(experts);
  const Products& products = in.products(ks);
  const ForwardWaves waves(routing.offsets, E, int8, products);
  const std::int64_t wave_rows = waves.rows_in_memory();
  const std::int64_t hidden = round_up(H, ks.panel);
  const std::int64_t x_words = a_row_words(D, products);
  const std::int64_t hidden_words = a_row_words(hidden, products);
  const Buffer<Word> all_x(wave_rows * x_words);
  const Buffer<Word> all_hidden(wave_rows * hidden_words);
  const Buffer<float> all_rows(int8 ? wave_rows * hidden : 0);  // of hidden activations, to be quantized
  const Buffer<float> all_scales(int8 ? wave_rows : 0), all_middles(int8 ? wave_rows : 0);
  const Int8Scales in_scales(in, E), gate_scales(gate, E);
  check(!(int8 && gated) || gate_scales.same_inputs(in_scales, E),
        "packed_gate: expected the input scales and offsets of packed_in, got others");
  const Buffer<float> out_rows(identity ? 0 : used * D);
  const RowProduct second{out, experts.out_bias, identity ? y : nullptr, out_rows.get(), Int8Scales(out, E)};
  const Workspace workspace(ks, gated ? 2 : 1);

  waves.each([&](const Wave& wave, Team team, std::int64_t row) {
    Word* const x_a_panels = all_x.get() + row * x_words;
    Word* const hidden_a_panels = all_hidden.get() + row * hidden_words;
    float* const rows = all_rows.get() + row * hidden;
    float* const scales = all_scales.get() + row;
    float* const middles = all_middles.get() + row;
    for_row_tiles(
        wave, products,
        [&](const RowTile& tile) {
          pack_a_panels(ks, dtype, D, routing, tile, x, x_a_panels, int8 ? &in_scales : nullptr, scales);
        },
        team);
    std::vector<PreActivations> places;
    for (const Piece& piece : wave.pieces) {
      places.push_back(
          {element(z, dtype, piece.begin * H), gated ? element(z, dtype, (R + piece.begin) * H) : nullptr});
    }
    const Int8Hidden int8_hidden{in_scales, gate_scales, scales, rows, hidden};
    hidden_product(experts, wave, x_a_panels, int8 ? nullptr : hidden_a_panels, places, workspace,
                   int8 ? &int8_hidden : nullptr, team);
    if (int8) {
      for_row_tiles(
          wave, products,
          [&](const RowTile& tile) {
            const std::int64_t at = tile.piece->at + tile.row;
            Word* const to = a_panel_at(hidden_a_panels, at, hidden_words);
            for (std::int64_t i = 0; i < tile.rows; ++i) {
              const float* const inputs = second.scales.of_inputs(tile.piece->expert);
              scales[at + i] = ks.of(DType::kFloat32)
                                   .quantize_hidden_row(rows + (at + i) * hidden, inputs, H, tile.rows,
                                                        to + i * kLineWords, middles + at + i);
            }
          },
          team);
    }
    second.run(wave, hidden_a_panels, hidden_words, scales, int8 ? middles : nullptr, workspace, team);
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
