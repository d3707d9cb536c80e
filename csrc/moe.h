// The native interface of clipup_kernels: the ops of Mixture-of-Experts layers on the CPU.
//
// Plain pointers and sizes; every array is dense and row-major. Axes, as everywhere in the project:
//   T tokens, E experts, K choices per token, D model width, H hidden width, R = T*K rows, one per (token,
//   choice) pair.
//
// A stage checks its arguments before it writes: std::invalid_argument names the argument, what was expected
// and what was given. Every element of an output is written. Sizes may be zero; an array without elements may
// be null. Every result is bitwise the same from run to run and for every number of threads, if all threads
// treat denormals alike.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clipup {

// Storage type of the elements of rows. Sums are in float for every storage type.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The activations of experts: X(type in cpu/activations.h, name in Python). Enumerators, names and tables of
// kernels follow from this list; clipup_kernels/types.py has the same names in the same order.
#define CLIPUP_ACTIVATIONS(X)                             \
  X(Gelu, "gelu")            /* z Phi(z), by erf */       \
  X(GeluTanh, "gelu_tanh")   /* its tanh approximation */ \
  X(QuickGelu, "quick_gelu") /* z sigmoid(1.702 z) */     \
  X(Relu, "relu")            /* max(z, 0) */              \
  X(Silu, "silu")            /* z sigmoid(z) */

enum class Activation : int {
#define CLIPUP_ENUMERATOR(Type, name) k##Type,
  CLIPUP_ACTIVATIONS(CLIPUP_ENUMERATOR)
#undef CLIPUP_ENUMERATOR
};

constexpr const char* kActivationNames[] = {
#define CLIPUP_NAME(Type, name) name,
    CLIPUP_ACTIVATIONS(CLIPUP_NAME)
#undef CLIPUP_NAME
};
constexpr int kActivations = sizeof kActivationNames / sizeof kActivationNames[0];

// The router's logits in float, from tokens in their storage type: logits[t,e] = <x[t], weight[e]>. The
// logits of a token do not depend on the others.
//
//   x[T,D]               of type `dtype`
//   mask[T]              0: the token is masked: it is not read, its logits are 0; null: none is masked
//   weight[E,D]
//   logits[T,E]          written
void router_logits(const void* x, DType dtype, const std::uint8_t* mask, const float* weight, std::int64_t T,
                   std::int64_t D, std::int64_t E, float* logits);

// Gradients of `router_logits`.
//
//   d_logits[T,E], x, mask, weight   d_logits of masked tokens is not read
//   d_x[T,D]             d_logits . weight, of type `dtype`, 0 for masked tokens; null: not wanted
//   d_weight[E,D]        d_logits^T . x; null: not wanted
void router_logits_backward(const float* d_logits, const void* x, DType dtype, const std::uint8_t* mask,
                            const float* weight, std::int64_t T, std::int64_t D, std::int64_t E, void* d_x,
                            float* d_weight);

// Softmax over the experts, the K best experts of every token, and the statistics that the losses need.
//
//   logits[T,E]          router logits; a NaN leads to NaN gates, never to an index outside [0, E)
//   mask[T]              0: the token is masked: gates 0, expert indices -1, top_prob 0, not in any
//                        statistic; null: none is masked
//   selection_bias[E]    added to the probabilities for the choice only, gates stay unbiased; null: none
//
// Choices are ordered by their scores, highest first: logits, or probabilities plus selection bias if given.
// Ties go to the lowest expert, a NaN ranks as minus infinity.
//
//   gates[T,K]           probability of the choice; `renormalize`: divided by the sum over the token's
//                        choices, computed from the logits so that they sum to 1 even where the probabilities
//                        underflow
//   expert_indices[T,K]  expert of the choice, distinct within a token
//   top_prob[T]          largest probability of the token
//   mean_probs[E]        mean probability over the unmasked tokens, 0 if there are none
//   z_loss[1]            mean of logsumexp(logits)^2 over the unmasked tokens, 0 if there are none
//   tokens_per_expert[K,E]   how many tokens chose expert e as their k-th choice
void topk_gating(const float* logits, const std::uint8_t* mask, const float* selection_bias, std::int64_t T,
                 std::int64_t E, std::int64_t K, bool renormalize, float* gates, std::int32_t* expert_indices,
                 float* top_prob, float* mean_probs, float* z_loss, std::int32_t* tokens_per_expert);

