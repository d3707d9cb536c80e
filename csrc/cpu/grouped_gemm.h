// Products of rows with their experts' matrices: splitting the rows of a call into waves and blocks, and the
// loops of a block over the cache. The caller finishes the tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace clipup {

inline std::int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Element `index` of an array of `dtype`; null stays null.
inline const void* element(const void* array, DType dtype, std::int64_t index) {
  return array == nullptr ? nullptr : static_cast<const unsigned char*>(array) + index * element_size(dtype);
}
inline void* element(void* array, DType dtype, std::int64_t index) {
  return array == nullptr ? nullptr : static_cast<unsigned char*>(array) + index * element_size(dtype);
}

// Rows of one expert that are processed together.
struct Piece {
  std::int64_t expert;
  std::int64_t begin, count;  // rows [begin, begin + count) of the call
  std::int64_t at;            // the first row's place in the wave
  std::int64_t word_at;       // the first row's place in the wave where rows are the summed axis, in words
  bool first, last;           // whether it is the first, or the last, piece of the expert
};

// Pieces that are processed together, so that their intermediate results are in memory at the same time.
struct Wave {
  std::vector<Piece> pieces;
  std::int64_t rows = 0, words = 0;
};

// All rows, experts ascending, in waves of at most `most_rows` rows. An expert with more than that has
// several pieces, each in its own wave, so that a sum over an expert's rows is computed by one task at a
// time.
std::vector<Wave> make_waves(const std::int32_t* offsets, std::int64_t E, std::int64_t most_rows,
                             const Products& products);

// Largest number of rows and of words of any wave.
struct WaveSize {
  std::int64_t rows = 0, words = 0;
};
WaveSize largest(const std::vector<Wave>& waves);

// Block size for a summed axis of `words` words; the last block is shorter.
std::int64_t sum_block(std::int64_t words);
constexpr std::int64_t kMostSumWords = 768;
constexpr std::int64_t kBlockColumns = 128;

// The same for few rows and a matrix that is packed for them: a packed block fits the first-level cache
// beside the rows' words and sums.
constexpr std::int64_t kFewRowsSumWords = 96;
constexpr std::int64_t kFewRowsColumns = 32;

// A block of a product: rows [row, row + rows) of a piece, `panels` B panels from `panel` on, at most
// `most_words` words of the summed axis at a time.
struct Block {
  const Piece* piece;
  std::int64_t row, rows, panel, panels;
  std::int64_t most_words = kMostSumWords;

  std::int64_t step(std::int64_t words) const {
    const std::int64_t usual = sum_block(words);
    return usual < most_words ? usual : most_words;
  }
};

// Words of a packed [n, k] matrix.
inline std::int64_t packed_words(const Kernels& kernels, const Products& products, std::int64_t n,
                                 std::int64_t k) {
  return ceil_div(k, products.per_word) * round_up(n, kernels.panel);
}

// One expert's matrix as the right operand: [n, k] if `transposed` (the summed axis lies along its rows),
// else [k, n].
struct Right {
  const void* matrix;  // of `dtype`; not read if there is a packed one
  DType dtype;
  bool transposed;
  std::int64_t n, k;
  const Word* packed;  // from pack_weight, or null
};

// The right operands of all experts.
struct Matrices {
  DType dtype;
  bool transposed;
  std::int64_t n, k;
  const void* weight;
  std::int64_t stride;  // elements of `weight` from one expert's matrix to the next one's
  const void* packed = nullptr;
  PackedType packed_type = PackedType::kExact;

  const Products& products(const Kernels& kernels) const { return kernels.products(dtype, packed_type); }
  Right of(const Kernels& kernels, std::int64_t expert) const {
    const std::int64_t words = expert * packed_words(kernels, products(kernels), n, k);
    return {element(weight, dtype, expert * stride),
            dtype,
            transposed,
            n,
            k,
            packed == nullptr ? nullptr : static_cast<const Word*>(packed) + words};
  }
};

// Splits the product of a wave's rows with their matrices into blocks, several for every thread of the team.
// No result depends on the split: the order of a sum depends only on the summed axis. Pieces of few rows get
// smaller blocks where a plain weight is packed for them (kFewRowsColumns).
std::vector<Block> make_blocks(const Wave& wave, const Matrices& matrices, const Kernels& kernels,
                               Team team = {});

