// Gradients of the experts' matrices and biases: sums over the rows of an expert, each element computed by
// one task.
#pragma once

#include <cstdint>
#include <vector>

#include "../moe.h"
#include "grouped_gemm.h"

namespace clipup {

// Panels of `unit` columns of a wave's rows, which are the summed axis: column A panels or B panels, separate
// for every piece.
class ColumnPanels {
 public:
  ColumnPanels() = default;
  ColumnPanels(const std::vector<Wave>& waves, std::int64_t columns, std::int64_t unit)
      : width_(round_up(columns > 0 ? columns : 1, unit)), words_(largest(waves).words * width_) {}

  // The piece's first panel; null if nothing is packed.
  Word* of(const Piece& piece) const {
    return words_.get() == nullptr ? nullptr : words_.get() + piece.word_at * width_;
  }

 private:
  std::int64_t width_ = 0;
  Buffer<Word> words_;
};

// weight[e] = left^T right and bias[e] = the sum of left, over the rows of expert e.
class WeightGradient {
 public:
  // weight[E, rows, columns], bias[E, rows]: complete once every wave's blocks have run; null: not wanted.
  // stride: elements from one expert's weight to the next one's, at least rows * columns.
  // left, in column A panels, and right, in B panels, must outlive this object.
  WeightGradient(const Kernels& kernels, DType dtype, std::int64_t E, std::int64_t rows, std::int64_t columns,
                 std::int64_t stride, void* weight, void* bias, const std::vector<Wave>& waves,
                 const ColumnPanels& left, const ColumnPanels& right);

  std::vector<Block> blocks(const Wave& wave) const;
  void run(const Block& block, const Workspace& workspace, std::int64_t thread) const;

  // Zeros for experts without rows, and the biases in their storage type.
  void finish(const std::int32_t* offsets) const;

 private:
  const Kernels* kernels_;
  DType dtype_;
  std::int64_t E_, rows_, columns_, stride_;
  void *weight_, *bias_;
  const ColumnPanels *left_, *right_;
  bool large_;              // larger than the caches: written with streaming stores
  Buffer<float> sum_;       // [rows, columns]: sums over the pieces of the current expert
  Buffer<float> bias_sum_;  // [E, rows]
};

}  // namespace clipup