// Gradient of `topk_gating` with respect to the logits, the choices held constant.
//
//   logits, mask, renormalize   as in the forward pass
//   expert_indices[T,K]         from the forward pass
//   d_gates[T,K], d_top_prob[T], d_mean_probs[E], d_z_loss[1]   incoming gradients; null: zero
//   d_logits[T,E]               written; exactly 0 for masked tokens, even if their logits are NaN
//
// top_prob passes its gradient to the most probable expert, the lowest on ties.
void topk_gating_backward(const float* logits, const std::uint8_t* mask, const std::int32_t* expert_indices,
                          std::int64_t T, std::int64_t E, std::int64_t K, bool renormalize,
                          const float* d_gates, const float* d_top_prob, const float* d_mean_probs,
                          const float* d_z_loss, float* d_logits);

// The plan: which row holds which (token, choice) pair. Rows of an expert are contiguous, experts ascend: a
// stable counting sort. No token moves.
//
//   expert_indices[T,K]  expert of the choice, -1 where there is none
//   mask[T]              0: the token is masked and gets no rows; null: none is masked
//   priority[T]          tokens are served in descending order, ties by position, NaN like minus infinity;
//                        null: by position
//   capacity_factor      f > 0: an expert takes at most ceil(f*K*N/E) rows, N the unmasked tokens that have a
//                        choice, computed in double, from left to right; f < 0: no limit; 0 and NaN are
//                        refused
//
// Inside an expert all first choices come before any second choice, and so on; inside a choice tokens come in
// the order of `priority`. Pairs beyond the capacity are dropped from the end of that order.
//
//   offsets[E+1]         rows of expert e are [offsets[e], offsets[e+1])
//   choice_of_row[R]     t*K+k of the row, -1 past offsets[E]
//   row_of_choice[T,K]   row of the choice, -1 where it was dropped, masked or absent
void dispatch(const std::int32_t* expert_indices, const std::uint8_t* mask, const float* priority,
              std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, std::int32_t* offsets,
              std::int32_t* choice_of_row, std::int32_t* row_of_choice);

// Copies tokens into their rows: rows[r] = x[choice_of_row[r] / K], and 0 past offsets[E].
//
//   x[R/K], rows[R]      elements of `row_bytes` bytes, of any type
//   choice_of_row[R]     from `dispatch`
//   rows_used[1]         offsets[E]
void permute(const void* x, std::int64_t row_bytes, const std::int32_t* choice_of_row,
             const std::int32_t* rows_used, std::int64_t R, std::int64_t K, void* rows);

// Sums every token's rows: y[t] = sum over k of gates[t,k] * rows[row_of_choice[t,k]], k ascending, sums in
// float. A choice without a row adds nothing, a token without rows gets 0.
//
//   rows[T*K,D], y[T,D]  of type `dtype`
//   row_of_choice[T,K]   from `dispatch`
//   gates[T,K]           null: all are 1 (the backward pass of `permute`)
void gather_sum(const void* rows, DType dtype, const std::int32_t* row_of_choice, const float* gates,
                std::int64_t T, std::int64_t K, std::int64_t D, void* y);

// Gradients of the gated `gather_sum`.
//
//   dy[T,D], rows[R,D]   of type `dtype`
//   rows_used[1]         offsets[E]
//   d_rows[R,D]          gates[t,k] * dy[t], of type `dtype`; 0 past offsets[E]
//   d_gates[T,K]         <dy[t], rows[row_of_choice[t,k]]> in float; 0 for a choice without a row
void combine_backward(const void* dy, const void* rows, DType dtype, const float* gates,
                      const std::int32_t* row_of_choice, std::int64_t T, std::int64_t K, std::int64_t D,
                      const std::int32_t* rows_used, std::int64_t R, void* d_rows, float* d_gates);

// Gates and plan of T tokens: the results of `topk_gating` and `dispatch`.
struct Routing {
  std::int64_t T, K;
  const float* gates;                 // [T,K]; null: K = 1 and every gate is 1
  const std::int32_t* offsets;        // [E+1]
  const std::int32_t* choice_of_row;  // [R]; null with row_of_choice: K = 1 and token t is row t
  const std::int32_t* row_of_choice;  // [T,K]
};