// The same for a product that sums over a piece's rows: rows of a block are columns of the left operand.
std::vector<Block> make_weight_blocks(const Wave& wave, std::int64_t left_columns, std::int64_t columns,
                                      const Kernels& kernels);

// A panels of a block's rows, and the right operand.
struct Term {
  const Word* a_panels;
  std::int64_t row_words;  // words of a row in the A panels
  Right right;
};

// Per-thread memory: a block of packed B panels, and sums.
struct Workspace {
  Workspace(const Kernels& kernels, std::int64_t outputs);

  Word* panels(std::int64_t thread) const { return panels_.get() + thread * panel_words_; }
  float* sums(std::int64_t thread, std::int64_t output) const {
    return sums_.get() + (thread * outputs_ + output) * sum_floats_;
  }

 private:
  std::int64_t outputs_, panel_words_, sum_floats_;
  Buffer<Word> panels_;
  Buffer<float> sums_;
};

// Rows of a wave: few enough that their hidden activations stay in or near the last-level cache.
constexpr std::int64_t kWaveRows = 2016;
constexpr std::int64_t kBlockRows = 504;

// The waves of a forward pass. Int8 products are so fast that their operands have to stay near the core: a
// wave has few rows, and with enough of them every thread computes waves of its own, from the first product
// to the last, and waits for no other.
class ForwardWaves {
 public:
  ForwardWaves(const std::int32_t* offsets, std::int64_t E, bool int8, const Products& products);

  // Rows of all waves that are in memory at the same time.
  std::int64_t rows_in_memory() const { return (alone_ ? thread_count() : 1) * most_rows_; }
  // Calls body(wave, team, row) for every wave; `row`: its first one in memory.
  template <class Body>
  void each(const Body& body) const {
    if (!alone_) {
      for (const Wave& wave : waves_) body(wave, Team{}, std::int64_t{0});
      return;
    }
    parallel_tasks(static_cast<std::int64_t>(waves_.size()), [&](std::int64_t i, std::int64_t thread) {
      body(waves_[i], Team{thread}, thread * most_rows_);
    });
  }

 private:
  std::vector<Wave> waves_;
  std::int64_t most_rows_;
  bool alone_;
};

// Words of a row of k elements in A panels; one cache line if k is 0, so that rows have an address.
inline std::int64_t a_row_words(std::int64_t k, const Products& products) {
  return k == 0 ? kLineWords : round_up(ceil_div(k, products.per_word), kLineWords);
}

// The A panel that begins at `row`, a multiple of tile_rows; a row takes `words` words.
template <class W>
W* a_panel_at(W* a_panels, std::int64_t row, std::int64_t words) {
  return a_panels + row * words;
}

// Packs words [begin, begin + words) of `panels` B panels, one after another.
void pack_right(const Right& right, const Kernels& kernels, std::int64_t panel, std::int64_t panels,
                std::int64_t begin, std::int64_t words, Word* b_panels);

// `rows` rows of `bytes` bytes, `stride` bytes apart.
Prefetch region_at(const void* first, std::int64_t rows, std::int64_t bytes, std::int64_t stride = 0);

// The memory that pack_right, or the product with packed panels, will read; multiply_block sets `each`.
Prefetch region_of(const Right& right, const Kernels& kernels, const Products& products, std::int64_t panel,
                   std::int64_t panels, std::int64_t begin, std::int64_t words);

// The memory that a block's first step reads.
Prefetch first_region(const Right& right, const Kernels& kernels, const Products& products,
                      const Block& block);

// The same for the block that this thread probably processes next.
Prefetch following_region(const std::vector<Block>& blocks, std::int64_t task, const Kernels& kernels,
                          const Matrices& matrices, Team team = {});

// The first of `tiles` tiles, of `lines` cache lines of words each, that prefetches the region: as late as
// time allows, so that earlier tiles do not evict it again.
std::int64_t ask_from(Prefetch& region, std::int64_t tiles, std::int64_t lines);

