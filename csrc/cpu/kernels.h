// The functions of an instruction tier (gemm_<tier>.cpp): multiplying tiles in registers, packing operands,
// and finishing a tile while it is in the cache. The tier is chosen once, at first use.
//
// Operands are packed in 32-bit words along the summed axis: a word is one float, or, where the CPU
// multiplies bfloat16 pairs, two neighbouring bfloat16. Storage types without such an instruction are widened
// to floats. Operands of int8 products have four int8 in a word.
//
//   A panel         the left operand by rows, a tile of m rows: [words / 16][m][16], so that words
//                   16l..16l+15 of row i are one cache line, and addresses in the loop over words have
//                   constant distances.
//   B panel         the right operand, `panel` columns: [words][panel].
//   column A panel  the left operand by columns, `column_tile` of them, for the gradient of a weight, which
//                   sums over rows: [words][column_tile].
//
// Words past the end of a row, and columns past the last one of a panel, are zero.
#pragma once

#include <cstdint>

#include "../moe.h"

namespace clipup {

using Word = std::uint32_t;
constexpr std::int64_t kLineWords = 16;  // 64 bytes
constexpr std::int64_t kMostTileRows = 32;
constexpr std::int64_t kMostColumnTile = 8;
// Scales and shifts of the inputs of int8 products are padded to a multiple of this, one of every tier's
// panel.
constexpr std::int64_t kInputPadding = 32;

// Columns of the router's weight gradient that one task computes.
constexpr std::int64_t kRouterColumns = 64;

// Memory to prefetch: `rows` rows of `lines` cache lines. A product prefetches `each` of them per cache line
// of words that it multiplies, so that they arrive while it computes.
struct Prefetch {
  const char* next = nullptr;
  std::int64_t rows = 0, lines = 0, skip = 0;  // skip: from the end of a row to the next one
  std::int64_t each = 0;
  std::int64_t left = 0;  // lines of this row
};

// What a product does between its steps, so that it costs little time of its own: prefetching, and finishing
// the tile of sums before, which is for tiers that multiply and compute in different units (`interleaves`).
struct Beside {
  Prefetch prefetch;             // what is read after this step
  Prefetch next_tile;            // the left operand of the next tile
  const void* finish = nullptr;  // null: there is no tile to finish
  void (*finish_rows)(const void* finish, std::int64_t begin, std::int64_t end) = nullptr;
  std::int64_t rows = 0;  // of that tile
};

// c[m, panel] = a . b, or c += a . b: `words` words of the summed axis, c's rows `panel` floats apart.
using Multiply = void (*)(const Word* a, const Word* b, std::int64_t words, float* c, bool add,
                          Beside& beside);

// What turns a tile of sums of int8 products into floats: ((c - kInt8Offset * sums) * rows + middles * sums)
// * columns (int8_products.h).
struct Int8Scaling {
  const float* rows;               // of the tile's rows
  const float* columns;            // [panel]
  const std::int32_t* sums;        // [panel], of the right operand's columns
  const float* middles = nullptr;  // of the tile's rows; null: 0
};

// A tile of the first product, turned into operands of the second: z = c + bias, a = act(z), gated
// a = act(z_gate) * z. z is rounded to the storage type even if it is not kept, so that forward and backward
// compute the same function.
struct HiddenTile {
  std::int64_t rows, columns;    // columns <= panel; the others of c are zero
  std::int64_t begin, end;       // the rows to finish
  std::int64_t column;           // index of the first hidden unit
  const float *c, *c_gate;       // [rows, panel]; c_gate null: not gated
  const void *bias, *bias_gate;  // [columns] or null
  void *z, *z_gate;              // written, rows `z_stride` elements apart; null: not kept
  std::int64_t z_stride;
  Word* a;                            // written: the A panel of this tile; null: not wanted
  Int8Scaling scaling, scaling_gate;  // of int8 products, whose z is not kept
  float* int8_a;                      // written by these: a, rows `z_stride` floats apart, to be quantized
};

// A tile of da = W_out^T dout, turned into the operands of all later products (moe.h, expert_mlp_backward).
struct HiddenGradientTile {
  std::int64_t rows, columns, column;  // as above
  const float* da;                     // [rows, panel]
  const void *z, *z_gate;              // rows `z_stride` elements apart; z_gate null: not gated
  std::int64_t z_stride;
  const float* gates;  // [rows]
  float* d_gates;      // <a, da> over the tile's columns, `d_gates_stride` apart; null: not wanted
  std::int64_t d_gates_stride;
  Word *dz, *dz_gate;                              // the A panel of this tile; null: not wanted
  Word *dz_column_panels, *dz_gate_column_panels;  // over all rows; null: not wanted
  Word* hidden_b_panels;                           // over all rows; null: not wanted
  std::int64_t panel_words, word;                  // words of these panels, the word of this tile's first row
};

// A finished tile: out = c + bias + previous.
struct OutputTile {
  std::int64_t begin, end;  // the rows to finish
  std::int64_t columns;
  const float* c;         // [rows, panel]
  const void* bias;       // [columns] in the storage type, or null
  const float* previous;  // rows `stride` apart, or null
  float* sum;             // written in float, rows `stride` apart; null: not wanted
  void* out;              // written in the storage type, rows `stride` apart; null: not wanted
  std::int64_t stride;
  bool stream;  // bypass the caches, for outputs that are large and not read soon; call `streams_done` after
  Int8Scaling scaling;  // of int8 products
};

// A tile of rows of attention scores, turned into the left operand of the product with the values
// (attention.cpp).
struct AttentionTile {
  std::int64_t rows, keys;
  const float* mask;  // added to the scaled scores, rows `mask_stride` apart; null: none
  std::int64_t mask_stride;
  float scale;
  float* scores;        // [panels][rows, panel], overwritten
  Int8Scaling scaling;  // of int8 products: `columns` and `sums` of all keys
  Word* shares;         // written: an A panel of exp(score - the row's largest); keys past the last one are 0
  float* inverse_sums;  // [rows] written: 1 / the sum of the exact shares; 0 where all keys are masked
};

// Keys or values of one head, quantized: each vector of the right operand minus its mean, over its scale.
struct Int8Operand {
  Word* panels;
  float* scales;       // by column of the operand
  float* means;        // by channel
  std::int32_t* sums;  // by column
};

// The tier's products of one type of operands: floats, pairs of bfloat16 or four int8 in a word.
struct Products {
  std::int64_t per_word;                // elements of the summed axis in a word
  std::int64_t tile_rows;               // rows of a full A panel, a multiple of every per_word
  bool interleaves;                     // whether `by_rows` finishes the tile before (Beside)
  Multiply by_rows[kMostTileRows + 1];  // [m]: a is an A panel of m rows
  void (*before_rows)(std::int64_t m);  // call it in the same task before by_rows[m]; null: nothing to do
};

// The tier's functions for one storage type, and the products of its operands.
struct TypedKernels : Products {
  std::int64_t few_rows;  // with at most this many rows, an expert's plain weight is packed in small steps
  Multiply by_columns;    // a is a column A panel