// What a packed weight (`pack_weight`) holds: the weight's elements, or int8, quantized by output channel:
// q = round(w * 127 / max|w|), scale = max|w| / 127 over the inputs of a channel. The rows that an int8
// weight is multiplied with are quantized in the same way, each by itself, at every call, hidden activations
// after subtracting the middle of the row's least and greatest; sums are exact integers. A row with a NaN or
// an infinity gives NaN. An input scale f[E,I] balances both (SmoothQuant, arXiv 2211.10438), and an input
// offset c[E,I] takes out what rows have in common: w / f and (x - c) * f are quantized, and the product is w
// (x - c).
enum class PackedType : int { kExact = 0, kInt8 = 1 };

// E MLPs of one shape. In the forward pass, a packed matrix from `pack_weight` replaces the matrix.
struct Experts {
  DType dtype;  // of x, weights, biases and z
  Activation activation;
  std::int64_t E, D, H;
  const void *in_weight, *in_bias;      // [E,H,D]; [E,H] or null
  const void *out_weight, *out_bias;    // [E,D,H]; [E,D] or null
  const void *gate_weight, *gate_bias;  // [E,H,D] for gated experts, else null; [E,H] or null
  const void *packed_in, *packed_out,
      *packed_gate;  // or null; if given, the matrix itself is not read and may be null
  // Elements from an expert's W_in, and W_gate, to the next one's, also in their gradients: 0 for H*D, or
  // 2*H*D where both lie in one matrix.
  std::int64_t in_stride;
  PackedType packed_type;  // of the packed matrices: all or none are given if it is kInt8

  bool gated() const { return gate_weight != nullptr || packed_gate != nullptr; }
};

// y[t] = sum over the choices k of gates[t,k] * (W_out a + b_out), a = act(z), z = W_in x[t] + b_in, of the
// choice's expert. Gated: a = act(W_gate x + b_gate) * z. k ascending, sums in float; z is rounded to
// `dtype`.
//
//   x[T,D], y[T,D]       a token without rows gets 0
//   z[R,H]               gated: [2,R,H], z and then the gate's pre-activation; 0 past offsets[E]; null: not
//                        kept
void expert_mlp_forward(const Experts& experts, const Routing& routing, const void* x, void* y, void* z);

// How a sparse layer routes: the arguments of `router_logits`, `topk_gating` and `dispatch`.
struct Router {
  const float* weight;          // [E,D]
  const float* selection_bias;  // [E] or null
  std::int64_t K;
  bool renormalize;
  double capacity_factor;
  bool by_priority;  // tokens are served in the order of top_prob
  float gate_scale;  // y is the sum weighted by gate_scale * gates
};

// A sparse layer in one call: `router_logits`, `topk_gating`, `dispatch` and `expert_mlp_forward`, with their
// results bit by bit. For few tokens the calls themselves take most of the time.
//
//   floats, ints         written: what the routing stages write, one after the other: logits, gates,
//                        top_prob, mean_probs and z_loss; expert_indices, tokens_per_expert, offsets,
//                        choice_of_row and row_of_choice
void sparse_mlp_forward(const Experts& experts, const Router& router, const std::uint8_t* mask,
                        std::int64_t T, const void* x, void* y, float* floats, std::int32_t* ints);

// Gradients of `expert_mlp_forward`, by name; null: not wanted. An expert without rows gets 0.
struct ExpertGradients {
  void* x;       // [T,D]
  float* gates;  // [T,K]; 0 for a choice without a row
  void *in_weight, *in_bias, *out_weight, *out_bias, *gate_weight, *gate_bias;
};

// For row r of token t, with d = dy[t], g its gate:
//   da  = W_out^T d          dgate = <a, da> + <d, b_out>
//   dz  = g * da * act'(z)   dW_in += dz x^T          db_in += dz        dx[t] += W_in^T dz
//   dW_out += (g * d) a^T    db_out += g * d
//
//   dy[T,D], x[T,D]
//   z                    from the forward pass; null: recomputed
void expert_mlp_backward(const Experts& experts, const Routing& routing, const void* dy, const void* x,
                         const void* z, const ExpertGradients& gradients);