// Prefetches `rows` rows of `bytes` bytes: the operands that finish a tile, while the tile is multiplied.
// kLocality: as of __builtin_prefetch, 3 for the first-level cache, 2 for the second.
template <int kLocality = 3>
void ask_for_rows(const void* first, std::int64_t stride, std::int64_t rows, std::int64_t bytes) {
  const auto* row = static_cast<const char*>(first);
  for (std::int64_t i = 0; row != nullptr && i < rows; ++i, row += stride) {
    for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, kLocality);
  }
}

// The same of the rows that a tile is written to. Where tiles are finished at once, that was 1 to 6 % slower
// than not to (docs/performance_log.md).
inline void ask_for_output(const Products& products, const void* first, std::int64_t stride,
                           std::int64_t rows, std::int64_t bytes) {
  if (products.interleaves) ask_for_rows<2>(first, stride, rows, bytes);
}

// Floats of one expert's input scales of int8 products, which its input shifts follow.
inline std::int64_t int8_input_stride(std::int64_t k) { return round_up(k, kInputPadding); }

inline void nothing_ahead(std::int64_t, std::int64_t, std::int64_t) {}

// A tile of sums that is finished: finish(row, rows, panel, sums, begin, end) with the rows [begin, end) of
// it.
template <class Finish>
struct PendingTile {
  const Finish* finish;
  std::int64_t row, rows, panel;
  const float* sums[2];

  static void finish_rows(const void* tile, std::int64_t begin, std::int64_t end) {
    const auto& of = *static_cast<const PendingTile*>(tile);
    (*of.finish)(of.row, of.rows, of.panel, of.sums, begin, end);
  }
};

// What is read after word `end` of term t: more of its words, the next term, or `following`.
inline Prefetch region_after(const Term* terms, std::int64_t count, std::int64_t t, std::int64_t end,
                             const Kernels& kernels, const Products& products, const Block& block,
                             const Prefetch& following) {
  const Right& right = terms[t].right;
  const std::int64_t words = ceil_div(right.k, products.per_word);
  if (end == words)
    return t + 1 == count ? following : first_region(terms[t + 1].right, kernels, products, block);
  return region_of(right, kernels, products, block.panel, block.panels, end,
                   std::min(block.step(words), words - end));
}

// The terms' products over one block; c holds integers if they are those of int8. With `outputs` = 1 the
// terms are added, else each is a separate output. prepare(row, rows, panel): the tile will be finished next;
// finish(row, rows, panel, c, begin, end): its sums are c[output], [rows, panel], and the rows [begin, end)
// are to be finished. `following` is prefetched while the last step computes.
template <class Prepare, class Finish>
void multiply_block(const Kernels& kernels, const Products& products, const Term* terms, std::int64_t count,
                    std::int64_t outputs, const Block& block, const Prefetch& following,
                    const Workspace& workspace, std::int64_t thread, const Prepare& prepare,
                    const Finish& finish) {
  Word* const packed = workspace.panels(thread);
  const std::int64_t tile_floats = products.tile_rows * kernels.panel;
  const std::int64_t tiles = ceil_div(block.rows, products.tile_rows);
  PendingTile<Finish> pending[2];
  for (std::int64_t t = 0; t < count; ++t) {
    const Right& right = terms[t].right;
    const std::int64_t words = ceil_div(right.k, products.per_word);
    const std::int64_t output = outputs == 1 ? 0 : t;
    const std::int64_t step = block.step(words);
    const bool two_buffers = count == 1 && step >= words;  // of sums, as each tile is finished in one step
    std::int64_t begin = 0;
    do {  // once even if the summed axis is empty
      const std::int64_t length = std::min(step, words - begin);
      const bool complete = begin + length == words && t + 1 == count;  // the sums, after this step
      const Word* b_panels = packed;
      std::int64_t b_stride = length * kernels.panel;
      if (right.packed != nullptr) {
        b_panels = right.packed + (block.panel * words + begin) * kernels.panel;
        b_stride = words * kernels.panel;
      } else {
        pack_right(right, kernels, block.panel, block.panels, begin, length, packed);
      }
      Prefetch ahead = region_after(terms, count, t, begin + length, kernels, products, block, following);
      const std::int64_t from = ask_from(ahead, tiles, block.panels * ceil_div(length, kLineWords));
      Beside beside;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t row = tile * products.tile_rows;
        const std::int64_t rows =
            row + products.tile_rows < block.rows ? products.tile_rows : block.rows - row;
        const Word* a_panel = a_panel_at(terms[t].a_panels, row, terms[t].row_words) + begin * rows;
        if (products.before_rows != nullptr) products.before_rows(rows);
        if (tile == from) beside.prefetch = ahead;
        if (tile + 1 < tiles && !products.interleaves) {
          const std::int64_t more = std::min(products.tile_rows, block.rows - row - rows);
          const Word* const next = a_panel_at(terms[t].a_panels, row + rows, terms[t].row_words);
          beside.next_tile =
              region_at(next + begin * more, 1, more * round_up(length, kLineWords) * sizeof(Word));
          ask_from(beside.next_tile, 1, block.panels * ceil_div(length, kLineWords));
        }
        for (std::int64_t p = 0; p < block.panels; ++p) {
          const std::int64_t index = tile * block.panels + p;
          const std::int64_t slot = two_buffers ? index % 2 : index;
          float* const c = workspace.sums(thread, output) + slot * tile_floats;
          if (complete) prepare(row, rows, block.panel + p);
          products.by_rows[rows](a_panel, b_panels + p * b_stride, length, c,
                                 begin > 0 || (outputs == 1 && t > 0), beside);
          if (!complete) continue;
          PendingTile<Finish>& finished = pending[index % 2];
          finished = {&finish,
                      row,
                      rows,
                      block.panel + p,
                      {outputs == 1 ? c : workspace.sums(thread, 0) + slot * tile_floats, c}};
          if (products.interleaves) {
            beside.finish = &finished;
            beside.finish_rows = finished.finish_rows;
            beside.rows = rows;
          } else {
            finished.finish_rows(&finished, 0, rows);
          }
        }
      }
      if (beside.finish != nullptr) beside.finish_rows(beside.finish, 0, beside.rows);
      begin += length;
    } while (begin < words);
  }
}

