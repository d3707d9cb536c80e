// Products in AMX tiles: registers of 16 rows of 64 bytes. A block of 32 rows and a B panel is four tiles of
// sums, two of the left operand and two of the right one: a step of 16 words is four loads and four products.
//
// A tile has as many rows as it was configured with, so that nothing past an A panel is read and nothing past
// the sums is written. The configuration belongs to the thread; other libraries in it (oneDNN) have their
// own, so it is released at the end of the thread's share of an op.
#pragma once

#include "operands.h"

namespace clipup {
namespace {

constexpr int kTileLines = 16;  // rows of a tile

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  explicit TileConfig(std::int64_t m) {
    const auto upper = static_cast<std::uint8_t>(smaller(m, kTileLines)),
               lower = static_cast<std::uint8_t>(m - upper);
    const std::uint8_t all[8] = {upper, upper, lower, lower, upper, lower, kTileLines, kTileLines};
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile] = all[tile];
      row_bytes[tile] = all[tile] == 0 ? 0 : kLineWords * sizeof(Word);
    }
  }
};

thread_local std::int64_t configured_rows = 0;

void configure_tiles(std::int64_t m) {
  if (configured_rows == m) return;
  const TileConfig config(m);
  __asm__ volatile("" : : "m"(config));
  _tile_loadconfig(&config);
  configured_rows = m;
}

void release_tiles() {
  if (configured_rows == 0) return;
  _tile_release();
  configured_rows = 0;
}

// Loads a tile; a streamed one displaces less of what is in the first-level cache.
#define CLIPUP_LOAD_TILE(streamed, tile, from, stride) \
  if constexpr (streamed) {                            \
    _tile_stream_loadd(tile, from, stride);            \
  } else {                                             \
    _tile_loadd(tile, from, stride);                   \
  }

// Tiles 0 to 3 += tiles 4 and 5 times tiles 6 and 7; kTwo: of more than 16 rows.
template <class Operand, bool kTwo>
void add_products() {
  if constexpr (Operand::kPerWord == 2) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kTwo) {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
}

// One step.
template <class Operand, bool kTwo, bool kStreamLeft>
void multiply_step(const Word* a, const Word* b) {
  constexpr std::int64_t kLineBytes = kLineWords * sizeof(Word), kPanelBytes = kPanel * sizeof(Word);
  _tile_stream_loadd(6, b, kPanelBytes);
  _tile_stream_loadd(7, b + kLanes, kPanelBytes);
  CLIPUP_LOAD_TILE(kStreamLeft, 4, a, kLineBytes)
  if constexpr (kTwo) {
    CLIPUP_LOAD_TILE(kStreamLeft, 5, a + kTileLines * kLineWords, kLineBytes)
  }
  add_products<Operand, kTwo>();
}

// As multiply(); configure_tiles(kRows) was called. The A panel stays in the first-level cache, if it is not
// too large, while B panels pass through. The last step may have fewer words: those missing on the right are
// zeros, so it does not matter which integers are in their place on the left (A panels of bfloat16 are padded
// with zeros; an infinity may become a NaN there).
template <class Operand, int kRows>
void multiply_tiles(const Word* a, const Word* b, std::int64_t words, float* c, bool add, Beside& beside) {
  constexpr bool kTwo = kRows > kTileLines;
  constexpr std::int64_t kPanelBytes = kPanel * sizeof(Word), kMostKeptWords = 256;
  float* const c_lower = c + kTileLines * kPanel;
  if (add) {
    _tile_loadd(0, c, kPanelBytes);
    _tile_loadd(1, c + kLanes, kPanelBytes);
    if constexpr (kTwo) {
      _tile_loadd(2, c_lower, kPanelBytes);
      _tile_loadd(3, c_lower + kLanes, kPanelBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  constexpr std::int64_t kFewestRows = 4;  // finished at a time: each time costs some instructions
  const std::int64_t steps = words / kLineWords;
  std::int64_t finished = 0, together = beside.rows;
  if (steps > 1) together = beside.rows / steps + 1 > kFewestRows ? beside.rows / steps + 1 : kFewestRows;
  const auto finish = [&](std::int64_t end) {
    if (end > beside.rows) end = beside.rows;
    if (finished < end) beside.finish_rows(beside.finish, finished, end);
    finished = end;
  };
  const auto all_steps = [&](auto step) {
    for (std::int64_t i = 0; i < steps; ++i, a += kRows * kLineWords, b += kLineWords * kPanel) {
      step(a, b);
      if (finished < beside.rows && finished * steps <= i * beside.rows) finish(finished + together);
    }
  };
  if (words <= kMostKeptWords) {
    all_steps(multiply_step<Operand, kTwo, false>);
  } else {
    all_steps(multiply_step<Operand, kTwo, true>);
  }
  if (words > steps * kLineWords) {
    alignas(64) Word rest[kTileLines * kPanel] = {};
    __builtin_memcpy(rest, b, (words - steps * kLineWords) * kPanelBytes);
    __asm__ volatile("" : : "m"(rest));
    multiply_step<Operand, kTwo, false>(a, rest);
  }
  finish(beside.rows);
  _tile_stored(0, c, kPanelBytes);
  _tile_stored(1, c + kLanes, kPanelBytes);
  if constexpr (kTwo) {
    _tile_stored(2, c_lower, kPanelBytes);
    _tile_stored(3, c_lower + kLanes, kPanelBytes);
  }
}

#undef CLIPUP_LOAD_TILE

}  // namespace
}  // namespace clipup
