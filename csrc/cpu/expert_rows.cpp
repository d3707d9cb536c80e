#include "expert_rows.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "../checks.h"

namespace clipup {

void check_dtype(DType dtype) {
  const int value = static_cast<int>(dtype);
  check(value >= 0 && value < 3, [&] {
    return "dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(value);
  });
}

void check_packed_type(PackedType type, std::int64_t k) {
  const int value = static_cast<int>(type);
  check(value == 0 || value == 1,
        [&] { return "packed_type: expected 0 (exact) or 1 (int8), got " + std::to_string(value); });
  constexpr std::int64_t kMost = 65536;  // a sum of more products than that could pass 2^31
  check(type == PackedType::kExact || k <= kMost, [&] {
    return "packed_type: expected at most 65536 inputs of an int8 weight, got " + std::to_string(k);
  });
}

void check_offsets(const std::int32_t* offsets, std::int64_t E, std::int64_t R) {
  check_pointer("offsets", offsets, E + 1);
  check_values("offsets", offsets, E + 1, 0, R + 1);
  check(offsets[0] == 0, [&] { return "offsets: expected 0 first, got " + std::to_string(offsets[0]); });
  check(std::is_sorted(offsets, offsets + E + 1), "offsets: expected ascending values");
}

void check_experts(const Experts& experts) {
  const DType dtype = experts.dtype;
  const std::int64_t E = experts.E, D = experts.D, H = experts.H;
  check_dtype(dtype);
  check(static_cast<int>(experts.activation) >= 0 && static_cast<int>(experts.activation) < kActivations,
        [&] {
          return "activation: expected 0 to " + std::to_string(kActivations - 1) + ", got " +
                 std::to_string(static_cast<int>(experts.activation));
        });
  check_size("E", E, 0);
  check_size("D", D, 0);
  check_size("H", H, 0);
  check(experts.in_stride == 0 || experts.in_stride >= H * D,
        [&] { return "in_stride: expected 0 or at least H*D, got " + std::to_string(experts.in_stride); });
  if (experts.packed_in == nullptr) check_pointer("in_weight", experts.in_weight, E * H * D);
  if (experts.packed_out == nullptr) check_pointer("out_weight", experts.out_weight, E * D * H);
  check_packed_type(experts.packed_type, D);
  check_packed_type(experts.packed_type, H);
  check(experts.packed_type == PackedType::kExact ||
            (experts.packed_in != nullptr && experts.packed_out != nullptr && experts.gate_weight == nullptr),
        "packed_type: expected all matrices packed, got a plain one");
  check(experts.gate_bias == nullptr || experts.gated(),
        "gate_bias: expected gate_weight beside it, got none");
}

void check_routing(const Routing& routing, std::int64_t E) {
  const std::int64_t T = routing.T, K = routing.K;
  const float* const gates = routing.gates;
  const std::int32_t* const offsets = routing.offsets;
  const std::int32_t* const choice_of_row = routing.choice_of_row;
  const std::int32_t* const row_of_choice = routing.row_of_choice;
  check_row_count(T, K);
  check_offsets(offsets, E, T * K);
  check((choice_of_row == nullptr) == (row_of_choice == nullptr) || T * K == 0,
        "choice_of_row: expected both it and row_of_choice, or neither");
  check(T * K == 0 || gates != nullptr || K == 1,
        [&] { return "K: expected 1 without gates, got " + std::to_string(K); });
  check(T * K == 0 || gates == nullptr || choice_of_row != nullptr,
        "gates: expected routing beside them, got none");
  if (choice_of_row == nullptr) {
    check(offsets[E] == T * K, [&] {
      return "offsets: expected all " + std::to_string(T * K) + " rows, got " + std::to_string(offsets[E]);
    });
    return;
  }
  check_values("choice_of_row", choice_of_row, offsets[E], 0, T * K);
  check_values("row_of_choice", row_of_choice, T * K, -1, offsets[E]);
}

std::vector<RowTile> row_tiles(const Wave& wave, const Products& products) {
  std::vector<RowTile> tiles;
  for (const Piece& piece : wave.pieces) {
    for (std::int64_t row = 0; row < piece.count; row += products.tile_rows) {
      tiles.push_back({&piece, row, std::min(products.tile_rows, piece.count - row)});
    }
  }
  return tiles;
}

Int8Scales::Int8Scales(const Matrices& matrices, std::int64_t E)
    : columns_(round_up(matrices.n, kernels().panel)), input_stride_(int8_input_stride(matrices.k)) {
  if (matrices.packed_type != PackedType::kInt8 || matrices.packed == nullptr) return;
  const Word* const words = static_cast<const Word*>(matrices.packed) +
                            E * packed_words(kernels(), kernels().int8, matrices.n, matrices.k);
  scales_ = reinterpret_cast<const float*>(words);
  sums_ = reinterpret_cast<const std::int32_t*>(words) + E * columns_;
  inputs_ = scales_ + 2 * E * columns_;
}

bool Int8Scales::same_inputs(const Int8Scales& other, std::int64_t E) const {
  return std::memcmp(inputs_, other.inputs_, E * 2 * input_stride_ * sizeof(float)) == 0;
}

void pack_a_panels(const Kernels& kernels, DType dtype, std::int64_t k, const Routing& routing,
                   const RowTile& tile, const void* tokens, Word* a_panels, const Int8Scales* int8,
                   float* scales) {
  const TypedKernels& typed = kernels.of(dtype);
  const std::int64_t words = a_row_words(k, int8 == nullptr ? typed : kernels.int8);
  const std::int64_t at = tile.piece->at + tile.row;
  Word* const first = a_panel_at(a_panels, at, words);
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const std::int64_t token = token_of_row(routing, tile.piece->begin + tile.row + i);
    const void* const row = element(tokens, dtype, token * k);
    Word* const to = first + i * kLineWords;
    if (int8 == nullptr) {
      typed.row_to_a_panel(row, k, tile.rows, to);
    } else {
      scales[at + i] = typed.quantize_row(row, int8->of_inputs(tile.piece->expert), k, tile.rows, to);
    }
  }
}