// out[r] = weight[e] rows[r] + bias[e] for the rows of every expert, and 0 past offsets[E].
//
//   rows[R,I], weight[E,O,I], bias[E,O] or null, out[R,O]   of type `dtype`
//   offsets[E+1]
//   packed               the weight from `pack_weight`, instead of `weight`, which is then not read; or null
void grouped_linear(DType dtype, const void* rows, const void* weight, const void* bias,
                    const std::int32_t* offsets, std::int64_t R, std::int64_t E, std::int64_t O,
                    std::int64_t I, void* out, const void* packed = nullptr,
                    PackedType packed_type = PackedType::kExact);

// Gradients of `grouped_linear`; null: not wanted. d_rows is 0 past offsets[E], an expert without rows gets
// 0.
void grouped_linear_backward(DType dtype, const void* d_out, const void* rows, const void* weight,
                             const std::int32_t* offsets, std::int64_t R, std::int64_t E, std::int64_t O,
                             std::int64_t I, void* d_rows, void* d_weight, void* d_bias);

// Softmax attention of every head of B sequences of L tokens to themselves: out = softmax(q k^T / sqrt(d) +
// mask) v.
//
//   qkv[B,L,3,heads,d]   of type `dtype`: queries, keys and values
//   mask[L,L]            added to the scores: that of a head is mask + b * mask_batch_stride + head *
//                        mask_head_stride; or null. A query whose keys all have -infinity gives 0
//   out[B,L,heads,d]     of type `dtype`
//   type                 of the products; results of int8 ones depend on the sequence as a whole
void self_attention(DType dtype, const void* qkv, const float* mask, std::int64_t mask_batch_stride,
                    std::int64_t mask_head_stride, std::int64_t B, std::int64_t L, std::int64_t heads,
                    std::int64_t d, void* out, PackedType type = PackedType::kExact);

// Packs a weight into the B panels that the forward pass reads, for weights that do not change between calls.
//
//   weight[E,O,I]        of type `dtype`
//   packed               packed_weight_bytes(...) bytes, laid out as packed_layout says
std::int64_t packed_weight_bytes(DType dtype, std::int64_t E, std::int64_t O, std::int64_t I,
                                 PackedType type = PackedType::kExact);
//   input_scale[E,I], input_offset[E,I]
//                        f and c of an int8 weight; null: all are 1 and 0. Those of a gate's weight have to
//                        be those of W_in
void pack_weight(DType dtype, const void* weight, std::int64_t E, std::int64_t O, std::int64_t I,
                 void* packed, PackedType type = PackedType::kExact, const float* input_scale = nullptr,
                 const float* input_offset = nullptr);

// The layout of a packed weight: [E, ceil(O / panel), ceil(I / per_word), panel] words of 32 bits. A word
// holds one element as a float, or two neighbouring bfloat16, or four int8, the first in its lowest bits.
// Padding is zero. After the words of int8 weights follow [E, ceil(O / panel) * panel] scales in float, as
// many sums of int8 by output channel in 32-bit integers, and [E, 2, ceil(I / 32) * 32] floats: f and -c * f.
struct PackedLayout {
  std::int64_t panel, per_word;
};
PackedLayout packed_layout(DType dtype, PackedType type = PackedType::kExact);

// Name of the instruction tier in use, as in csrc/cpu/gemm_<tier>.cpp.
const char* instruction_tier();

// Whether this process may use AMX tiles for bfloat16, which the tier in use may not do.
bool has_matrix_tiles();

// Takes 64-byte aligned, uninitialized memory from the pool of blocks of earlier calls, and gives it back. A
// block may be up to twice as large as asked for, one that is `lasting`, for longer than a call, by an
// eighth.
void* acquire_memory(std::size_t bytes, bool lasting = false);
void return_memory(void* block);

// Bytes that the pool keeps for later calls; release_memory() gives them back to the system.
std::int64_t kept_memory();
// Bytes of the blocks that are not given back: packed weights, and what calls are using.
std::int64_t used_memory();
void release_memory();

}  // namespace clipup
