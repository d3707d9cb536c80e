// Backward pass of the experts, wave by wave: pack dy and x for the products that read them; compute da and,
// while a tile is in the cache, everything that depends on it; then dx and the weights' gradients, each
// element computed by one task.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "expert_rows.h"
#include "weight_gradient.h"

namespace clipup {
namespace {

// Packed operands and intermediate results of a wave.
struct Rows {
  Buffer<Word> dy_a_panels, x_a_panels, dz_a_panels, dz_gate_a_panels;
  ColumnPanels x_b_panels, scaled_dy_column_panels, hidden_b_panels, dz_column_panels, dz_gate_column_panels;
  Buffer<float> gates, d_gates;
  Buffer<unsigned char> z;
};

class Backward {
 public:
  Backward(const Experts& experts, const Routing& routing, const void* dy, const void* x, const void* z,
           const ExpertGradients& gradients)
      : experts_(experts),
        routing_(routing),
        dy_(dy),
        x_(x),
        z_(z),
        wanted_(gradients),
        gated_(experts.gate_weight != nullptr),
        dtype_(experts.dtype),
        typed_(ks_.of(experts.dtype)),
        D_(experts.D),
        H_(experts.H),
        R_(routing.T * routing.K),
        used_(routing.offsets[experts.E]),
        panels_H_(ceil_div(H_, ks_.panel)),
        d_words_(a_row_words(D_, typed_)),
        h_words_(a_row_words(panels_H_ * ks_.panel, typed_)),
        need_in_(gradients.in_weight != nullptr || gradients.in_bias != nullptr ||
                 gradients.gate_weight != nullptr || gradients.gate_bias != nullptr),
        need_out_(gradients.out_weight != nullptr || gradients.out_bias != nullptr),
        in_{dtype_, false, D_, H_, experts.in_weight, in_stride(experts)},
        gate_{dtype_, false, D_, H_, experts.gate_weight, in_stride(experts)},
        out_{dtype_, false, H_, D_, experts.out_weight, D_ * H_},
        workspace_(ks_, gated_ ? 2 : 1) {
    waves_ = make_waves(routing.offsets, experts.E, kWaveRows, typed_);
    allocate();
  }

  void run() {
    for (const Wave& wave : waves_) {
      for_row_tiles(wave, typed_, [&](const RowTile& tile) { pack(tile); });
      if (z_ == nullptr)
        hidden_product(experts_, wave, rows_.x_a_panels.get(), nullptr, places(wave), workspace_);
      hidden_gradient(wave);
      sum_d_gates(wave);
      products(wave);
    }
    if (wanted_.x != nullptr) sum_rows(ks_, dtype_, routing_, nullptr, dx_rows_.get(), D_, wanted_.x);
    for (std::int64_t choice = 0; wanted_.gates != nullptr && choice < R_; ++choice) {
      const std::int32_t row = routing_.row_of_choice[choice];
      wanted_.gates[choice] = row < 0 ? 0.0F : d_gate_of_row_.get()[row];
    }
    for (const WeightGradient& gradient : weights_) gradient.finish(routing_.offsets);
  }

