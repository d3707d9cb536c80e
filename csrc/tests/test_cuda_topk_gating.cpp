// topk_gating as emulated CUDA kernels against the CPU's stage, which is tested against double.
#include <algorithm>
#include <limits>

#include "../moe_cuda.h"
#include "cuda_schedules.h"
#include "routing_cases.h"
#include "tests.h"

namespace clipup::tests {
namespace {

bool same_gating(const Gating& a, const Gating& b) {
  return same_bits(a.gates, b.gates) && same_bits(a.expert_indices, b.expert_indices) &&
         same_bits(a.top_prob, b.top_prob) && same_bits(a.mean_probs, b.mean_probs) &&
         same_bits<float>({a.z_loss}, {b.z_loss}) && same_bits(a.tokens_per_expert, b.tokens_per_expert);
}

Gating run(const GatingCase& c) {
  return under_every_schedule(
      [&] {
        Gating out(c.T, c.E, c.K);
        auto workspace = poisoned_workspace(cuda::topk_gating_workspace_bytes(c.T, c.E, c.K));
        cuda::topk_gating(c.logits.data(), c.mask_or_null(), c.biased ? c.bias.data() : nullptr, c.T, c.E,
                          c.K, c.renormalize, out.gates.data(), out.expert_indices.data(),
                          out.top_prob.data(), out.mean_probs.data(), &out.z_loss,
                          out.tokens_per_expert.data(), workspace.data(), nullptr);
        return out;
      },
      same_gating);
}

// Equal up to rounding, and NaN in the same places.
bool alike(float a, float b, double tolerance) {
  return (std::isnan(a) && std::isnan(b)) || a == b || close(a, b, tolerance);
}

bool alike(const std::vector<float>& a, const std::vector<float>& b, double tolerance = 2e-6) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [=](float x, float y) { return alike(x, y, tolerance); });
}

void expect_forward(const GatingCase& c) {
  const Gating ours = run(c);
  const Gating cpu = c.run();
  EXPECT(ours.expert_indices == cpu.expert_indices);
  EXPECT(ours.tokens_per_expert == cpu.tokens_per_expert);
  EXPECT(alike(ours.gates, cpu.gates));
  EXPECT(alike(ours.top_prob, cpu.top_prob));
  EXPECT(alike(ours.mean_probs, cpu.mean_probs));
  EXPECT(alike(ours.z_loss, cpu.z_loss, 2e-6));
}

// Bits of `given`: the incoming gradients that are not null.
void expect_backward(const GatingCase& c, int given) {
  const std::vector<std::int32_t> expert_indices = c.run().expert_indices;
  Gating d(c.T, c.E, c.K);
  for (auto* const values : {&d.gates, &d.top_prob, &d.mean_probs}) {
    std::generate(values->begin(), values->end(), normal);
  }
  d.z_loss = normal();
  const float* const d_gates = (given & 1) != 0 ? d.gates.data() : nullptr;
  const float* const d_top_prob = (given & 2) != 0 ? d.top_prob.data() : nullptr;
  const float* const d_mean_probs = (given & 4) != 0 ? d.mean_probs.data() : nullptr;
  const float* const d_z_loss = (given & 8) != 0 ? &d.z_loss : nullptr;

  std::vector<float> cpu(c.T * c.E, kNaN);
  topk_gating_backward(c.logits.data(), c.mask_or_null(), expert_indices.data(), c.T, c.E, c.K, c.renormalize,
                       d_gates, d_top_prob, d_mean_probs, d_z_loss, cpu.data());
  const auto ours = under_every_schedule(
      [&] {
        std::vector<float> d_logits(c.T * c.E, kNaN);
        auto workspace = poisoned_workspace(cuda::topk_gating_backward_workspace_bytes());
        cuda::topk_gating_backward(c.logits.data(), c.mask_or_null(), expert_indices.data(), c.T, c.E, c.K,
                                   c.renormalize, d_gates, d_top_prob, d_mean_probs, d_z_loss,
                                   d_logits.data(), workspace.data(), nullptr);
        return d_logits;
      },
      same_bits<float>);
  EXPECT(alike(ours, cpu, 1e-5));
  for (std::int64_t i = 0; i < c.T * c.E; ++i) EXPECT(c.unmasked(i / c.E) || ours[i] == 0.0F);
}

void expect_both(const GatingCase& c) {
  expect_forward(c);
  expect_backward(c, 15);
  expect_backward(c, static_cast<int>(integer(15)));
}

