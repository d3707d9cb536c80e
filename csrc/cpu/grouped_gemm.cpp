#include "grouped_gemm.h"

#include <algorithm>
#include <array>

#include "../checks.h"

namespace clipup {
namespace {

// Enough blocks that no thread waits long for the last ones.
constexpr std::int64_t kBlocksPerThread = 8;

std::vector<Block> cut(const Wave& wave, std::int64_t rows, std::int64_t row_unit, std::int64_t columns,
                       const Kernels& kernels, std::int64_t few_rows, Team team) {
  const std::int64_t all_panels = ceil_div(columns, kernels.panel);
  std::int64_t most_panels = kBlockColumns / kernels.panel;
  std::int64_t most_rows = kBlockRows / row_unit * row_unit;
  const auto rows_of = [&](const Piece& piece) { return rows > 0 ? round_up(rows, row_unit) : piece.count; };
  const auto panels_of = [&](const Piece& piece) {
    return piece.count > few_rows ? most_panels : std::min(most_panels, kFewRowsColumns / kernels.panel);
  };
  const auto count = [&] {
    std::int64_t blocks = 0;
    for (const Piece& piece : wave.pieces) {
      blocks += ceil_div(rows_of(piece), most_rows) * ceil_div(all_panels, panels_of(piece));
    }
    return blocks;
  };
  const std::int64_t wanted = kBlocksPerThread * team.size();
  while (count() < wanted && most_panels > 1) most_panels /= 2;
  while (count() < wanted && most_rows > 4 * row_unit) most_rows = round_up(most_rows / 2, row_unit);

  std::vector<Block> blocks;
  for (const Piece& piece : wave.pieces) {
    const std::int64_t total = rows_of(piece);
    const std::int64_t row_blocks = ceil_div(total, most_rows);
    const std::int64_t height = round_up(ceil_div(total, row_blocks), row_unit);
    const std::int64_t panels = panels_of(piece);
    const std::int64_t most_words = piece.count > few_rows ? kMostSumWords : kFewRowsSumWords;
    for (std::int64_t row = 0; row < total; row += height) {
      for (std::int64_t panel = 0; panel < all_panels; panel += panels) {
        blocks.push_back({&piece, row, std::min(height, total - row), panel,
                          std::min(panels, all_panels - panel), most_words});
      }
    }
  }
  return blocks;
}

}  // namespace

std::vector<Wave> make_waves(const std::int32_t* offsets, std::int64_t E, std::int64_t most_rows,
                             const Products& products) {
  std::vector<Wave> waves;
  bool open = false;  // the last wave may get more pieces
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t begin = offsets[e];
    const std::int64_t count = offsets[e + 1] - begin;
    if (count == 0) continue;
    const std::int64_t parts = ceil_div(count, most_rows);
    const std::int64_t tiles = ceil_div(count, products.tile_rows);
    for (std::int64_t part = 0; part < parts; ++part) {  // of as many tiles, or one more
      const std::int64_t row = tiles * part / parts * products.tile_rows;
      const std::int64_t rows = std::min(tiles * (part + 1) / parts * products.tile_rows, count) - row;
      if (!open || parts > 1 || waves.back().rows + rows > most_rows) waves.emplace_back();
      Wave& wave = waves.back();
      wave.pieces.push_back({e, begin + row, rows, wave.rows, wave.words, row == 0, row + rows == count});
      wave.rows += rows;
      wave.words += ceil_div(rows, products.per_word);
      open = parts == 1;
    }
  }
  return waves;
}

WaveSize largest(const std::vector<Wave>& waves) {
  WaveSize size;
  for (const Wave& wave : waves) {
    size.rows = std::max(size.rows, wave.rows);
    size.words = std::max(size.words, wave.words);
  }
  return size;
}

std::vector<Block> make_blocks(const Wave& wave, const Matrices& matrices, const Kernels& kernels,
                               Team team) {
  const bool in_small_steps = matrices.transposed && matrices.packed == nullptr;
  return cut(wave, 0, matrices.products(kernels).tile_rows, matrices.n, kernels,
             in_small_steps ? kernels.of(matrices.dtype).few_rows : 0, team);
}

std::vector<Block> make_weight_blocks(const Wave& wave, std::int64_t left_columns, std::int64_t columns,
                                      const Kernels& kernels) {
  return cut(wave, left_columns, kernels.column_tile, columns, kernels, 0, {});
}

ForwardWaves::ForwardWaves(const std::int32_t* offsets, std::int64_t E, bool int8, const Products& products) {
  constexpr std::int64_t kWavesPerThread = 4, kFewestTiles = 7, kInt8WaveRows = 504;
  const std::int64_t rows = offsets[E], threads = thread_count(), fewest = kFewestTiles * products.tile_rows;
  std::int64_t most_rows = int8 ? kInt8WaveRows : kWaveRows;
  if (E == 1) {  // every wave reads the whole matrix: as few as there can be, if all get about as many tiles
    constexpr std::int64_t kFewestRows = 96;
    const std::int64_t tiles = ceil_div(rows, products.tile_rows);
    const std::int64_t waves = threads * ceil_div(rows, threads * kInt8WaveRows);
    const std::int64_t each = rows == 0 ? 0 : ceil_div(tiles, waves);
    alone_ = int8 && rows >= threads * kFewestRows && 7 * each * waves <= 8 * tiles;
    if (alone_) most_rows = each * products.tile_rows;
  } else {
    alone_ = int8 && rows >= 2 * threads * fewest;
    if (alone_) {
      const std::int64_t share = round_up(ceil_div(rows, kWavesPerThread * threads), products.tile_rows);
      most_rows = std::min(std::max(share, fewest), most_rows);
    }
  }
  waves_ = make_waves(offsets, E, most_rows, products);
  most_rows_ = largest(waves_).rows;
}

