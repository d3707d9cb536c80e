#include "weight_gradient.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "element.h"
#include "expert_rows.h"

namespace clipup {
namespace {

// A gradient of more bytes, with the layer's other gradients, leaves the last-level cache before it is read.
constexpr std::int64_t kLarge = std::int64_t{8} << 20U;

}  // namespace

WeightGradient::WeightGradient(const Kernels& kernels, DType dtype, std::int64_t E, std::int64_t rows,
                               std::int64_t columns, std::int64_t stride, void* weight, void* bias,
                               const std::vector<Wave>& waves, const ColumnPanels& left,
                               const ColumnPanels& right)
    : kernels_(&kernels),
      dtype_(dtype),
      E_(E),
      rows_(rows),
      columns_(columns),
      stride_(stride),
      weight_(rows * columns == 0 ? nullptr : weight),
      bias_(bias),
      left_(&left),
      right_(&right),
      large_(E * rows * columns * element_size(dtype) > kLarge),
      bias_sum_(bias == nullptr ? 0 : E * rows) {
  expect_whole_write(weight, E * rows * columns * element_size(dtype));
  const bool pieces_meet =
      std::any_of(waves.begin(), waves.end(), [](const Wave& wave) { return !wave.pieces.front().last; });
  // float32 gradients are summed in place.
  if (pieces_meet && weight != nullptr && dtype != DType::kFloat32) sum_ = Buffer<float>(rows * columns);
  std::fill_n(bias_sum_.get(), bias == nullptr ? 0 : E * rows, 0.0F);
}

std::vector<Block> WeightGradient::blocks(const Wave& wave) const {
  if (rows_ == 0) return {};
  return make_weight_blocks(wave, rows_, weight_ == nullptr ? 1 : columns_, *kernels_);
}

void WeightGradient::run(const Block& block, const Workspace& workspace, std::int64_t thread) const {
  const TypedKernels& typed = kernels_->of(dtype_);
  const Piece& piece = *block.piece;
  const std::int64_t words = ceil_div(piece.count, typed.per_word);
  const std::int64_t tile_rows = kernels_->column_tile;
  if (bias_ != nullptr && block.panel == 0) {
    float* const sums = bias_sum_.get() + piece.expert * rows_;
    for (std::int64_t row = block.row; row < block.row + block.rows; row += tile_rows) {
      std::array<float, kMostColumnTile> tile{};
      typed.sum_column_panel(left_->of(piece) + row * words, words, tile.data());
      for (std::int64_t i = 0; i < tile_rows && row + i < rows_; ++i) sums[row + i] += tile[i];
    }
  }
  if (weight_ == nullptr) return;
  multiply_columns(*kernels_, typed, left_->of(piece), right_->of(piece), ceil_div(columns_, kernels_->panel),
                   words, block, workspace, thread,
                   [&](std::int64_t tile_index, std::int64_t panel, const float* c) {
                     const std::int64_t row = tile_index * tile_rows;
                     const std::int64_t column = panel * kernels_->panel;
                     const std::int64_t at = row * columns_ + column;
                     void* const out = element(weight_, dtype_, piece.expert * stride_ + at);
                     float* meet = static_cast<float*>(out);
                     if (dtype_ != DType::kFloat32) meet = sum_.get() == nullptr ? nullptr : sum_.get() + at;
                     OutputTile tile{};
                     tile.end = std::min(tile_rows, rows_ - row);
                     tile.columns = std::min(kernels_->panel, columns_ - column);
                     tile.c = c;
                     tile.stride = columns_;
                     tile.stream = large_ && piece.last;
                     tile.previous = piece.first ? nullptr : meet;
                     tile.sum = piece.last ? nullptr : meet;
                     tile.out = piece.last ? out : nullptr;
                     typed.finish_output(tile);
                   });
  kernels_->streams_done();
}

void WeightGradient::finish(const std::int32_t* offsets) const {
  const std::int64_t count = rows_ * columns_;
  parallel_for(weight_ == nullptr || count == 0 ? 0 : E_, 2, [&](std::int64_t e) {
    if (offsets[e + 1] > offsets[e]) return;
    std::memset(element(weight_, dtype_, e * stride_), 0, count * element_size(dtype_));
  });
  for (std::int64_t i = 0; bias_ != nullptr && i < E_ * rows_; ++i) {
    const float value = bias_sum_.get()[i];
    void* const out = element(bias_, dtype_, i);
    if (dtype_ == DType::kFloat32) {
      *static_cast<float*>(out) = value;
    } else {
      *static_cast<std::uint16_t*>(out) =
          dtype_ == DType::kBFloat16 ? BFloat16::store(value) : Float16::store(value);
    }
  }
}

}  // namespace clipup