// Logits of which many are equal, NaN or infinite: distinct experts, and everything as on the CPU.
void expect_ties_and_nan(int options) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> few = {kNaN, infinity, -infinity, 3e38F, 0.0F, -0.0F, 1.0F};
  for (const std::int64_t E : {1, 5, 32, 40, 256}) {
    GatingCase c(6, E, 1 + integer(std::min<std::int64_t>(E, 12)), options & 3);
    for (float& logit : c.logits) logit = few[integer(few.size())];
    std::fill_n(c.logits.begin(), E, 0.5F);
    std::fill_n(c.logits.begin() + E, E, kNaN);
    expect_forward(c);
    c.biased = true;  // the probabilities of these rows are exact, or NaN
    for (float& b : c.bias) b = uniform() < 0.3F ? kNaN : static_cast<float>(integer(3));
    for (float& logit : c.logits) logit = std::isfinite(logit) ? 0.0F : logit;
    expect_forward(c);
  }
}

void expect_one_expert_takes_all() {
  GatingCase c(300, 8, 2, 3);
  for (std::int64_t t = 0; t < c.T; ++t) c.logits[t * 8 + 5] = 200.0F;  // the others' probabilities underflow
  expect_both(c);
  std::fill(c.mask.begin(), c.mask.end(), std::uint8_t{0});
  expect_both(c);
}

void expect_refusals() {
  EXPECT(starts_with(refusal([] { run(GatingCase(2, 3, 4, 0)); }), "K: expected at most E = 3, got 4"));
  EXPECT(starts_with(refusal([] { run(GatingCase(2, 257, 1, 0)); }),
                     "E: expected at most 256 on CUDA, got 257"));
  const GatingCase c(2, 3, 1, 0);
  Gating out(2, 3, 1);
  const auto refused = [&](const float* logits, float* gates, void* workspace) {
    return refusal([&] {
      cuda::topk_gating(logits, nullptr, nullptr, 2, 3, 1, true, gates, out.expert_indices.data(),
                        out.top_prob.data(), out.mean_probs.data(), &out.z_loss, out.tokens_per_expert.data(),
                        workspace, nullptr);
    });
  };
  EXPECT(starts_with(refused(nullptr, out.gates.data(), nullptr), "logits: expected an array of 6 elements"));
  EXPECT(starts_with(refused(c.logits.data(), nullptr, nullptr), "gates: expected an array of 2 elements"));
  EXPECT(
      starts_with(refused(c.logits.data(), out.gates.data(), nullptr), "workspace: expected an array of "));
  EXPECT(starts_with(refusal([&] {
                       cuda::topk_gating_backward(c.logits.data(), nullptr, out.expert_indices.data(), 2, 3,
                                                  1, true, nullptr, nullptr, nullptr, nullptr, nullptr,
                                                  nullptr, nullptr);
                     }),
                     "d_logits: expected an array of 6 elements"));
  EXPECT(same_gating(out, Gating(2, 3, 1)));  // nothing was written
}

}  // namespace

void check_cuda_topk_gating(std::int64_t T, std::int64_t E, std::int64_t K, int options) {
  expect_both(GatingCase(T, E, K, options));
}

void test_cuda_topk_gating() {
  for (const std::int64_t E : {1, 3, 8, 33, 256}) {
    for (const std::int64_t K : {0, 1, 2, 8, 31}) {
      if (K > E) continue;
      for (const std::int64_t T : {0, 1, 40}) {
        // A selection bias only with few experts: probabilities that are equal but for their rounding are
        // rare then.
        const int end = E > 8 ? 4 : 8;
        for (int options = 0; options < end; options += quick() ? 3 : 1)
          check_cuda_topk_gating(T, E, K, options);
      }
    }
  }
  for (int options = 0; options < 4; ++options) {
    const GatingCase c(35, 5, 2, options);
    for (int given = 0; given < 16; ++given) expect_backward(c, given);
    expect_ties_and_nan(options);
  }
  for (const std::int64_t E : {8, 40, 256}) check_cuda_topk_gating(quick() ? 2 : 5, E, E, 3);  // K = E
  expect_one_expert_takes_all();
  for (const std::int64_t E : {8, 40, 256}) {
    for (const std::int64_t K : {1, 3, 8}) expect_both(GatingCase(30, E, K, 7).choose_unlikely());
  }
  if (!quick()) expect_forward(GatingCase(17000, 8, 1, 3));  // several tokens a group
  expect_refusals();
}

}  // namespace clipup::tests