  // Packs one row of n elements into an A panel of `rows` rows.
  void (*row_to_a_panel)(const void* row, std::int64_t n, std::int64_t rows, Word* a_panel);
  // Packs per_word rows of n elements, each times its scale (null: 1), as one word of every panel of `width`
  // columns (B panels or column A panels); a null row is zero. `panels` points at that word of the first
  // panel.
  void (*rows_to_column_panels)(const void* const* rows, const float* scales, std::int64_t n,
                                std::int64_t width, std::int64_t panel_words, Word* panels);
  // Packs a B panel from `count` <= panel rows of a matrix, k elements of each, which lie along the summed
  // axis.
  void (*transposed_b_panel)(const void* rows, std::int64_t stride, std::int64_t count, std::int64_t k,
                             Word* b_panel);
  // sums[column_tile] += the elements of a column A panel.
  void (*sum_column_panel)(const Word* panel, std::int64_t words, float* sums);

  void (*finish_hidden[kActivations])(const HiddenTile&);                   // by activation
  void (*finish_hidden_gradient[kActivations])(const HiddenGradientTile&);  // by activation
  void (*finish_output)(const OutputTile&);
  // The same for sums of int8 products, c being integers; activations are `coarse`.
  void (*finish_int8_hidden[kActivations])(const HiddenTile&);
  void (*finish_int8_output)(const OutputTile&);

