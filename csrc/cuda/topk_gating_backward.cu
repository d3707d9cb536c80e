// The gradient of topk_gating on CUDA devices, the choices held constant.
//
//   count_tokens_kernel       mask -> partial counts of unmasked tokens; only if a loss needs their number
//   gating_backward_kernel    logits, choices, incoming gradients -> d_logits
#include <climits>
#include <cstdint>

#include "../checks.h"
#include "../moe_cuda.h"
#include "device.cuh"
#include "softmax.cuh"

namespace clipup::cuda {
namespace {

// counts[block] = unmasked tokens in a range of tokens.
constexpr std::int64_t kMostCounts = kGatingThreads;
__global__ void __launch_bounds__(kGatingThreads)
    count_tokens_kernel(const std::uint8_t* __restrict__ mask, std::int64_t T,
                        std::int32_t* __restrict__ counts) {
  int count = 0;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t t = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; t < T; t += step) {
    count += mask[t] != 0 ? 1 : 0;
  }
  count = block_total(count);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// Incoming gradients; null: zero.
struct GatingGradients {
  const float *gates, *top_prob, *mean_probs, *z_loss;
};

// `counts`: partial counts of unmasked tokens; null: no token is masked.
template <int kValues>
__global__ void __launch_bounds__(kGatingThreads)
    gating_backward_kernel(const float* __restrict__ logits, const std::uint8_t* __restrict__ mask,
                           const std::int32_t* __restrict__ expert_indices, TokenGrid grid, bool renormalize,
                           const std::int32_t* __restrict__ counts, int num_counts, GatingGradients d,
                           float* __restrict__ d_logits) {
  const int lanes = grid.lanes;
  const int lane = threadIdx.x % lanes;
  const std::int64_t begin = blockIdx.x * grid.tokens_per_block;
  const std::int64_t end = begin + grid.tokens_per_block < grid.T ? begin + grid.tokens_per_block : grid.T;
  float num_unmasked = static_cast<float>(grid.T);
  if (counts != nullptr) {
    const int index = static_cast<int>(threadIdx.x);
    num_unmasked = static_cast<float>(block_total(index < num_counts ? counts[index] : 0));
  }
  const float share = num_unmasked == 0.0F ? 0.0F : 1.0F / num_unmasked;

  for (std::int64_t first = begin; first < end; first += blockDim.x / lanes) {
    const std::int64_t t = first + threadIdx.x / lanes;
    const bool inside = t < end;
    const bool unmasked = inside && (mask == nullptr || mask[t] != 0);
    const Softmax<kValues> token = softmax<kValues>(logits + t * grid.E, unmasked, lane, grid);

    // Gradients of the gates, by expert.
    float d_gates[kValues] = {};
    unsigned chosen = 0;
    for (int k = 0; k < grid.K && d.gates != nullptr && unmasked; ++k) {
      const std::int32_t expert = expert_indices[t * grid.K + k];
      const float d_gate = d.gates[t * grid.K + k];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (v * lanes + lane == expert) {
          d_gates[v] += d_gate;
          chosen |= 1U << v;
        }
      }
    }
    int top_expert = INT_MAX;
    if (d.top_prob != nullptr) {
#pragma unroll
      for (int v = kValues - 1; v >= 0; --v) {
        if (token.probs[v] == token.top) top_expert = v * lanes + lane;
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, top_expert, distance);
        top_expert = other < top_expert ? other : top_expert;
      }
    }

    float d_probs[kValues];
    float inner = 0.0F;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int e = v * lanes + lane;
      d_probs[v] = d.mean_probs != nullptr && e < grid.E ? d.mean_probs[e] * share : 0.0F;
      if (e == top_expert && unmasked) d_probs[v] += d.top_prob[t];
      if (!renormalize) d_probs[v] += d_gates[v];
      inner += token.probs[v] * d_probs[v];
    }
    inner = group_sum(inner, lanes);
    const float d_log_sum = d.z_loss == nullptr ? 0.0F : *d.z_loss * 2.0F * token.log_sum * share;

    float gates[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      gates[v] = renormalize && (chosen >> v & 1U) != 0 ? token.logits[v] : kMinusInfinity;
    }
    renormalize_gates(gates, token.log_sum,
                      lanes);  // 0 if they are not renormalized: d_probs has their gradient
    float mean = 0.0F;
#pragma unroll
    for (int v = 0; v < kValues; ++v) mean += gates[v] * d_gates[v];
    mean = group_sum(mean, lanes);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int e = v * lanes + lane;
      if (!inside || e >= grid.E) continue;
      const float gradient =
          token.probs[v] * (d_probs[v] - inner + d_log_sum) + gates[v] * (d_gates[v] - mean);
      d_logits[t * grid.E + e] = unmasked ? gradient : 0.0F;
    }
  }
}

}  // namespace

std::int64_t topk_gating_backward_workspace_bytes() { return kMostCounts * sizeof(std::int32_t); }

void topk_gating_backward(const float* logits, const std::uint8_t* mask, const std::int32_t* expert_indices,
                          std::int64_t T, std::int64_t E, std::int64_t K, bool renormalize,
                          const float* d_gates, const float* d_top_prob, const float* d_mean_probs,
                          const float* d_z_loss, float* d_logits, void* workspace, void* stream) {
  check_gating_sizes(T, E, K);
  check_most_experts(E);
  check_pointer("logits", logits, T * E);
  check_pointer("expert_indices", expert_indices, T * K);
  check_pointer("d_logits", d_logits, T * E);
  check_pointer("workspace", workspace, topk_gating_backward_workspace_bytes());
  if (T == 0) return;

  auto* counts = static_cast<std::int32_t*>(workspace);
  const std::int64_t blocks = (T + kGatingThreads - 1) / kGatingThreads;
  const int num_counts = static_cast<int>(blocks < kMostCounts ? blocks : kMostCounts);
  if (mask != nullptr && (d_mean_probs != nullptr || d_z_loss != nullptr)) {
    launch("topk_gating_backward", count_tokens_kernel, num_counts, kGatingThreads, stream, mask, T, counts);
  } else {
    counts = nullptr;
  }
  const TokenGrid grid = token_grid(T, E, K);
  const GatingGradients d{d_gates, d_top_prob, d_mean_probs, d_z_loss};
  with_values(grid.values, [&](auto values) {
    launch("topk_gating_backward", gating_backward_kernel<decltype(values)::value>, grid.blocks,
           kGatingThreads, stream, logits, mask, expert_indices, grid, renormalize, counts, num_counts, d,
           d_logits);
  });
}

}  // namespace clipup::cuda
