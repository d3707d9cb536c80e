// Softmax over the experts of a token on a group of neighbouring threads, for topk_gating and its gradient.
//
// A group of `lanes` threads works on a token: value v of lane l belongs to expert v*lanes + l, so that loads
// are coalesced for any E. The split of tokens into blocks, and so the order of all sums, depends only on T,
// E and K.
#pragma once

#include <cfloat>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../moe_cuda.h"
#include "device.cuh"

namespace clipup::cuda {

constexpr int kGatingThreads = 256;
constexpr int kGatingWarps = kGatingThreads / kWarp;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The split of T tokens: a block processes `tokens_per_block` neighbours, one per group at a time.
struct TokenGrid {
  std::int64_t T;
  int E, K;
  int lanes;   // threads per group: a power of 2
  int values;  // experts per lane
  std::int64_t tokens_per_block, blocks;
};

inline TokenGrid token_grid(std::int64_t T, std::int64_t E, std::int64_t K) {
  TokenGrid grid{T, static_cast<int>(E), static_cast<int>(K), 1, 1, 0, 1};
  while (grid.lanes < kWarp && grid.lanes < E) grid.lanes *= 2;
  while (grid.lanes * grid.values < E) grid.values *= 2;
  // Enough blocks for a large GPU, but few enough that the sums stay small: each block writes (K+1)*E+2 of
  // them.
  std::int64_t most = 512;
  while (most > 32 && most * K * E > std::int64_t{1} << 20) most /= 2;
  const std::int64_t groups = kGatingThreads / grid.lanes;
  const std::int64_t tiles = T == 0 ? 1 : (T + groups - 1) / groups;
  const std::int64_t tiles_per_block = (tiles + most - 1) / most;
  grid.tokens_per_block = tiles_per_block * groups;
  grid.blocks = (tiles + tiles_per_block - 1) / tiles_per_block;
  return grid;
}

__device__ inline float group_sum(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

__device__ inline float group_max(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// A token's probabilities; log_sum and top are the same in the whole group. Past E logits are -inf,
// probabilities 0.
template <int kValues>
struct Softmax {
  float logits[kValues], probs[kValues];
  float log_sum;  // logsumexp of the logits
  float top;      // the largest probability
};

// Logits of a masked token, which may be NaN, are not read and count as 0.
template <int kValues>
__device__ Softmax<kValues> softmax(const float* logits, bool unmasked, int lane, const TokenGrid& grid) {
  Softmax<kValues> result;
  float highest = kMinusInfinity;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const int e = v * grid.lanes + lane;
    result.logits[v] = e >= grid.E ? kMinusInfinity : unmasked ? logits[e] : 0.0F;
    highest = fmaxf(highest, result.logits[v]);
  }
  highest = group_max(highest, grid.lanes);
  float sum = 0.0F;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    result.probs[v] = v * grid.lanes + lane < grid.E ? expf(result.logits[v] - highest) : 0.0F;
    sum += result.probs[v];
  }
  sum = group_sum(sum, grid.lanes);
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (v * grid.lanes + lane < grid.E) result.probs[v] /= sum;  // 0 past E even where the sum is NaN
  }
  result.log_sum = highest + logf(sum);
  result.top = 1.0F / sum;  // the exponential of the highest logit is 1
  return result;
}

// Replaces the group's chosen logits, -inf in the other places, by the softmax over them alone, which sums to
// 1 even where the probabilities underflow. If all are minus infinity it is 0, not NaN; a NaN of any logit of
// the token makes `log_sum` NaN, and shows.
template <int kValues>
__device__ void renormalize_gates(float (&gates)[kValues], float log_sum, int lanes) {
  float highest = -FLT_MAX;
#pragma unroll
  for (int v = 0; v < kValues; ++v) highest = fmaxf(highest, gates[v]);
  highest = group_max(highest, lanes);
  float sum = 0.0F;
#pragma unroll
  for (int v = 0; v < kValues; ++v) sum += gates[v] = expf(gates[v] - highest);
  const float divisor = fmaxf(group_sum(sum, lanes), FLT_MIN) + (log_sum - log_sum);
#pragma unroll
  for (int v = 0; v < kValues; ++v) gates[v] /= divisor;
}

// Calls function(std::integral_constant<int, kValues>{}) with the number of values that a lane holds.
template <class Function>
void with_values(int values, const Function& function) {
  switch (values) {
    case 1:
      return function(std::integral_constant<int, 1>{});
    case 2:
      return function(std::integral_constant<int, 2>{});
    case 4:
      return function(std::integral_constant<int, 4>{});
    default:
      return function(std::integral_constant<int, kMostExperts / kWarp>{});
  }
}

}  // namespace clipup::cuda
