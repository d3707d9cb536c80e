// Random cases of gating and dispatch.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>

#include "../moe.h"
#include "tests.h"

namespace clipup::tests {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Gating {
  Gating(std::int64_t T, std::int64_t E, std::int64_t K)
      : gates(T * K, kNaN),
        expert_indices(T * K, -7),
        top_prob(T, kNaN),
        mean_probs(E, kNaN),
        tokens_per_expert(K * E, -7) {}

  bool operator==(const Gating& other) const {
    return gates == other.gates && expert_indices == other.expert_indices && top_prob == other.top_prob &&
           mean_probs == other.mean_probs && z_loss == other.z_loss &&
           tokens_per_expert == other.tokens_per_expert;
  }

  std::vector<float> gates;
  std::vector<std::int32_t> expert_indices;
  std::vector<float> top_prob;
  std::vector<float> mean_probs;
  float z_loss = kNaN;
  std::vector<std::int32_t> tokens_per_expert;
};

struct GatingCase {
  std::int64_t T, E, K;
  bool renormalize, masked, biased;
  std::vector<float> logits, bias;
  std::vector<std::uint8_t> mask;

  GatingCase(std::int64_t T, std::int64_t E, std::int64_t K, int options)
      : T(T),
        E(E),
        K(K),
        renormalize((options & 1) != 0),
        masked((options & 2) != 0),
        biased((options & 4) != 0) {
    for (std::int64_t i = 0; i < T * E; ++i) logits.push_back(2.0F * normal());
    for (std::int64_t e = 0; e < E; ++e) bias.push_back(0.3F * normal());
    for (std::int64_t t = 0; t < T; ++t) mask.push_back(uniform() < 0.7F ? 1 : 0);
    for (std::int64_t t = 0; t < T; ++t) {
      if (!unmasked(t)) std::fill_n(logits.begin() + t * E, E, kNaN);  // must not matter
    }
    describe("T=" + std::to_string(T) + " E=" + std::to_string(E) + " K=" + std::to_string(K) +
             " options=" + std::to_string(options));
  }

  // Logits far apart, and a bias that chooses the last experts for every token, most of them of probability 0
  // in float.
  GatingCase& choose_unlikely() {
    for (float& logit : logits) logit *= 50.0F;
    for (std::int64_t e = 0; e < E; ++e) bias[e] = 2.0F * static_cast<float>(e);
    return *this;
  }

  bool unmasked(std::int64_t t) const { return !masked || mask[t] != 0; }
  const std::uint8_t* mask_or_null() const { return masked ? mask.data() : nullptr; }

  Gating run() const {
    Gating out(T, E, K);
    topk_gating(logits.data(), mask_or_null(), biased ? bias.data() : nullptr, T, E, K, renormalize,
                out.gates.data(), out.expert_indices.data(), out.top_prob.data(), out.mean_probs.data(),
                &out.z_loss, out.tokens_per_expert.data());
    return out;
  }
};

struct DispatchCase {
  std::int64_t T, K, E;
  double capacity_factor;
  std::vector<std::int32_t> expert_indices;
  std::vector<std::uint8_t> mask;
  std::vector<float> priority;

  DispatchCase(std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, bool masked,
               bool prioritised)
      : T(T), K(K), E(E), capacity_factor(capacity_factor), expert_indices(random_experts(T, K, E, 0.1F)) {
    for (std::int64_t t = 0; masked && t < T; ++t) mask.push_back(uniform() < 0.7F ? 1 : 0);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const std::vector<float> ties = {-1.5F, -0.0F, 0.0F, 0.25F, 2.0F, kNaN, kInfinity, -kInfinity};
    for (std::int64_t t = 0; prioritised && t < T; ++t) priority.push_back(ties[integer(ties.size())]);
    describe("T=" + std::to_string(T) + " K=" + std::to_string(K) + " E=" + std::to_string(E) +
             " f=" + std::to_string(capacity_factor) + " masked=" + std::to_string(masked) +
             " prioritised=" + std::to_string(prioritised));
  }

  bool unmasked(std::int64_t t) const { return mask.empty() || mask[t] != 0; }

  Plan run() const {
    Plan plan(T, K, E);
    dispatch(expert_indices.data(), mask.empty() ? nullptr : mask.data(),
             priority.empty() ? nullptr : priority.data(), T, K, E, capacity_factor, plan.offsets.data(),
             plan.choice_of_row.data(), plan.row_of_choice.data());
    return plan;
  }

  // The tokens in the order in which they are served.
  std::vector<std::int64_t> order() const {
    const auto ranked = [](float p) { return std::isnan(p) ? -std::numeric_limits<float>::infinity() : p; };
    std::vector<std::int64_t> order(T);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      if (priority.empty()) return false;
      return ranked(priority[a]) > ranked(priority[b]);
    });
    return order;
  }

  Plan naive() const {
    const std::vector<std::int64_t> served = order();
    std::int64_t num_routed = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      bool routed = false;
      for (std::int64_t k = 0; k < K; ++k) routed = routed || expert_indices[t * K + k] >= 0;
      num_routed += routed && unmasked(t) ? 1 : 0;
    }
    double capacity = std::ceil(capacity_factor * K * num_routed / E);
    if (capacity_factor < 0) capacity = std::numeric_limits<double>::infinity();

    std::vector<std::vector<std::int32_t>> rows(E);
    for (std::int64_t k = 0; k < K; ++k) {
      for (const std::int64_t t : served) {
        const std::int32_t e = expert_indices[t * K + k];
        if (unmasked(t) && e >= 0 && rows[e].size() < capacity) rows[e].push_back(t * K + k);
      }
    }
    Plan plan(T, K, E);
    std::fill(plan.choice_of_row.begin(), plan.choice_of_row.end(), -1);
    std::fill(plan.row_of_choice.begin(), plan.row_of_choice.end(), -1);
    std::int32_t row = 0;
    plan.offsets[0] = 0;
    for (std::int64_t e = 0; e < E; ++e) {
      for (const std::int32_t choice : rows[e]) {
        plan.row_of_choice[choice] = row;
        plan.choice_of_row[row++] = choice;
      }
      plan.offsets[e + 1] = row;
    }
    return plan;
  }
};

}  // namespace clipup::tests
