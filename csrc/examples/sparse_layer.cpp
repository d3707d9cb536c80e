// A sparse layer from C++: routes tokens, computes their experts in float32 and with int8 weights, and
// compares. Built and run by `make test-native`; docs/kernels.md says how to link your own program.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "moe.h"
using Floats = std::vector<float>;

static Floats normal(std::int64_t size, double scale) {
  static std::mt19937 random(0);
  std::normal_distribution<float> draw(0, static_cast<float>(scale));
  Floats values(size);
  for (float& value : values) value = draw(random);
  return values;
}

int main() {
  const std::int64_t T = 64, E = 8, K = 2, D = 192, H = 768, R = T * K;  // the axes of moe.h
  const Floats x = normal(T * D, 1), router = normal(E * D, 0.1);
  const Floats in_weight = normal(E * H * D, 1 / std::sqrt(D)),
               out_weight = normal(E * D * H, 1 / std::sqrt(H));

  Floats logits(T * E), gates(T * K), top_prob(T), mean_probs(E), z_loss(1);
  std::vector<std::int32_t> experts_of(T * K), counts(K * E), offsets(E + 1), choice_of_row(R),
      row_of_choice(R);
  clipup::router_logits(x.data(), clipup::DType::kFloat32, nullptr, router.data(), T, D, E, logits.data());
  clipup::topk_gating(logits.data(), nullptr, nullptr, T, E, K, /*renormalize=*/true, gates.data(),
                      experts_of.data(), top_prob.data(), mean_probs.data(), z_loss.data(), counts.data());
  clipup::dispatch(experts_of.data(), nullptr, nullptr, T, K, E, /*capacity_factor=*/-1, offsets.data(),
                   choice_of_row.data(), row_of_choice.data());
  const clipup::Routing routing{
      T, K, gates.data(), offsets.data(), choice_of_row.data(), row_of_choice.data()};

  clipup::Experts experts{};  // plain MLPs without biases
  experts.dtype = clipup::DType::kFloat32, experts.activation = clipup::Activation::kGelu;
  experts.E = E, experts.D = D, experts.H = H;
  experts.in_weight = in_weight.data(), experts.out_weight = out_weight.data();
  Floats exact(T * D), quantized(T * D);
  clipup::expert_mlp_forward(experts, routing, x.data(), exact.data(), /*z=*/nullptr);

  const auto int8 = clipup::PackedType::kInt8;
  const auto pack = [&](const Floats& weight, std::int64_t O, std::int64_t I) {  // once, for all later calls
    void* packed = clipup::acquire_memory(clipup::packed_weight_bytes(experts.dtype, E, O, I, int8), true);
    clipup::pack_weight(experts.dtype, weight.data(), E, O, I, packed, int8);
    return packed;
  };
  void *in_packed = pack(in_weight, H, D), *out_packed = pack(out_weight, D, H);
  experts.packed_in = in_packed, experts.packed_out = out_packed, experts.packed_type = int8;
  clipup::expert_mlp_forward(experts, routing, x.data(), quantized.data(), nullptr);
  clipup::return_memory(in_packed), clipup::return_memory(out_packed);

  double error = 0, norm = 0;
  for (std::int64_t i = 0; i < T * D; ++i)
    error += std::pow(quantized[i] - exact[i], 2), norm += std::pow(exact[i], 2);
  const double relative = std::sqrt(error / norm);
  std::printf("%s: relative error of int8 weights %.4f\n", clipup::instruction_tier(), relative);
  return relative > 0 && relative < 0.03 ? 0 : 1;
}
