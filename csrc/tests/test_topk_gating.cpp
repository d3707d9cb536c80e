// topk_gating against a softmax in double, its gradient against central differences.
#include <algorithm>
#include <limits>
#include <numeric>
#include <set>

#include "../moe.h"
#include "routing_cases.h"
#include "tests.h"

namespace clipup::tests {
namespace {

using Case = GatingCase;

std::vector<double> naive_softmax(const double* logits, std::int64_t E, double* log_sum) {
  const double highest = *std::max_element(logits, logits + E);
  std::vector<double> probs;
  for (std::int64_t e = 0; e < E; ++e) probs.push_back(std::exp(logits[e] - highest));
  const double sum = std::accumulate(probs.begin(), probs.end(), 0.0);
  for (double& p : probs) p /= sum;
  *log_sum = highest + std::log(sum);
  return probs;
}

void expect_forward(const Case& c) {
  const Gating out = c.run();
  std::vector<double> sums(c.E);
  std::vector<std::int32_t> tokens_per_expert(c.K * c.E);
  double z = 0.0;
  int num_unmasked = 0;
  for (std::int64_t t = 0; t < c.T; ++t) {
    if (!c.unmasked(t)) {
      for (std::int64_t k = 0; k < c.K; ++k) {
        EXPECT(out.gates[t * c.K + k] == 0.0F && out.expert_indices[t * c.K + k] == -1);
      }
      EXPECT(out.top_prob[t] == 0.0F);
      continue;
    }
    ++num_unmasked;
    const std::vector<double> logits(c.logits.begin() + t * c.E, c.logits.begin() + (t + 1) * c.E);
    double log_sum = 0.0;
    const std::vector<double> probs = naive_softmax(logits.data(), c.E, &log_sum);
    z += log_sum * log_sum;
    std::vector<std::int32_t> order(c.E);
    std::iota(order.begin(), order.end(), 0);
    const auto score = [&](std::int32_t e) { return probs[e] + (c.biased ? c.bias[e] : 0.0); };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return score(a) > score(b); });
    double chosen = 0.0;
    for (std::int64_t k = 0; k < c.K; ++k) chosen += probs[order[k]];
    for (std::int64_t k = 0; k < c.K; ++k) {
      EXPECT(out.expert_indices[t * c.K + k] == order[k]);
      EXPECT(close(out.gates[t * c.K + k], probs[order[k]] / (c.renormalize ? chosen : 1.0), 1e-6));
      ++tokens_per_expert[k * c.E + order[k]];
    }
    EXPECT(close(out.top_prob[t], *std::max_element(probs.begin(), probs.end()), 1e-6));
    for (std::int64_t e = 0; e < c.E; ++e) sums[e] += probs[e];
  }
  const int divisor = std::max(num_unmasked, 1);
  for (std::int64_t e = 0; e < c.E; ++e) EXPECT(close(out.mean_probs[e], sums[e] / divisor, 1e-6));
  EXPECT(close(out.z_loss, z / divisor, 1e-5));
  EXPECT(out.tokens_per_expert == tokens_per_expert);
}

// The sum of all outputs, each times its incoming gradient, as a function of the logits, choices constant.
double weighted_outputs(const Case& c, const Gating& fixed, const std::vector<double>& logits,
                        const Gating& weights) {
  double result = 0.0;
  double num_unmasked = 0.0;
  double statistics = 0.0;
  for (std::int64_t t = 0; t < c.T; ++t) {
    if (!c.unmasked(t)) continue;
    ++num_unmasked;
    double log_sum = 0.0;
    const std::vector<double> probs = naive_softmax(logits.data() + t * c.E, c.E, &log_sum);
    double chosen = 0.0;
    for (std::int64_t k = 0; k < c.K; ++k) chosen += probs[fixed.expert_indices[t * c.K + k]];
    for (std::int64_t k = 0; k < c.K; ++k) {
      const double gate = probs[fixed.expert_indices[t * c.K + k]] / (c.renormalize ? chosen : 1.0);
      result += gate * weights.gates[t * c.K + k];
    }
    result += *std::max_element(probs.begin(), probs.end()) * weights.top_prob[t];
    for (std::int64_t e = 0; e < c.E; ++e) statistics += probs[e] * weights.mean_probs[e];
    statistics += log_sum * log_sum * weights.z_loss;
  }
  return result + statistics / std::max(num_unmasked, 1.0);
}

