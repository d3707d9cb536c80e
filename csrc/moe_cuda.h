// The native interface on CUDA devices: the stages of moe.h that have kernels in csrc/cuda.
//
// Arrays and results are as in moe.h, with these differences:
//   - pointers are addresses on the current device;
//   - work is queued on `stream` (a cudaStream_t); the host never waits, so the calls can be captured in
//     a CUDA graph;
//   - sizes are checked, values on the device are not: an index outside its range counts as -1;
//   - a failed launch throws std::runtime_error;
//   - a stage takes its temporary memory as `workspace`, uninitialized and aligned to 16 bytes; a function
//     returns its size in bytes;
//   - there are at most kMostExperts experts.
// `dispatch` gives bitwise the CPU's results. `topk_gating` and its gradient agree up to the rounding of
// exponentials and of sums, whose order depends only on T, E and K.
#pragma once

#include <cstdint>

#include "moe.h"

namespace clipup::cuda {

constexpr int kMostExperts = 256;

// Two launches.
std::int64_t topk_gating_workspace_bytes(std::int64_t T, std::int64_t E, std::int64_t K);
void topk_gating(const float* logits, const std::uint8_t* mask, const float* selection_bias, std::int64_t T,
                 std::int64_t E, std::int64_t K, bool renormalize, float* gates, std::int32_t* expert_indices,
                 float* top_prob, float* mean_probs, float* z_loss, std::int32_t* tokens_per_expert,
                 void* workspace, void* stream);

// One launch; two where the unmasked tokens have to be counted.
std::int64_t topk_gating_backward_workspace_bytes();
void topk_gating_backward(const float* logits, const std::uint8_t* mask, const std::int32_t* expert_indices,
                          std::int64_t T, std::int64_t E, std::int64_t K, bool renormalize,
                          const float* d_gates, const float* d_top_prob, const float* d_mean_probs,
                          const float* d_z_loss, float* d_logits, void* workspace, void* stream);

// Two launches.
//
//   order[T]             a permutation: the tokens in the order in which they are served; null: by position.
//                        A token missing from it gets no row, and its row_of_choice is not written
std::int64_t dispatch_workspace_bytes(std::int64_t T, std::int64_t K, std::int64_t E);
void dispatch(const std::int32_t* expert_indices, const std::uint8_t* mask, const std::int64_t* order,
              std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, std::int32_t* offsets,
              std::int32_t* choice_of_row, std::int32_t* row_of_choice, void* workspace, void* stream);

}  // namespace clipup::cuda
