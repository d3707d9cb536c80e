// topk_gating on CUDA devices: softmax over the experts, the K best of them and their statistics.
//
//   gating_kernel    logits -> gates, expert_indices, top_prob; per block of tokens: sums and
//                    tokens_per_expert
//   reduce_kernel    these sums, block by block in order -> mean_probs, z_loss, tokens_per_expert
#include <climits>
#include <cstdint>

#include "../checks.h"
#include "../moe_cuda.h"
#include "device.cuh"
#include "softmax.cuh"

namespace clipup::cuda {
namespace {

constexpr int kSharedCounters = 4096;

// Input of `reduce_kernel`: [blocks, E+2] sums of the E probabilities, of logsumexp^2 and of unmasked tokens,
// and [blocks, K*E] tokens_per_expert.
struct Partials {
  float* sums;
  std::int32_t* tokens_per_expert;
};

Partials partials_at(void* workspace, const TokenGrid& grid) {
  auto* const sums = static_cast<float*>(workspace);
  return {sums, reinterpret_cast<std::int32_t*>(sums + grid.blocks * (grid.E + 2))};
}

// The sum over a warp's groups, separately for each position in the group.
template <class Value>
__device__ Value sum_of_groups(Value value, int lanes) {
  for (int distance = lanes; distance < kWarp; distance *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The expert of the highest score that is not taken, the lowest one on ties; the same in the whole group. Bit
// v of `taken` belongs to value v. At least one expert is not taken; values past E are -inf and lose every
// tie to it.
template <int kValues>
__device__ int best_expert(const float (&scores)[kValues], unsigned taken, int lane, int lanes) {
  float best_score = kMinusInfinity;
  int best = INT_MAX;  // loses every tie
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if ((taken >> v & 1U) == 0 && (best == INT_MAX || scores[v] > best_score)) {
      best = v * lanes + lane;
      best_score = scores[v];
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, best_score, distance);
    const int expert = __shfl_xor_sync(kAllLanes, best, distance);
    if (score > best_score || (score == best_score && expert < best)) {
      best = expert;
      best_score = score;
    }
  }
  return best;
}

// How many of the tokens [begin, end) chose each expert as their k-th choice. The same block has written
// `expert_indices`; the counters hold several choices at a time.
__device__ void count_tokens_per_expert(const std::int32_t* expert_indices, std::int64_t begin,
                                        std::int64_t end, const TokenGrid& grid,
                                        std::int32_t* tokens_per_expert) {
  __shared__ int counters[kSharedCounters];
  const int most = kSharedCounters / grid.E;
  for (int first = 0; first < grid.K; first += most) {
    const int choices = grid.K - first < most ? grid.K - first : most;
    for (int i = threadIdx.x; i < choices * grid.E; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < (end - begin) * choices; i += blockDim.x) {
      const int k = static_cast<int>(i % choices);
      const std::int32_t expert = expert_indices[(begin + i / choices) * grid.K + first + k];
      if (expert >= 0) atomicAdd(&counters[k * grid.E + expert], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < choices * grid.E; i += blockDim.x)
      tokens_per_expert[first * grid.E + i] = counters[i];
    __syncthreads();  // the counters are free for the next choices
  }
}

template <int kValues>
__global__ void __launch_bounds__(kGatingThreads)
    gating_kernel(const float* __restrict__ logits, const std::uint8_t* __restrict__ mask,
                  const float* __restrict__ selection_bias, TokenGrid grid, bool renormalize,
                  float* __restrict__ gates, std::int32_t* expert_indices, float* __restrict__ top_prob,
                  Partials partials) {
  const int lanes = grid.lanes;
  const int lane = threadIdx.x % lanes;
  const std::int64_t begin = blockIdx.x * grid.tokens_per_block;
  const std::int64_t end = begin + grid.tokens_per_block < grid.T ? begin + grid.tokens_per_block : grid.T;
  float prob_sums[kValues] = {};
  float z_sum = 0.0F;
  float tokens = 0.0F;  // few enough to count in a float

  for (std::int64_t first = begin; first < end; first += blockDim.x / lanes) {
    const std::int64_t t = first + threadIdx.x / lanes;
    const bool inside =
        t < end;  // groups without a token continue, because every lane must execute every shuffle
    const bool unmasked = inside && (mask == nullptr || mask[t] != 0);
    const Softmax<kValues> token = softmax<kValues>(logits + t * grid.E, unmasked, lane, grid);

    float scores[kValues];
    unsigned taken = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int e = v * lanes + lane;
      // Logits order the experts as their probabilities do, and still do where those underflow.
      scores[v] = token.logits[v];
      if (selection_bias != nullptr && e < grid.E) scores[v] = token.probs[v] + selection_bias[e];
      if (isnan(scores[v])) scores[v] = kMinusInfinity;
      if (unmasked) prob_sums[v] += token.probs[v];
    }
    if (unmasked) {
      z_sum += token.log_sum * token.log_sum;
      tokens += 1.0F;
    }

    // Lane l keeps choice k = v*lanes + l.
    float weights[kValues];
    std::int32_t chosen[kValues] = {};
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      weights[v] = kMinusInfinity;
      for (int keeper = 0; keeper < lanes && v * lanes + keeper < grid.K; ++keeper) {
        const int expert = best_expert(scores, taken, lane, lanes);
        float weight = 0.0F;
#pragma unroll
        for (int w = 0; w < kValues; ++w) {
          if (w * lanes + lane == expert) {
            weight = renormalize ? token.logits[w] : token.probs[w];
            taken |= 1U << w;
          }
        }
        weight = __shfl_sync(kAllLanes, weight, expert % lanes, lanes);
        if (lane == keeper) {
          weights[v] = weight;
          chosen[v] = expert;
        }
      }
    }
    if (renormalize) renormalize_gates(weights, token.log_sum, lanes);
    if (!inside) continue;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int k = v * lanes + lane;
      if (k >= grid.K) continue;
      gates[t * grid.K + k] = unmasked ? weights[v] : 0.0F;
      expert_indices[t * grid.K + k] = unmasked ? chosen[v] : -1;
    }
    if (lane == 0) top_prob[t] = unmasked ? token.top : 0.0F;
  }

