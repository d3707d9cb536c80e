// Shared by the forward and backward pass: argument checks, packing rows, the first product.
#pragma once

#include <cstdint>
#include <vector>

#include "../moe.h"
#include "grouped_gemm.h"

namespace clipup {

// Throw std::invalid_argument that names the argument.
void check_dtype(DType dtype);
void check_packed_type(PackedType type, std::int64_t k);
void check_offsets(const std::int32_t* offsets, std::int64_t E, std::int64_t R);
void check_experts(const Experts& experts);
void check_routing(const Routing& routing, std::int64_t E);

inline std::int64_t token_of_row(const Routing& routing, std::int64_t row) {
  return routing.choice_of_row == nullptr ? row : routing.choice_of_row[row] / routing.K;
}

// A tile of rows of a wave: rows [row, row + rows) of the piece.
struct RowTile {
  const Piece* piece;
  std::int64_t row, rows;
};
std::vector<RowTile> row_tiles(const Wave& wave, const Products& products);

// Calls body(tile) for every tile of the wave, spread over the team's threads.
template <class Body>
void for_row_tiles(const Wave& wave, const Products& products, const Body& body, Team team = {}) {
  const std::vector<RowTile> tiles = row_tiles(wave, products);
  team.tasks(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t i, std::int64_t) { body(tiles[i]); });
}

// What surrounds int8 products of E matrices [n, k]: the scales of the sums, and the scales and shifts of the
// inputs.
class Int8Scales {
 public:
  Int8Scales(const Matrices& matrices, std::int64_t E);

  // Those of a tile from `column` on; row_scales and row_middles (null: 0): of its rows.
  Int8Scaling at(std::int64_t expert, std::int64_t column, const float* row_scales,
                 const float* row_middles = nullptr) const {
    const std::int64_t at = expert * columns_ + column;
    return {row_scales, scales_ + at, sums_ + at, row_middles};
  }
  // As `TypedKernels::quantize_row` takes them.
  const float* of_inputs(std::int64_t expert) const { return inputs_ + expert * 2 * input_stride_; }
  // Whether another matrix of the same inputs has the same input scales and shifts.
  bool same_inputs(const Int8Scales& other, std::int64_t E) const;

 private:
  std::int64_t columns_, input_stride_;
  const float *scales_ = nullptr, *inputs_ = nullptr;
  const std::int32_t* sums_ = nullptr;
};

// Packs the tokens of the tile's rows, of k elements, into an A panel of the wave: as they are, or, with
// `int8`, quantized; then the scales of the wave's rows are written.
void pack_a_panels(const Kernels& kernels, DType dtype, std::int64_t k, const Routing& routing,
                   const RowTile& tile, const void* tokens, Word* a_panels, const Int8Scales* int8 = nullptr,
                   float* scales = nullptr);

// Elements from one expert's W_in to the next one's.
inline std::int64_t in_stride(const Experts& experts) {
  return experts.in_stride == 0 ? experts.H * experts.D : experts.in_stride;
}

// The matrices of the forward pass.
inline Matrices in_matrices(const Experts& of) {
  return {of.dtype, true, of.H, of.D, of.in_weight, in_stride(of), of.packed_in, of.packed_type};
}
inline Matrices gate_matrices(const Experts& of) {
  return {of.dtype, true, of.H, of.D, of.gate_weight, in_stride(of), of.packed_gate, of.packed_type};
}
inline Matrices out_matrices(const Experts& of) {
  return {of.dtype, true, of.D, of.H, of.out_weight, of.D * of.H, of.packed_out, of.packed_type};
}

// Addresses of a piece's pre-activations: those of its row `i` are at z + i * H; null: not kept.
struct PreActivations {
  void *z, *z_gate;
};

// First product of a wave: writes a in A panels (null: not wanted), and the pre-activations of every piece to
// `places`. int8: with x_scales of the wave's rows, a is written to rows of floats; null: the weights are
// exact.
struct Int8Hidden {
  const Int8Scales &in, &gate;
  const float* x_scales;
  float* hidden;
  std::int64_t stride;
};
void hidden_product(const Experts& experts, const Wave& wave, const Word* x_a_panels, Word* hidden_a_panels,
                    const std::vector<PreActivations>& places, const Workspace& workspace,
                    const Int8Hidden* int8 = nullptr, Team team = {});

// A product whose results are rows: the matrix of a row's expert times the row, plus the bias.
struct RowProduct {
  const Matrices& matrices;
  const void* bias;   // [E, n] or null
  void* out;          // [R, n] of the storage type, or null: not wanted
  float* sums;        // [R, n], instead of `out`
  Int8Scales scales;  // of int8 matrices

  // The rows of a wave, in A panels of `row_words` words a row; row_scales, row_middles (null: 0): of int8
  // rows.
  void run(const Wave& wave, const Word* a_panels, std::int64_t row_words, const float* row_scales,
           const float* row_middles, const Workspace& workspace, Team team) const;
};

// y[t] = the gated sum of the rows of every token, from rows[R,D] in float.
void sum_rows(const Kernels& kernels, DType dtype, const Routing& routing, const float* gates,
              const float* rows, std::int64_t D, void* y);

}  // namespace clipup
