// A sparse layer in one call.
#include <cstdint>

#include "../checks.h"
#include "../moe.h"
#include "memory.h"

namespace clipup {

void sparse_mlp_forward(const Experts& experts, const Router& router, const std::uint8_t* mask,
                        std::int64_t T, const void* x, void* y, float* floats, std::int32_t* ints) {
  const std::int64_t E = experts.E, K = router.K, R = T * K;
  check_row_count(T, K);
  check_pointer("floats", floats, 1);
  check_pointer("ints", ints, 1);
  const auto next_floats = [&floats](std::int64_t count) { return (floats += count) - count; };
  const auto next_ints = [&ints](std::int64_t count) { return (ints += count) - count; };
  float* const logits = next_floats(T * E);
  float* const gates = next_floats(R);
  float* const top_prob = next_floats(T);
  float* const mean_probs = next_floats(E);
  float* const z_loss = next_floats(1);
  std::int32_t* const expert_indices = next_ints(R);
  std::int32_t* const tokens_per_expert = next_ints(K * E);
  std::int32_t* const offsets = next_ints(E + 1);
  std::int32_t* const choice_of_row = next_ints(R);
  std::int32_t* const row_of_choice = next_ints(R);

  router_logits(x, experts.dtype, mask, router.weight, T, experts.D, E, logits);
  topk_gating(logits, mask, router.selection_bias, T, E, K, router.renormalize, gates, expert_indices,
              top_prob, mean_probs, z_loss, tokens_per_expert);
  dispatch(expert_indices, mask, router.by_priority ? top_prob : nullptr, T, K, E, router.capacity_factor,
           offsets, choice_of_row, row_of_choice);

  const bool scaled = router.gate_scale != 1.0F;
  const Buffer<float> scaled_gates(scaled ? R : 0);
  for (std::int64_t i = 0; scaled && i < R; ++i) scaled_gates.get()[i] = router.gate_scale * gates[i];
  const float* const weights = scaled ? scaled_gates.get() : gates;
  expert_mlp_forward(experts, {T, K, weights, offsets, choice_of_row, row_of_choice}, x, y, nullptr);
}

}  // namespace clipup