 private:
  void allocate() {
    const WaveSize most = largest(waves_);
    rows_.dy_a_panels = Buffer<Word>(most.rows * d_words_);
    rows_.gates = Buffer<float>(most.rows);
    if (z_ == nullptr) {
      rows_.x_a_panels = Buffer<Word>(most.rows * d_words_);
      rows_.z = Buffer<unsigned char>((gated_ ? 2 : 1) * most.rows * H_ * element_size(dtype_));
      z_rows_ = most.rows;
    }
    if (wanted_.gates != nullptr) {
      rows_.d_gates = Buffer<float>(most.rows * (panels_H_ + 1));
      d_gate_of_row_ = Buffer<float>(used_);
    }
    if (wanted_.x != nullptr) {
      rows_.dz_a_panels = Buffer<Word>(most.rows * h_words_);
      if (gated_) rows_.dz_gate_a_panels = Buffer<Word>(most.rows * h_words_);
      dx_rows_ = Buffer<float>(used_ * D_);
    }
    if (need_in_) {
      rows_.x_b_panels = ColumnPanels(waves_, D_, ks_.panel);
      rows_.dz_column_panels = ColumnPanels(waves_, H_, ks_.column_tile);
      add_weight(H_, D_, in_stride(experts_), wanted_.in_weight, wanted_.in_bias, rows_.dz_column_panels,
                 rows_.x_b_panels);
      if (gated_) {
        rows_.dz_gate_column_panels = ColumnPanels(waves_, H_, ks_.column_tile);
        add_weight(H_, D_, in_stride(experts_), wanted_.gate_weight, wanted_.gate_bias,
                   rows_.dz_gate_column_panels, rows_.x_b_panels);
      }
    }
    if (need_out_) {
      rows_.scaled_dy_column_panels = ColumnPanels(waves_, D_, ks_.column_tile);
      rows_.hidden_b_panels = ColumnPanels(waves_, H_, ks_.panel);
      add_weight(D_, H_, D_ * H_, wanted_.out_weight, wanted_.out_bias, rows_.scaled_dy_column_panels,
                 rows_.hidden_b_panels);
    }
  }

  void add_weight(std::int64_t rows, std::int64_t columns, std::int64_t stride, void* weight, void* bias,
                  const ColumnPanels& left, const ColumnPanels& right) {
    weights_.emplace_back(ks_, dtype_, experts_.E, rows, columns, stride, weight, bias, waves_, left, right);
  }

  void pack(const RowTile& tile) const {
    const Piece& piece = *tile.piece;
    const std::int64_t at = piece.at + tile.row;
    const std::int64_t panel_words = ceil_div(piece.count, typed_.per_word);
    pack_a_panels(ks_, dtype_, D_, routing_, tile, dy_, rows_.dy_a_panels.get());
    if (z_ == nullptr) pack_a_panels(ks_, dtype_, D_, routing_, tile, x_, rows_.x_a_panels.get());
    for (std::int64_t i = 0; i < tile.rows; i += typed_.per_word) {
      const void* dy_rows[2] = {nullptr, nullptr};
      const void* x_rows[2] = {nullptr, nullptr};
      float gates[2] = {0.0F, 0.0F};
      for (std::int64_t r = 0; r < typed_.per_word && i + r < tile.rows; ++r) {
        const std::int64_t row = piece.begin + tile.row + i + r;
        const std::int64_t token = token_of_row(routing_, row);
        dy_rows[r] = element(dy_, dtype_, token * D_);
        x_rows[r] = element(x_, dtype_, token * D_);
        gates[r] = routing_.gates == nullptr ? 1.0F : routing_.gates[routing_.choice_of_row[row]];
        rows_.gates.get()[at + i + r] = gates[r];
        if (wanted_.gates == nullptr) continue;
        const void* const bias = element(experts_.out_bias, dtype_, piece.expert * D_);
        rows_.d_gates.get()[(at + i + r) * (panels_H_ + 1)] =
            bias == nullptr ? 0.0F : typed_.dot(dy_rows[r], bias, D_);
      }
      const std::int64_t word = (tile.row + i) / typed_.per_word;
      if (need_in_) {
        typed_.rows_to_column_panels(x_rows, nullptr, D_, ks_.panel, panel_words,
                                     rows_.x_b_panels.of(piece) + word * ks_.panel);
      }
      if (need_out_) {
        typed_.rows_to_column_panels(dy_rows, gates, D_, ks_.column_tile, panel_words,
                                     rows_.scaled_dy_column_panels.of(piece) + word * ks_.column_tile);
      }
    }
  }

  // The piece's pre-activations: saved, or recomputed.
  PreActivations place(const Piece& piece) const {
    if (z_ == nullptr) {
      return {element(rows_.z.get(), dtype_, piece.at * H_),
              gated_ ? element(rows_.z.get(), dtype_, (z_rows_ + piece.at) * H_) : nullptr};
    }
    void* const saved = const_cast<void*>(z_);  // only read
    return {element(saved, dtype_, piece.begin * H_),
            gated_ ? element(saved, dtype_, (R_ + piece.begin) * H_) : nullptr};
  }

