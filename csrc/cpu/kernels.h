// What a tier of CPU instructions (gemm_<tier>.cpp) offers to the drivers: tiles multiplied in registers, operands
// packed, and what happens to a tile while it is in the cache. A tier is chosen once, when it is first needed.
//
// Operands are packed in 32-bit words along the summed axis: a word is one float, or, where the CPU multiplies
// bfloat16 pairs, two neighbouring bfloat16. Storage types without such an instruction are widened to floats.
//
//   lines   the left operand by rows. A tile of m rows: [words / 16][m][16], so that row i's words 16l..16l+15 are
//           one cache line and every address in the loop over words is a constant away from the next.
//   strips  [words][width]: the right operand (width = panel), and the left one read along its columns
//           (width = column_tile; the gradient of a weight sums over rows).
//
// Words past the end of a row, and columns past the last one of a strip, are zero.
#pragma once

#include <cstdint>

#include "../moe.h"

namespace clipup {

using Word = std::uint32_t;
constexpr std::int64_t kLineWords = 16;  // 64 bytes
constexpr std::int64_t kMostTileRows = 14;
constexpr std::int64_t kMostColumnTile = 8;

// Columns of the router's weight gradient that have one owner.
constexpr std::int64_t kRouterColumns = 64;

// Memory that will be needed soon: `rows` rows of `lines` cache lines. A product asks for `each` of them per line of
// words that it multiplies, so that they arrive while it computes.
struct Prefetch {
  const char* next = nullptr;
  std::int64_t rows = 0, lines = 0, skip = 0;  // skip: from the end of a row to the next one
  std::int64_t each = 0;
  std::int64_t left = 0;  // lines of this row
};

// c[m, panel] = a . b, or c += a . b: `words` words of the summed axis, c's rows `panel` floats apart.
using Multiply = void (*)(const Word* a, const Word* b, std::int64_t words, float* c, bool add,
                          Prefetch& prefetch);

// A tile of the first product on its way to the second: z = c + bias, a = act(z), gated a = act(z_gate) * z.
// z is rounded to the storage type whether it is kept or not, so that both passes see the same function.
struct HiddenTile {
  std::int64_t rows, columns;    // columns <= panel are real, the others of c are zero
  std::int64_t column;           // the first column's place among the hidden units
  const float *c, *c_gate;       // [rows, panel]; c_gate null: not gated
  const void *bias, *bias_gate;  // [columns] or null
  void *z, *z_gate;              // written, rows `z_stride` elements apart; null: not kept
  std::int64_t z_stride;
  Word* a;  // written: lines of this tile of rows; null: not wanted
};

// A tile of da = W_out^T dout on its way to everything that is made of it (moe.h, expert_mlp_backward).
struct HiddenGradientTile {
  std::int64_t rows, columns, column;  // as above
  const float* da;                     // [rows, panel]
  const void *z, *z_gate;              // rows `z_stride` elements apart; z_gate null: not gated
  std::int64_t z_stride;
  const float* gates;  // [rows]
  float* d_gates;      // <a, da> over the tile's columns, `d_gates_stride` apart; null: not wanted
  std::int64_t d_gates_stride;
  Word *dz, *dz_gate;                // lines of this tile of rows; null: not wanted
  Word *dz_strips, *dz_gate_strips;  // column_tile strips over all rows; null: not wanted
  Word* a_strips;                    // panel strips over all rows; null: not wanted
  std::int64_t strip_words, word;    // words of a strip, the word of this tile's first row
};

// A finished tile: out = c + bias + previous.
struct OutputTile {
  std::int64_t rows, columns;
  const float* c;         // [rows, panel]
  const void* bias;       // [columns] in the storage type, or null
  const float* previous;  // rows `stride` apart, or null
  float* sum;             // written in float, rows `stride` apart; null: not wanted
  void* out;              // written in the storage type, rows `stride` apart; null: not wanted
  std::int64_t stride;
  bool stream;  // out past the caches, for what is large and not read soon; ends with `streams_done`
};

// The tier's functions for one storage type.
struct TypedKernels {
  std::int64_t per_word;  // elements of the summed axis in a word
  std::int64_t few_rows;  // an expert's rows up to which its plain weight is packed in small steps
  Multiply by_rows[kMostTileRows + 1];  // [m]: a in lines of m rows
  Multiply by_columns;                  // a in strips of column_tile

  // One row of n elements into its place in a tile of `rows` rows.
  void (*row_to_lines)(const void* row, std::int64_t n, std::int64_t rows, Word* lines);
  // per_word rows of n elements, each times its scale (null: 1), into word `strips` of every strip; a null row is zero.
  void (*rows_to_strips)(const void* const* rows, const float* scales, std::int64_t n, std::int64_t width,
                         std::int64_t strip_words, Word* strips);
  // One panel strip from `count` <= panel rows of a matrix, k elements of each, along the summed axis.
  void (*transposed_strip)(const void* rows, std::int64_t stride, std::int64_t count, std::int64_t k,
                           Word* strip);
  // sums[column_tile] += the strip's elements.
  void (*sum_strip)(const Word* strip, std::int64_t words, float* sums);

  void (*finish_hidden[5])(const HiddenTile&);                   // by activation
  void (*finish_hidden_gradient[5])(const HiddenGradientTile&);  // by activation
  void (*finish_output)(const OutputTile&);

  // y[D] = sum over k of gates[k] * rows[row_of_choice[k]], k ascending; gates null: all 1.
  void (*weighted_sum)(const float* rows, const std::int32_t* row_of_choice, const float* gates,
                       std::int64_t K, std::int64_t D, void* y);
  float (*dot)(const void* a, const void* b, std::int64_t n);

  // logits[rows,E] = x[rows,D] . weight[E,D]^T.
  void (*router_logits)(const void* x, std::int64_t rows, const float* weight, std::int64_t D, std::int64_t E,
                        float* logits);
  // d_x[rows,D] = d_logits[rows,E] . weight[E,D].
  void (*router_input_gradient)(const float* d_logits, std::int64_t rows, const float* weight, std::int64_t D,
                                std::int64_t E, void* d_x);
  // d_weight[E,columns] = d_logits[T,E]^T . x[T,columns] over the tokens that take part; rows of x and of d_weight lie D
  // elements apart.
  void (*router_weight_gradient)(const void* x, const std::uint8_t* mask, const float* d_logits,
                                 std::int64_t T, std::int64_t D, std::int64_t E, std::int64_t columns,
                                 float* d_weight);
};

struct Kernels {
  const char* name;
  std::int64_t tile_rows;    // rows of a full tile in lines, a multiple of every per_word
  std::int64_t panel;        // columns of a tile
  std::int64_t column_tile;  // rows of a tile whose left operand lies in strips
  void (*streams_done)();    // orders a thread's streamed stores before what it stores next
  TypedKernels typed[3];     // by DType

  const TypedKernels& of(DType dtype) const { return typed[static_cast<int>(dtype)]; }
};

extern const Kernels kPortable;
#ifdef CLIPUP_X86_TIERS
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif

// The tier that this CPU runs fastest, or the one that CLIPUP_CPU_ISA names.
const Kernels& kernels();

}  // namespace clipup