std::int64_t sum_block(std::int64_t words) {
  if (words == 0) return kLineWords;
  return round_up(ceil_div(words, ceil_div(words, kMostSumWords)), kLineWords);
}

Workspace::Workspace(const Kernels& kernels, std::int64_t outputs)
    : outputs_(outputs),
      panel_words_(std::max(kBlockColumns, kernels.panel) * kMostSumWords),
      sum_floats_(kBlockRows * std::max(kBlockColumns, kernels.panel)),
      panels_(thread_count() * panel_words_),
      sums_(thread_count() * outputs * sum_floats_) {}

void pack_right(const Right& right, const Kernels& kernels, std::int64_t panel, std::int64_t panels,
                std::int64_t begin, std::int64_t words, Word* b_panels) {
  const TypedKernels& typed = kernels.of(right.dtype);
  const std::int64_t size = element_size(right.dtype);
  const auto* const matrix = static_cast<const unsigned char*>(right.matrix);
  const std::int64_t k_begin = begin * typed.per_word;
  const std::int64_t k = std::min(words * typed.per_word, right.k - k_begin);
  const std::int64_t n_begin = panel * kernels.panel;
  const std::int64_t n = std::min(panels * kernels.panel, right.n - n_begin);
  if (right.transposed) {
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::int64_t column = n_begin + p * kernels.panel;
      typed.transposed_b_panel(matrix + (column * right.k + k_begin) * size, right.k,
                               std::min(kernels.panel, right.n - column), k,
                               b_panels + p * words * kernels.panel);
    }
    return;
  }
  // Rows at power-of-two distances evict each other from the second-level cache: prefetch them once more.
  constexpr std::int64_t kAhead = 16;
  for (std::int64_t word = 0; word < words; ++word) {
    const std::int64_t soon = (word + kAhead) * typed.per_word;
    if (soon < k) {
      ask_for_rows(matrix + ((k_begin + soon) * right.n + n_begin) * size, right.n * size, typed.per_word,
                   n * size);
    }
    std::array<const void*, 2> rows{};
    for (std::int64_t i = 0; i < typed.per_word; ++i) {
      const std::int64_t row = word * typed.per_word + i;
      if (row < k) rows[i] = matrix + ((k_begin + row) * right.n + n_begin) * size;
    }
    typed.rows_to_column_panels(rows.data(), nullptr, n, kernels.panel, words,
                                b_panels + word * kernels.panel);
  }
}

Prefetch region_at(const void* first, std::int64_t rows, std::int64_t bytes, std::int64_t stride) {
  constexpr std::int64_t kLineBytes = kLineWords * static_cast<std::int64_t>(sizeof(Word));
  Prefetch region;
  region.next = static_cast<const char*>(first);
  region.rows = rows;
  region.lines = ceil_div(bytes, kLineBytes);
  region.left = region.lines;
  region.skip = stride - region.lines * kLineBytes;
  return region;
}

Prefetch region_of(const Right& right, const Kernels& kernels, const Products& products, std::int64_t panel,
                   std::int64_t panels, std::int64_t begin, std::int64_t words) {
  if (right.k == 0) return {};  // no elements: the matrix may be null
  const std::int64_t size = element_size(right.dtype);
  const std::int64_t k_begin = begin * products.per_word;
  const std::int64_t k = std::min(words * products.per_word, right.k - k_begin);
  const std::int64_t n_begin = panel * kernels.panel;
  const std::int64_t n = std::min(panels * kernels.panel, right.n - n_begin);
  const auto* const matrix = static_cast<const char*>(right.matrix);
  constexpr std::int64_t word = sizeof(Word);
  if (right.packed != nullptr) {
    const std::int64_t all_words = ceil_div(right.k, products.per_word);
    return region_at(right.packed + (panel * all_words + begin) * kernels.panel, panels,
                     words * kernels.panel * word, all_words * kernels.panel * word);
  }
  if (right.transposed) {
    return region_at(matrix + (n_begin * right.k + k_begin) * size, n, k * size, right.k * size);
  }
  return region_at(matrix + (k_begin * right.n + n_begin) * size, k, n * size, right.n * size);
}

Prefetch first_region(const Right& right, const Kernels& kernels, const Products& products,
                      const Block& block) {
  const std::int64_t words = ceil_div(right.k, products.per_word);
  return region_of(right, kernels, products, block.panel, block.panels, 0,
                   std::min(words, block.step(words)));
}

Prefetch following_region(const std::vector<Block>& blocks, std::int64_t task, const Kernels& kernels,
                          const Matrices& matrices, Team team) {
  const std::size_t next = task + team.size();
  if (next >= blocks.size()) return {};
  return first_region(matrices.of(kernels, blocks[next].piece->expert), kernels, matrices.products(kernels),
                      blocks[next]);
}

std::int64_t ask_from(Prefetch& region, std::int64_t tiles, std::int64_t lines) {
  constexpr std::int64_t kUsual = 2;
  constexpr std::int64_t kMost = 8;  // more would queue
  const std::int64_t wanted = region.rows * region.lines;
  if (wanted == 0 || lines == 0) return tiles;
  const std::int64_t late = std::max<std::int64_t>(tiles - ceil_div(wanted, lines * kUsual), 0);
  region.each = std::min(kMost, ceil_div(wanted, (tiles - late) * lines));
  return late;
}

}  // namespace clipup