void hidden_product(const Experts& experts, const Wave& wave, const Word* x_a_panels, Word* hidden_a_panels,
                    const std::vector<PreActivations>& places, const Workspace& workspace,
                    const Int8Hidden* int8, Team team) {
  const Kernels& ks = kernels();
  const TypedKernels& typed = ks.of(experts.dtype);
  const DType dtype = experts.dtype;
  const Products& products = ks.products(dtype, experts.packed_type);
  const std::int64_t D = experts.D, H = experts.H;
  const bool gated = experts.gated();
  const std::int64_t x_words = a_row_words(D, products);
  const std::int64_t a_words = a_row_words(round_up(H, ks.panel), typed);
  const auto finish_hidden = int8 != nullptr ? typed.finish_int8_hidden[static_cast<int>(experts.activation)]
                                             : typed.finish_hidden[static_cast<int>(experts.activation)];
  const Matrices in = in_matrices(experts), gate = gate_matrices(experts);
  const std::vector<Block> blocks = make_blocks(wave, in, ks, team);
  const auto* const first_piece = wave.pieces.data();

  team.tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
    const Block& block = blocks[task];
    const Piece& piece = *block.piece;
    const PreActivations& place = places[block.piece - first_piece];
    const Word* const a_panels = a_panel_at(x_a_panels, piece.at + block.row, x_words);
    const Term terms[2] = {{a_panels, x_words, in.of(ks, piece.expert)},
                           {a_panels, x_words, gate.of(ks, piece.expert)}};
    const std::int64_t outputs = gated ? 2 : 1;
    multiply_block(
        ks, products, terms, outputs, outputs, block, following_region(blocks, task, ks, in, team), workspace,
        thread,
        [&](std::int64_t row, std::int64_t rows, std::int64_t panel) {
          const void* const z = element(place.z, dtype, (block.row + row) * H + panel * ks.panel);
          ask_for_rows(z, H * element_size(dtype), rows, ks.panel * element_size(dtype));
        },
        [&](std::int64_t row, std::int64_t rows, std::int64_t panel, const float* const* c,
            std::int64_t begin, std::int64_t end) {
          const std::int64_t column = panel * ks.panel;
          const std::int64_t bias_at = piece.expert * H + column;
          const std::int64_t z_at = (block.row + row) * H + column;
          HiddenTile tile{};
          tile.rows = rows;
          tile.begin = begin;
          tile.end = end;
          tile.columns = std::min(ks.panel, H - column);
          tile.column = column;
          tile.c = c[0];
          tile.c_gate = gated ? c[1] : nullptr;
          tile.bias = element(experts.in_bias, dtype, bias_at);
          tile.bias_gate = element(experts.gate_bias, dtype, bias_at);
          tile.z = element(place.z, dtype, z_at);
          tile.z_gate = element(place.z_gate, dtype, z_at);
          tile.z_stride = H;
          if (int8 != nullptr) {
            const float* const row_scales = int8->x_scales + piece.at + block.row + row;
            tile.scaling = int8->in.at(piece.expert, column, row_scales);
            if (gated) tile.scaling_gate = int8->gate.at(piece.expert, column, row_scales);
            tile.z_stride = int8->stride;
            tile.int8_a = int8->hidden + (piece.at + block.row + row) * int8->stride + column;
          }
          if (hidden_a_panels != nullptr)
            tile.a = a_panel_at(hidden_a_panels, piece.at + block.row + row, a_words);
          finish_hidden(tile);
        });
  });
}