  std::vector<PreActivations> places(const Wave& wave) const {
    std::vector<PreActivations> all;
    for (const Piece& piece : wave.pieces) all.push_back(place(piece));
    return all;
  }

  void hidden_gradient(const Wave& wave) {
    const std::vector<Block> blocks = make_blocks(wave, out_, ks_);
    const auto finish = typed_.finish_hidden_gradient[static_cast<int>(experts_.activation)];
    parallel_tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
      const Block& block = blocks[task];
      const Piece& piece = *block.piece;
      const PreActivations saved = place(piece);
      const Term term{a_panel_at(rows_.dy_a_panels.get(), piece.at + block.row, d_words_), d_words_,
                      out_.of(ks_, piece.expert)};
      multiply_block(
          ks_, typed_, &term, 1, 1, block, following_region(blocks, task, ks_, out_), workspace_, thread,
          [&](std::int64_t row, std::int64_t rows, std::int64_t panel) {
            const std::int64_t z_at = (block.row + row) * H_ + panel * ks_.panel;
            const std::int64_t size = element_size(dtype_);
            ask_for_rows(element(saved.z, dtype_, z_at), H_ * size, rows, ks_.panel * size);
            ask_for_rows(element(saved.z_gate, dtype_, z_at), H_ * size, rows, ks_.panel * size);
          },
          [&](std::int64_t row, std::int64_t rows, std::int64_t panel, const float* const* c, std::int64_t,
              std::int64_t end) {
            if (end < rows) return;  // all rows at once: some are stored in pairs
            const std::int64_t at = piece.at + block.row + row;
            const std::int64_t z_at = (block.row + row) * H_ + panel * ks_.panel;
            HiddenGradientTile tile{};
            tile.rows = rows;
            tile.column = panel * ks_.panel;
            tile.columns = std::min(ks_.panel, H_ - tile.column);
            tile.da = c[0];
            tile.z = element(saved.z, dtype_, z_at);
            tile.z_gate = element(saved.z_gate, dtype_, z_at);
            tile.z_stride = H_;
            tile.gates = rows_.gates.get() + at;
            if (wanted_.gates != nullptr) {
              tile.d_gates = rows_.d_gates.get() + at * (panels_H_ + 1) + 1 + panel;
              tile.d_gates_stride = panels_H_ + 1;
            }
            tile.dz = a_panel_of(rows_.dz_a_panels, at);
            tile.dz_gate = a_panel_of(rows_.dz_gate_a_panels, at);
            tile.dz_column_panels = rows_.dz_column_panels.of(piece);
            tile.dz_gate_column_panels = rows_.dz_gate_column_panels.of(piece);
            tile.hidden_b_panels = rows_.hidden_b_panels.of(piece);
            tile.panel_words = ceil_div(piece.count, typed_.per_word);
            tile.word = (block.row + row) / typed_.per_word;
            finish(tile);
          });
    });
  }

  Word* a_panel_of(const Buffer<Word>& a_panels, std::int64_t at) const {
    return a_panels.get() == nullptr ? nullptr : a_panel_at(a_panels.get(), at, h_words_);
  }

  void sum_d_gates(const Wave& wave) {
    if (wanted_.gates == nullptr) return;
    for_row_tiles(wave, typed_, [&](const RowTile& tile) {
      for (std::int64_t i = 0; i < tile.rows; ++i) {
        const float* const parts = rows_.d_gates.get() + (tile.piece->at + tile.row + i) * (panels_H_ + 1);
        float sum = 0.0F;
        for (std::int64_t part = 0; part <= panels_H_; ++part) sum += parts[part];
        d_gate_of_row_.get()[tile.piece->begin + tile.row + i] = sum;
      }
    });
  }