void expect_backward(const Case& c) {
  const Gating out = c.run();
  for (int given = 0; given < 16; ++given) {  // which gradients come in
    Gating weights(c.T, c.E, c.K);
    for (float& w : weights.gates) w = (given & 1) != 0 ? normal() : 0.0F;
    for (float& w : weights.top_prob) w = (given & 2) != 0 ? normal() : 0.0F;
    for (float& w : weights.mean_probs) w = (given & 4) != 0 ? normal() : 0.0F;
    weights.z_loss = (given & 8) != 0 ? normal() : 0.0F;

    std::vector<float> d_logits(c.T * c.E, kNaN);
    topk_gating_backward(c.logits.data(), c.mask_or_null(), out.expert_indices.data(), c.T, c.E, c.K,
                         c.renormalize, (given & 1) != 0 ? weights.gates.data() : nullptr,
                         (given & 2) != 0 ? weights.top_prob.data() : nullptr,
                         (given & 4) != 0 ? weights.mean_probs.data() : nullptr,
                         (given & 8) != 0 ? &weights.z_loss : nullptr, d_logits.data());

    std::vector<double> logits(c.logits.begin(), c.logits.end());
    constexpr double kStep = 1e-5;
    for (std::int64_t i = 0; i < c.T * c.E; ++i) {
      if (!c.unmasked(i / c.E)) {
        EXPECT(d_logits[i] == 0.0F);
        continue;
      }
      const double at = logits[i];
      logits[i] = at + kStep;
      const double above = weighted_outputs(c, out, logits, weights);
      logits[i] = at - kStep;
      const double below = weighted_outputs(c, out, logits, weights);
      logits[i] = at;
      EXPECT(close(d_logits[i], (above - below) / (2 * kStep), 1e-4));
    }
  }
}

// What a float cannot hold beside 1 is told from no probability at all, and a NaN shows.
void expect_gates_of_nothing() {
  const float infinity = std::numeric_limits<float>::infinity();
  Case c(4, 4, 2, 5);
  c.logits = {0, 0, -104, -105, 0, 0, -infinity, -104, 0, 0, -infinity, -infinity, kNaN, 0, 1, 1};
  c.bias = {0, 0, 9, 9};
  const Gating out = c.run();
  const double share = 1.0 / (1.0 + std::exp(-1.0));
  EXPECT(close(out.gates[0], share, 1e-6) && close(out.gates[1], 1.0 - share, 1e-6));
  EXPECT(out.gates[2] == 0.0F && out.gates[3] == 1.0F);
  EXPECT(out.gates[4] == 0.0F && out.gates[5] == 0.0F);
  EXPECT(std::isnan(out.gates[6]) && std::isnan(out.gates[7]));
}

void expect_ties_go_to_the_lowest_expert() {
  Case c(3, 6, 4, 1);
  std::fill(c.logits.begin(), c.logits.end(), 0.5F);
  const Gating out = c.run();
  for (std::int64_t i = 0; i < 12; ++i)
    EXPECT(out.expert_indices[i] == i % 4 && close(out.gates[i], 0.25, 1e-6));
}

void expect_distinct_experts_whatever_the_logits() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int trial = 0; trial < 200; ++trial) {
    Case c(4, 1 + integer(9), 1, trial % 8);
    c.K = 1 + integer(c.E);
    for (float& logit : c.logits) {
      if (uniform() < 0.4F) logit = std::vector<float>{kNaN, infinity, -infinity, 3e38F}[integer(4)];
    }
    for (float& b : c.bias) b = uniform() < 0.2F ? kNaN : b;
    const Gating out = c.run();
    for (std::int64_t t = 0; t < c.T; ++t) {
      if (!c.unmasked(t)) continue;
      const auto first = out.expert_indices.begin() + t * c.K;
      const std::set<std::int32_t> distinct(first, first + c.K);
      EXPECT(static_cast<std::int64_t>(distinct.size()) == c.K && *distinct.begin() >= 0 &&
             *distinct.rbegin() < c.E);
    }
  }
}

}  // namespace

void test_topk_gating() {
  for (const std::int64_t T : {0, 1, 7, 255, 256, 700}) {
    for (const std::int64_t E : {1, 3, 8}) {
      for (std::int64_t K = 0; K <= E; K += E == 8 ? 2 : 1) {
        for (int options = 0; options < 8; ++options) expect_forward(Case(T, E, K, options));
      }
    }
  }
  for (int options = 0; options < 8; ++options) {
    expect_backward(Case(0, 4, 2, options));
    expect_backward(Case(5, 4, 2, options));
    expect_backward(Case(3, 1, 1, options));
    expect_backward(Case(4, 5, 5, options));
    expect_forward(Case(300, 8, 2, options | 4).choose_unlikely());
    expect_backward(Case(8, 5, 2, options | 4).choose_unlikely());
  }
  expect_gates_of_nothing();
  expect_ties_go_to_the_lowest_expert();
  expect_distinct_experts_whatever_the_logits();

  const Case c(3000, 8, 2, 3);
  set_threads(1);
  const Gating alone = c.run();
  set_threads(4);
  EXPECT(c.run() == alone);

  EXPECT(starts_with(refusal([&] { Case(2, 3, 4, 0).run(); }), "K: expected at most E = 3, got 4"));
  EXPECT(starts_with(refusal([&] { Case(2, 0, 0, 0).run(); }), "E: expected at least 1, got 0"));
}

}  // namespace clipup::tests