void RowProduct::run(const Wave& wave, const Word* a_panels, std::int64_t row_words, const float* row_scales,
                     const float* row_middles, const Workspace& workspace, Team team) const {
  const Kernels& ks = kernels();
  const DType dtype = matrices.dtype;
  const TypedKernels& typed = ks.of(dtype);
  const Products& products = matrices.products(ks);
  const std::int64_t n = matrices.n;
  const std::vector<Block> blocks = make_blocks(wave, matrices, ks, team);
  team.tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
    const Block& block = blocks[task];
    const Piece& piece = *block.piece;
    const Term term{a_panel_at(a_panels, piece.at + block.row, row_words), row_words,
                    matrices.of(ks, piece.expert)};
    multiply_block(
        ks, products, &term, 1, 1, block, following_region(blocks, task, ks, matrices, team), workspace,
        thread,
        [&](std::int64_t row, std::int64_t rows, std::int64_t panel) {
          const std::int64_t at = (piece.begin + block.row + row) * n + panel * ks.panel;
          const std::int64_t size = out != nullptr ? element_size(dtype) : sizeof(float);
          const void* const to = out != nullptr ? element(out, dtype, at) : sums + at;
          ask_for_output(products, to, n * size, rows, ks.panel * size);
        },
        [&](std::int64_t row, std::int64_t, std::int64_t panel, const float* const* c, std::int64_t begin,
            std::int64_t end) {
          const std::int64_t column = panel * ks.panel;
          const std::int64_t at = (piece.begin + block.row + row) * n + column;
          OutputTile tile{};
          tile.begin = begin;
          tile.end = end;
          tile.columns = std::min(ks.panel, n - column);
          tile.c = c[0];
          tile.bias = element(bias, dtype, piece.expert * n + column);
          tile.stride = n;
          if (out != nullptr) {
            tile.out = element(out, dtype, at);
          } else {
            tile.sum = sums + at;
          }
          if (matrices.packed_type == PackedType::kExact) return typed.finish_output(tile);
          const std::int64_t first = piece.at + block.row + row;
          tile.scaling = scales.at(piece.expert, column, row_scales + first,
                                   row_middles == nullptr ? nullptr : row_middles + first);
          typed.finish_int8_output(tile);
        });
  });
}

void sum_rows(const Kernels& kernels, DType dtype, const Routing& routing, const float* gates,
              const float* rows, std::int64_t D, void* y) {
  const TypedKernels& typed = kernels.of(dtype);
  parallel_for(routing.T, parallel_from(D * 4), [&](std::int64_t t) {
    const std::int64_t choice = t * routing.K;
    typed.weighted_sum(rows, routing.row_of_choice + choice, gates == nullptr ? nullptr : gates + choice,
                       routing.K, D, element(y, dtype, t * D));
  });
}

}  // namespace clipup