  __shared__ float of_warp[kGatingWarps][kMostExperts + 2];
  const int warp = threadIdx.x / kWarp;
  const int lane_of_warp = threadIdx.x % kWarp;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const float sum = sum_of_groups(prob_sums[v], lanes);
    if (lane_of_warp == lane && v * lanes + lane < grid.E) of_warp[warp][v * lanes + lane] = sum;
  }
  z_sum = sum_of_groups(z_sum, lanes);
  tokens = sum_of_groups(tokens, lanes);
  if (lane_of_warp == 0) {
    of_warp[warp][grid.E] = z_sum;
    of_warp[warp][grid.E + 1] = tokens;
  }
  __syncthreads();  // also: expert_indices are written and visible to the block
  for (int column = threadIdx.x; column < grid.E + 2; column += blockDim.x) {
    float sum = 0.0F;
    for (int w = 0; w < kGatingWarps; ++w) sum += of_warp[w][column];
    partials.sums[blockIdx.x * (grid.E + 2) + column] = sum;
  }
  count_tokens_per_expert(expert_indices, begin, end, grid,
                          partials.tokens_per_expert + std::int64_t{blockIdx.x} * grid.K * grid.E);
}

// The sum of a column over all rows, in the threads of the column, one in kWarp. Every thread of the block
// must call it.
template <class Sum, class Value>
__device__ Sum column_sum(const Value* partials, std::int64_t rows, int columns, int column) {
  __shared__ Sum of_warp[kGatingWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  Sum sum = 0;
  for (std::int64_t row = threadIdx.x / kWarp; row < rows && column < columns; row += kGatingWarps) {
    sum += partials[row * columns + column];
  }
  of_warp[threadIdx.x / kWarp][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < kGatingWarps; ++warp) sum += of_warp[warp][lane];
  __syncthreads();  // of_warp is free for the next call
  return sum;
}

int column_blocks(std::int64_t columns) { return static_cast<int>((columns + kWarp - 1) / kWarp); }

// The first `count_blocks` blocks sum tokens_per_expert, kWarp columns each, the others probabilities and
// logsumexp^2.
__global__ void __launch_bounds__(kGatingThreads)
    reduce_kernel(Partials partials, TokenGrid grid, int count_blocks, float* __restrict__ mean_probs,
                  float* __restrict__ z_loss, std::int32_t* __restrict__ tokens_per_expert) {
  const int block = static_cast<int>(blockIdx.x);
  const int lane = threadIdx.x % kWarp;
  if (block < count_blocks) {
    const int column = block * kWarp + lane;
    const int sum = column_sum<int>(partials.tokens_per_expert, grid.blocks, grid.K * grid.E, column);
    if (threadIdx.x < kWarp && column < grid.K * grid.E) tokens_per_expert[column] = sum;
    return;
  }
  const int column = (block - count_blocks) * kWarp + lane;
  const double sum = column_sum<double>(partials.sums, grid.blocks, grid.E + 2, column);
  const double tokens = column_sum<double>(partials.sums, grid.blocks, grid.E + 2, grid.E + 1);
  const auto mean = static_cast<float>(sum * (tokens == 0.0 ? 0.0 : 1.0 / tokens));
  if (threadIdx.x >= kWarp) return;
  if (column < grid.E) mean_probs[column] = mean;
  if (column == grid.E) *z_loss = mean;
}

}  // namespace

std::int64_t topk_gating_workspace_bytes(std::int64_t T, std::int64_t E, std::int64_t K) {
  check_gating_sizes(T, E, K);
  check_most_experts(E);
  return token_grid(T, E, K).blocks * ((K + 1) * E + 2) * static_cast<std::int64_t>(sizeof(float));
}

void topk_gating(const float* logits, const std::uint8_t* mask, const float* selection_bias, std::int64_t T,
                 std::int64_t E, std::int64_t K, bool renormalize, float* gates, std::int32_t* expert_indices,
                 float* top_prob, float* mean_probs, float* z_loss, std::int32_t* tokens_per_expert,
                 void* workspace, void* stream) {
  check_gating_sizes(T, E, K);
  check_most_experts(E);
  check_pointer("logits", logits, T * E);
  check_gating_outputs(T, E, K, gates, expert_indices, top_prob, mean_probs, z_loss, tokens_per_expert);
  check_pointer("workspace", workspace, topk_gating_workspace_bytes(T, E, K));

  const TokenGrid grid = token_grid(T, E, K);
  const Partials partials = partials_at(workspace, grid);
  with_values(grid.values, [&](auto values) {
    launch("topk_gating", gating_kernel<decltype(values)::value>, grid.blocks, kGatingThreads, stream, logits,
           mask, selection_bias, grid, renormalize, gates, expert_indices, top_prob, partials);
  });
  const int count_blocks = column_blocks(K * E);
  launch("topk_gating", reduce_kernel, count_blocks + column_blocks(E + 1), kGatingThreads, stream, partials,
         grid, count_blocks, mean_probs, z_loss, tokens_per_expert);
}

}  // namespace clipup::cuda