// left^T . right over a piece's rows: column A panels and B panels of `words` words, `all_panels` of these.
// finish(tile, panel, c): column A panel `tile` times B panel `panel` is c.
template <class Finish>
void multiply_columns(const Kernels& kernels, const TypedKernels& typed, const Word* left, const Word* right,
                      std::int64_t all_panels, std::int64_t words, const Block& block,
                      const Workspace& workspace, std::int64_t thread, const Finish& finish) {
  Beside beside;
  const std::int64_t step = sum_block(words);
  const std::int64_t tile_floats = kernels.column_tile * kernels.panel;
  const std::int64_t tiles = block.rows / kernels.column_tile;
  const std::int64_t first = block.row / kernels.column_tile;
  const std::int64_t following = (block.panel + block.panels * thread_count()) % all_panels;
  for (std::int64_t begin = 0; begin < words; begin += step) {
    const std::int64_t length = begin + step < words ? step : words - begin;
    const std::int64_t lines = block.panels * ceil_div(length, kLineWords);
    const bool last = begin + length == words;
    const std::int64_t next = last ? following * words : block.panel * words + begin + length;
    const std::int64_t next_length = last ? std::min(step, words) : std::min(step, words - begin - length);
    Prefetch ahead = region_at(
        right + next * kernels.panel, last ? std::min(block.panels, all_panels - following) : block.panels,
        next_length * kernels.panel * sizeof(Word), words * kernels.panel * sizeof(Word));
    const std::int64_t from = ask_from(ahead, tiles, lines);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const Word* const a = left + ((first + tile) * words + begin) * kernels.column_tile;
      if (tile == from) beside.prefetch = ahead;
      if (tile + 1 < tiles) {
        beside.next_tile =
            region_at(a + words * kernels.column_tile, 1, length * kernels.column_tile * sizeof(Word));
        ask_from(beside.next_tile, 1, lines);
      }
      for (std::int64_t p = 0; p < block.panels; ++p) {
        const Word* const b = right + ((block.panel + p) * words + begin) * kernels.panel;
        float* const c = workspace.sums(thread, 0) + (tile * block.panels + p) * tile_floats;
        typed.by_columns(a, b, length, c, begin > 0, beside);
        if (last) finish(first + tile, block.panel + p, c);
      }
    }
  }
}

}  // namespace clipup
