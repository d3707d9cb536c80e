// Self-attention of all heads, from the projections as a linear layer leaves them. A task computes one head
// of one sequence: it packs the head's keys and values once, then takes the queries a tile at a time, so that
// scores and shares stay in the first-level cache.
#include <algorithm>
#include <array>
#include <cmath>

#include "../checks.h"
#include "expert_rows.h"

namespace clipup {
namespace {

// Memory of one thread, in words; `scratch` and `columns` are for int8, `columns` for both of its operands.
struct Room {
  std::int64_t keys, values, queries, shares, scores, scratch, columns;

  std::int64_t words() const {
    return round_up(keys + values + queries + shares + scores + scratch + 6 * columns, kLineWords);
  }
};

}  // namespace

void self_attention(DType dtype, const void* qkv, const float* mask, std::int64_t mask_batch_stride,
                    std::int64_t mask_head_stride, std::int64_t B, std::int64_t L, std::int64_t heads,
                    std::int64_t d, void* out, PackedType type) {
  check_dtype(dtype);
  check_size("B", B, 0);
  check_size("L", L, 0);
  check_size("heads", heads, 0);
  check_size("d", d, 0);
  check_row_count(B, L);
  check_packed_type(type, std::max(L, d));
  check_pointer("qkv", qkv, B * L * 3 * heads * d);
  check_pointer("out", out, B * L * heads * d);

  const Kernels& ks = kernels();
  const TypedKernels& typed = ks.of(dtype);
  const bool int8 = type == PackedType::kInt8;
  const Products& operands = ks.products(dtype, type);
  const std::int64_t stride = 3 * heads * d;  // elements from one token to the next
  const std::int64_t key_panels = ceil_div(L, ks.panel), value_panels = ceil_div(d, ks.panel);
  const std::int64_t d_words = ceil_div(d, operands.per_word);
  // Tiles take kLineWords at a time, and more for what is left over than for zeros.
  const bool in_tiles = operands.before_rows != nullptr;
  const std::int64_t key_words = round_up(ceil_div(L, operands.per_word), in_tiles ? kLineWords : 1);
  const std::int64_t query_row = a_row_words(d, operands);
  const std::int64_t share_row = a_row_words(key_panels * ks.panel, operands);
  const std::int64_t columns = std::max(key_panels, value_panels) * ks.panel;
  const Room room{key_panels * ks.panel * d_words,
                  value_panels * ks.panel * key_words,
                  operands.tile_rows * query_row,
                  operands.tile_rows * share_row,
                  operands.tile_rows * columns,
                  int8 ? ks.panel * query_row : 0,
                  int8 ? columns : 0};
  const Buffer<Word> memory(thread_count() * room.words());
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));

  const auto part_of = [&](std::int64_t task, std::int64_t token, std::int64_t which) {
    const std::int64_t sequence = task / heads, head = task % heads;
    return element(qkv, dtype, (sequence * L + token) * stride + (which * heads + head) * d);
  };
  parallel_tasks(B * heads, [&](std::int64_t task, std::int64_t thread) {
    const std::int64_t sequence = task / heads, head = task % heads;
    const std::int64_t following = task + thread_count();  // what this thread probably computes next
    Word* const keys = memory.get() + thread * room.words();
    Word* const values = keys + room.keys;
    Word* const queries = values + room.values;
    Word* const shares = queries + room.queries;
    auto* const scores = reinterpret_cast<float*>(shares + room.shares);
    Word* const scratch = shares + room.shares + room.scores;
    auto* const floats = reinterpret_cast<float*>(scratch + room.scratch);
    const auto operand = [&](Word* panels, std::int64_t which) {
      float* const first = floats + 3 * which * room.columns;  // scales, means, sums
      float* const sums = first + 2 * room.columns;
      return Int8Operand{panels, first, first + room.columns, reinterpret_cast<std::int32_t*>(sums)};
    };
    const Int8Operand int8_keys = operand(keys, 0), int8_values = operand(values, 1);
    const auto part = [&](std::int64_t token, std::int64_t which) { return part_of(task, token, which); };

    if (int8) {
      typed.quantize_keys(part(0, 1), stride, L, d, scratch, int8_keys);
      typed.quantize_values(part(0, 2), stride, L, d, key_words, int8_values);
    } else {
      for (std::int64_t panel = 0; panel < key_panels; ++panel) {
        const std::int64_t key = panel * ks.panel;
        typed.transposed_b_panel(part(key, 1), stride, std::min(ks.panel, L - key), d,
                                 keys + panel * d_words * ks.panel);
      }
      for (std::int64_t word = 0; word < key_words; ++word) {
        std::array<const void*, 2> rows{};
        for (std::int64_t i = 0; i < typed.per_word; ++i) {
          const std::int64_t key = word * typed.per_word + i;
          if (key < L) rows[i] = part(key, 2);
        }
        typed.rows_to_column_panels(rows.data(), nullptr, d, ks.panel, key_words, values + word * ks.panel);
      }
    }

    Beside nothing;
    for (std::int64_t row = 0; row < L; row += operands.tile_rows) {
      const std::int64_t rows = std::min(operands.tile_rows, L - row);
      std::array<float, kMostTileRows> inverse_sums{}, query_scales{};
      // A head's rows are far apart: the CPU's own prefetcher does not see their order.
      for (std::int64_t which = 0; which < 3 && following < B * heads; ++which) {
        ask_for_rows<2>(part_of(following, row, which), stride * element_size(dtype), rows,
                        d * element_size(dtype));
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        Word* const to = queries + i * kLineWords;
        if (int8) {
          query_scales[i] = typed.quantize_row(part(row + i, 0), nullptr, d, rows, to);
        } else {
          typed.row_to_a_panel(part(row + i, 0), d, rows, to);
        }
      }
      if (operands.before_rows != nullptr) operands.before_rows(rows);
      for (std::int64_t panel = 0; panel < key_panels; ++panel) {
        operands.by_rows[rows](queries, keys + panel * d_words * ks.panel, d_words,
                               scores + panel * rows * ks.panel, false, nothing);
      }
      AttentionTile tile{};
      tile.rows = rows;
      tile.keys = L;
      if (mask != nullptr)
        tile.mask = mask + sequence * mask_batch_stride + head * mask_head_stride + row * L;
      tile.mask_stride = L;
      tile.scale = scale;
      tile.scores = scores;
      tile.scaling = {query_scales.data(), int8_keys.scales, int8_keys.sums};
      tile.shares = shares;
      tile.inverse_sums = inverse_sums.data();
      (int8 ? typed.int8_attention_shares : typed.attention_shares)(tile);
      for (std::int64_t panel = 0; panel < value_panels; ++panel) {
        const std::int64_t column = panel * ks.panel;
        operands.by_rows[rows](shares, values + panel * key_words * ks.panel, key_words, scores, false,
                               nothing);
        void* const to = element(out, dtype, ((sequence * L + row) * heads + head) * d + column);
        const std::int64_t width = std::min(ks.panel, d - column);
        if (int8) {
          typed.finish_int8_attention(scores, inverse_sums.data(), rows, width, to, heads * d, int8_values,
                                      column);
        } else {
          typed.finish_attention(scores, inverse_sums.data(), rows, width, to, heads * d);
        }
      }
    }
  });
}

}  // namespace clipup
