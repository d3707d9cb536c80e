// topk_gating: softmax over the experts, the K best of them, and their gradient.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../moe.h"
#include "parallel.h"

namespace clipup {
namespace {

// Sums over tokens are split into blocks of this size; partial sums are added in order.
constexpr std::int64_t kBlock = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Writes softmax(logits) to `probs`; returns logsumexp(logits).
float softmax(const float* logits, std::int64_t E, float* probs) {
  float highest = kMinusInfinity;
  for (std::int64_t e = 0; e < E; ++e) highest = std::max(highest, logits[e]);
  float sum = 0.0F;
  for (std::int64_t e = 0; e < E; ++e) sum += probs[e] = std::exp(logits[e] - highest);
  for (std::int64_t e = 0; e < E; ++e) probs[e] /= sum;
  return highest + std::log(sum);
}

// Writes the K experts of the highest scores, highest first, ties to the lowest expert.
// `taken` is scratch of E flags. A NaN counts as minus infinity, so the choices are distinct and in [0, E).
void choose(const float* scores, std::int64_t E, std::int64_t K, std::uint8_t* taken,
            std::int32_t* expert_indices) {
  std::fill_n(taken, E, std::uint8_t{0});
  for (std::int64_t k = 0; k < K; ++k) {
    std::int64_t best = -1;
    float best_score = kMinusInfinity;
    for (std::int64_t e = 0; e < E; ++e) {
      if (taken[e] == 0 && (best < 0 || scores[e] > best_score)) {
        best = e;
        best_score = std::isnan(scores[e]) ? kMinusInfinity : scores[e];
      }
    }
    taken[best] = 1;
    expert_indices[k] = static_cast<std::int32_t>(best);
  }
}

// Writes the softmax over the chosen logits alone, which sums to 1 even where the probabilities underflow. If
// all chosen logits are minus infinity it is 0, not NaN; a NaN of any logit makes `log_sum` NaN, and shows.
void renormalized_gates(const float* logits, float log_sum, const std::int32_t* expert_indices,
                        std::int64_t K, float* gates) {
  float highest = -FLT_MAX;
  for (std::int64_t k = 0; k < K; ++k) highest = std::max(highest, logits[expert_indices[k]]);
  float sum = 0.0F;
  for (std::int64_t k = 0; k < K; ++k) sum += gates[k] = std::exp(logits[expert_indices[k]] - highest);
  const float divisor = std::max(sum, FLT_MIN) + (log_sum - log_sum);
  for (std::int64_t k = 0; k < K; ++k) gates[k] /= divisor;
}

std::int64_t count_unmasked(const std::uint8_t* mask, std::int64_t T) {
  return mask == nullptr ? T : T - std::count(mask, mask + T, std::uint8_t{0});
}

}  // namespace

void topk_gating(const float* logits, const std::uint8_t* mask, const float* selection_bias, std::int64_t T,
                 std::int64_t E, std::int64_t K, bool renormalize, float* gates, std::int32_t* expert_indices,
                 float* top_prob, float* mean_probs, float* z_loss, std::int32_t* tokens_per_expert) {
  check_gating_sizes(T, E, K);
  check_pointer("logits", logits, T * E);
  check_gating_outputs(T, E, K, gates, expert_indices, top_prob, mean_probs, z_loss, tokens_per_expert);

  const std::int64_t blocks = ceil_div(T, kBlock);
  std::vector<float> all_probs(blocks * E);
  std::vector<float> all_scores(blocks * E);
  std::vector<std::uint8_t> all_taken(blocks * E);
  std::vector<double> sums(blocks * E);  // of the probabilities, by block
  std::vector<double> z_sums(blocks);    // of logsumexp^2, by block

  parallel_for(blocks, 2, [&](std::int64_t block) {
    float* probs = all_probs.data() + block * E;
    float* scores = all_scores.data() + block * E;
    for (std::int64_t t = block * kBlock; t < std::min(T, (block + 1) * kBlock); ++t) {
      float* gates_K = gates + t * K;
      std::int32_t* expert_indices_K = expert_indices + t * K;
      if (mask != nullptr && mask[t] == 0) {
        std::fill_n(gates_K, K, 0.0F);
        std::fill_n(expert_indices_K, K, -1);
        top_prob[t] = 0.0F;
        continue;
      }
      const float log_sum = softmax(logits + t * E, E, probs);
      for (std::int64_t e = 0; e < E; ++e) {
        // Logits order the experts as their probabilities do, and still do where those underflow.
        scores[e] = selection_bias == nullptr ? logits[t * E + e] : probs[e] + selection_bias[e];
        sums[block * E + e] += probs[e];
      }
      z_sums[block] += static_cast<double>(log_sum) * log_sum;
      choose(scores, E, K, all_taken.data() + block * E, expert_indices_K);
      for (std::int64_t k = 0; k < K; ++k) gates_K[k] = probs[expert_indices_K[k]];
      if (renormalize) renormalized_gates(logits + t * E, log_sum, expert_indices_K, K, gates_K);
      top_prob[t] = *std::max_element(probs, probs + E);
    }
  });

  const std::int64_t num_unmasked = count_unmasked(mask, T);
  const double share = num_unmasked == 0 ? 0.0 : 1.0 / static_cast<double>(num_unmasked);
  for (std::int64_t e = 0; e < E; ++e) {
    double sum = 0.0;
    for (std::int64_t block = 0; block < blocks; ++block) sum += sums[block * E + e];
    mean_probs[e] = static_cast<float>(sum * share);
  }
  double z_sum = 0.0;
  for (std::int64_t block = 0; block < blocks; ++block) z_sum += z_sums[block];
  *z_loss = static_cast<float>(z_sum * share);

  std::fill_n(tokens_per_expert, K * E, 0);
  parallel_for(K, T < kBlock ? K + 1 : 2, [&](std::int64_t k) {
    for (std::int64_t t = 0; t < T; ++t) {
      if (expert_indices[t * K + k] >= 0) ++tokens_per_expert[k * E + expert_indices[t * K + k]];
    }
  });
}

void topk_gating_backward(const float* logits, const std::uint8_t* mask, const std::int32_t* expert_indices,
                          std::int64_t T, std::int64_t E, std::int64_t K, bool renormalize,
                          const float* d_gates, const float* d_top_prob, const float* d_mean_probs,
                          const float* d_z_loss, float* d_logits) {
  check_gating_sizes(T, E, K);
  check_pointer("logits", logits, T * E);
  check_pointer("expert_indices", expert_indices, T * K);
  check_pointer("d_logits", d_logits, T * E);
  for (std::int64_t t = 0; t < T; ++t) {
    if (mask == nullptr || mask[t] != 0) check_values("expert_indices", expert_indices + t * K, K, 0, E);
  }

  const std::int64_t blocks = ceil_div(T, kBlock);
  const std::int64_t num_unmasked = count_unmasked(mask, T);
  const float share = num_unmasked == 0 ? 0.0F : 1.0F / static_cast<float>(num_unmasked);
  std::vector<float> all_probs(blocks * E);
  std::vector<float> all_d_probs(blocks * E);
  std::vector<float> all_gates(blocks * K);

  parallel_for(blocks, 2, [&](std::int64_t block) {
    float* probs = all_probs.data() + block * E;
    float* d_probs = all_d_probs.data() + block * E;
    for (std::int64_t t = block * kBlock; t < std::min(T, (block + 1) * kBlock); ++t) {
      float* d_logits_E = d_logits + t * E;
      if (mask != nullptr && mask[t] == 0) {
        std::fill_n(d_logits_E, E, 0.0F);
        continue;
      }
      const std::int32_t* expert_indices_K = expert_indices + t * K;
      const float* d_gates_K = d_gates == nullptr ? nullptr : d_gates + t * K;
      const float log_sum = softmax(logits + t * E, E, probs);

      for (std::int64_t e = 0; e < E; ++e)
        d_probs[e] = d_mean_probs == nullptr ? 0.0F : d_mean_probs[e] * share;
      if (d_top_prob != nullptr) d_probs[std::max_element(probs, probs + E) - probs] += d_top_prob[t];
      if (d_gates_K != nullptr && !renormalize) {
        for (std::int64_t k = 0; k < K; ++k) d_probs[expert_indices_K[k]] += d_gates_K[k];
      }
      float inner = 0.0F;
      for (std::int64_t e = 0; e < E; ++e) inner += probs[e] * d_probs[e];
      const float d_log_sum = d_z_loss == nullptr ? 0.0F : *d_z_loss * 2.0F * log_sum * share;
      for (std::int64_t e = 0; e < E; ++e) d_logits_E[e] = probs[e] * (d_probs[e] - inner + d_log_sum);

      if (d_gates_K != nullptr && renormalize) {
        float* gates = all_gates.data() + block * K;
        renormalized_gates(logits + t * E, log_sum, expert_indices_K, K, gates);
        float mean = 0.0F;
        for (std::int64_t k = 0; k < K; ++k) mean += gates[k] * d_gates_K[k];
        for (std::int64_t k = 0; k < K; ++k) {
          d_logits_E[expert_indices_K[k]] += gates[k] * (d_gates_K[k] - mean);
        }
      }
    }
  });
}

}  // namespace clipup