  // Attention. The shares of int8 products are integers up to 255.
  void (*attention_shares)(const AttentionTile&);
  void (*int8_attention_shares)(const AttentionTile&);
  // Quantize `keys` rows of d elements, `stride` elements apart, as the right operand of the scores (scales
  // by key) or of the product with the shares (scales by channel; zeros from the last key to `key_words`).
  // `scratch`: int8_key_words(d) words.
  void (*quantize_keys)(const void* rows, std::int64_t stride, std::int64_t keys, std::int64_t d,
                        Word* scratch, const Int8Operand& to);
  void (*quantize_values)(const void* rows, std::int64_t stride, std::int64_t keys, std::int64_t d,
                          std::int64_t key_words, const Int8Operand& to);
  // out[i, column] = c[i, column] * scales[i], c's rows `panel` floats apart, out's `stride` elements.
  void (*finish_attention)(const float* c, const float* scales, std::int64_t rows, std::int64_t columns,
                           void* out, std::int64_t stride);
  // The same for sums of int8 products, with the values from channel `column` on.
  void (*finish_int8_attention)(const float* c, const float* scales, std::int64_t rows, std::int64_t columns,
                                void* out, std::int64_t stride, const Int8Operand& values,
                                std::int64_t column);

  // y[D] = sum over k of gates[k] * rows[row_of_choice[k]], k ascending; gates null: all 1.
  void (*weighted_sum)(const float* rows, const std::int32_t* row_of_choice, const float* gates,
                       std::int64_t K, std::int64_t D, void* y);
  float (*dot)(const void* a, const void* b, std::int64_t n);

  // Quantizes one row of n elements into an A panel of int8 words of `rows` rows, and returns its scale. What
  // is quantized is row * inputs[0..n) + inputs[m..m+n), m being n padded to kInputPadding; null: the row.
  float (*quantize_row)(const void* row, const float* inputs, std::int64_t n, std::int64_t rows,
                        Word* a_panel);

  // The same of a row that is padded with any numbers to a whole panel, less its middle, which is written.
  float (*quantize_hidden_row)(const float* row, const float* inputs, std::int64_t n, std::int64_t rows,
                               Word* a_panel, float* middle);

  // logits[rows,E] = x[rows,D] . weight[E,D]^T.
  void (*router_logits)(const void* x, std::int64_t rows, const float* weight, std::int64_t D, std::int64_t E,
                        float* logits);
  // d_x[rows,D] = d_logits[rows,E] . weight[E,D].
  void (*router_input_gradient)(const float* d_logits, std::int64_t rows, const float* weight, std::int64_t D,
                                std::int64_t E, void* d_x);
  // d_weight[E,columns] = d_logits[T,E]^T . x[T,columns] over the unmasked tokens; rows of x and of d_weight
  // are D elements apart.
  void (*router_weight_gradient)(const void* x, const std::uint8_t* mask, const float* d_logits,
                                 std::int64_t T, std::int64_t D, std::int64_t E, std::int64_t columns,
                                 float* d_weight);
};

struct Kernels {
  const char* name;
  std::int64_t panel;        // columns of a tile
  std::int64_t column_tile;  // columns of a column A panel
  void (*streams_done)();    // orders a thread's streamed stores before what it stores next
  void (*after_tasks)();     // frees what `before_rows` took; null: nothing to do
  TypedKernels typed[3];     // by DType
  Products int8;

  const TypedKernels& of(DType dtype) const { return typed[static_cast<int>(dtype)]; }
  // The products with weights of these types.
  const Products& products(DType dtype, PackedType type) const {
    return type == PackedType::kInt8 ? int8 : of(dtype);
  }
};

// Whether a handler of SIGILL executes the instructions of tiles: set by the native tests alone.
extern bool tiles_are_emulated;

// The best tier that this CPU has, or the one that CLIPUP_CPU_ISA names (isa.cpp).
const Kernels& kernels();

}  // namespace clipup