  // dx and the weights' gradients: independent of each other, one list of tasks.
  void products(const Wave& wave) {
    std::vector<Block> blocks;
    std::vector<std::size_t> ends;  // of every product's blocks
    if (wanted_.x != nullptr) blocks = make_blocks(wave, in_, ks_);
    const std::size_t dx_end = blocks.size();
    for (const WeightGradient& gradient : weights_) {
      const std::vector<Block> more = gradient.blocks(wave);
      blocks.insert(blocks.end(), more.begin(), more.end());
      ends.push_back(blocks.size());
    }
    parallel_tasks(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t task, std::int64_t thread) {
      const auto index = static_cast<std::size_t>(task);
      if (index < dx_end) {
        const auto following = task + thread_count() < static_cast<std::int64_t>(dx_end)
                                   ? following_region(blocks, task, ks_, in_)
                                   : Prefetch{};
        return input_gradient(blocks[index], following, thread);
      }
      const std::size_t which = std::upper_bound(ends.begin(), ends.end(), index) - ends.begin();
      weights_[which].run(blocks[index], workspace_, thread);
    });
  }

  void input_gradient(const Block& block, const Prefetch& following, std::int64_t thread) {
    const Piece& piece = *block.piece;
    const std::int64_t at = piece.at + block.row;
    const Term terms[2] = {{a_panel_of(rows_.dz_a_panels, at), h_words_, in_.of(ks_, piece.expert)},
                           {a_panel_of(rows_.dz_gate_a_panels, at), h_words_, gate_.of(ks_, piece.expert)}};
    multiply_block(ks_, typed_, terms, gated_ ? 2 : 1, 1, block, following, workspace_, thread, nothing_ahead,
                   [&](std::int64_t row, std::int64_t, std::int64_t panel, const float* const* c,
                       std::int64_t begin, std::int64_t end) {
                     OutputTile tile{};
                     tile.begin = begin;
                     tile.end = end;
                     tile.columns = std::min(ks_.panel, D_ - panel * ks_.panel);
                     tile.c = c[0];
                     tile.sum = dx_rows_.get() + (piece.begin + block.row + row) * D_ + panel * ks_.panel;
                     tile.stride = D_;
                     typed_.finish_output(tile);
                   });
  }

  const Experts& experts_;
  const Routing& routing_;
  const void *dy_, *x_, *z_;
  const ExpertGradients& wanted_;
  const Kernels& ks_ = kernels();
  const bool gated_;
  const DType dtype_;
  const TypedKernels& typed_;
  const std::int64_t D_, H_, R_, used_;
  const std::int64_t panels_H_, d_words_, h_words_;
  const bool need_in_, need_out_;
  const Matrices in_, gate_, out_;  // [k, n]: the backward pass sums over their rows
  const Workspace workspace_;
  std::int64_t z_rows_ = 0;
  std::vector<Wave> waves_;
  Rows rows_;
  std::vector<WeightGradient> weights_;
  Buffer<float> dx_rows_, d_gate_of_row_;
};

}  // namespace

void expert_mlp_backward(const Experts& experts, const Routing& routing, const void* dy, const void* x,
                         const void* z, const ExpertGradients& gradients) {
  check_experts(experts);
  check(experts.packed_type == PackedType::kExact,
        "packed_type: expected 0 (exact), int8 weights have no backward pass");
  check_routing(routing, experts.E);
  const std::int64_t T = routing.T;
  check(T * routing.K == 0 || routing.choice_of_row != nullptr, "choice_of_row: expected an array, got none");
  check_pointer("dy", dy, T * experts.D);
  check_pointer("x", x, T * experts.D);
  check_pointer("in_weight", experts.in_weight, experts.E * experts.H * experts.D);
  check_pointer("out_weight", experts.out_weight, experts.E * experts.H * experts.D);
  const bool gate_wanted = gradients.gate_weight != nullptr || gradients.gate_bias != nullptr;
  check(!gate_wanted || experts.gate_weight != nullptr, "gate_weight: expected one whose gradient is wanted");
  Backward(experts, routing, dy, x, z, gradients).run();
}

}  // namespace clipup
