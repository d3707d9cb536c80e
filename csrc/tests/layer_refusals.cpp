// Wrong arguments of expert_mlp_forward and expert_mlp_backward.
#include <algorithm>
#include <functional>
#include <limits>

#include "layers.h"

namespace clipup::tests {

void check_layer_refusals(const LayerShape& shape) {
  LayerShape with_rows = shape;
  with_rows.E = std::max<std::int64_t>(shape.E, 2);
  with_rows.D = std::max<std::int64_t>(shape.D, 1);
  with_rows.H = std::max<std::int64_t>(shape.H, 1);
  with_rows.T = std::max<std::int64_t>(shape.T, 3);
  with_rows.K = std::max<std::int64_t>(shape.K, 1);
  with_rows.capacity_factor = -1.0;
  with_rows.masked = 0.0F;
  with_rows.expert = 1;  // so that every choice or every token has a row
  with_rows.routed = shape.routed == Routed::kUngated ? shape.routed : Routed::kGated;
  const Layer layer(with_rows);
  const std::int64_t R = with_rows.T * with_rows.K;
  const std::int64_t used = layer.used();
  const std::int64_t E = with_rows.E;

  struct Call {
    Experts experts;
    Routing routing;
    const void *dy, *x;
    void* y;
    ExpertGradients gradients;
    std::vector<std::int32_t> offsets, choice_of_row, row_of_choice;  // the routing's own, to be spoilt
  };
  enum Pass { kBoth, kForward, kBackward };
  struct Fault {
    const char* name;  // of the argument that is refused
    std::function<void(Call&)> make;
    Pass pass = kBoth;
  };
  constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kHighest = std::numeric_limits<std::int32_t>::max();
  const auto choice = integer(R);
  const auto row = integer(used);
  const auto outside = [&](std::int64_t lowest, std::int64_t end) {
    const std::int64_t bad[] = {lowest - 1, end, kLowest, kHighest};
    return static_cast<std::int32_t>(bad[integer(4)]);
  };
  const std::vector<Fault> faults = {
      {"dtype", [](Call& c) { c.experts.dtype = DType{3}; }},
      {"dtype", [](Call& c) { c.experts.dtype = DType{-1}; }},
      {"activation", [](Call& c) { c.experts.activation = Activation{kActivations}; }},
      {"activation", [](Call& c) { c.experts.activation = Activation{-1}; }},
      {"E", [](Call& c) { c.experts.E = -1; }},
      {"D", [](Call& c) { c.experts.D = -1; }},
      {"H", [](Call& c) { c.experts.H = -5; }},
      {"T", [](Call& c) { c.routing.T = -1; }},
      {"K", [](Call& c) { c.routing.K = -1; }},
      {"T*K", [](Call& c) { c.routing.T = kHighest, c.routing.K = 2; }},
      {"T*K", [](Call& c) { c.routing.T = c.routing.K = std::int64_t{1} << 32U; }},
      {"in_weight", [](Call& c) { c.experts.in_weight = nullptr; }},
      {"out_weight", [](Call& c) { c.experts.out_weight = nullptr; }},
      {"gate_bias", [](Call& c) { c.experts.gate_weight = nullptr, c.experts.gate_bias = c.x; }},
      {"offsets", [](Call& c) { c.routing.offsets = nullptr; }},
      {"offsets", [&](Call& c) { c.offsets[integer(E + 1)] = outside(0, R + 1); }},
      {"offsets", [&](Call& c) { c.offsets[0] = 1 + static_cast<std::int32_t>(integer(R)); }},
      {"offsets", [&](Call& c) { c.offsets[E - 1] = c.offsets[E] + 1; }},
      {"choice_of_row", [](Call& c) { c.routing.choice_of_row = nullptr; }},
      {"choice_of_row", [](Call& c) { c.routing.row_of_choice = nullptr; }},
      {"choice_of_row", [&](Call& c) { c.choice_of_row[row] = outside(0, R); }},
      {"row_of_choice", [&](Call& c) { c.row_of_choice[choice] = outside(-1, used); }},
      {"x", [](Call& c) { c.x = nullptr; }},
      {"y", [](Call& c) { c.y = nullptr; }, kForward},
      {"dy", [](Call& c) { c.dy = nullptr; }, kBackward},
      {"in_weight", [](Call& c) { c.experts.packed_in = c.experts.in_weight, c.experts.in_weight = nullptr; },
       kBackward},
      {"packed_type", [](Call& c) { c.experts.packed_type = PackedType::kInt8; }},
      {"packed_type", [](Call& c) { c.experts.packed_type = PackedType{-1}; }},
      {"out_weight",
       [](Call& c) { c.experts.packed_out = c.experts.out_weight, c.experts.out_weight = nullptr; },
       kBackward},
      {"gate_weight",
       [](Call& c) {
         c.experts.gate_weight = c.experts.gate_bias = nullptr;
         c.gradients.gate_bias = c.gradients.in_bias;
       },
       kBackward},
      // Rows without choices: only where the routing fits.
      {with_rows.routed == Routed::kUngated ? "choice_of_row" : "gates",
       [](Call& c) { c.routing.choice_of_row = c.routing.row_of_choice = nullptr; },
       with_rows.routed == Routed::kUngated ? kBackward : kBoth},
      {"offsets",
       [&](Call& c) {
         c.routing.choice_of_row = c.routing.row_of_choice = nullptr;
         c.routing.gates = nullptr;
         c.routing.K = 1;
         c.routing.T = R;
         for (std::int64_t e = 0; e <= E; ++e) c.offsets[e] = 0;
       }},
  };
  for (const Fault& fault : faults) {
    for (const bool forward : {true, false}) {
      if (fault.pass != kBoth && forward != (fault.pass == kForward)) continue;
      Array y = layer.new_output();
      Array z = layer.new_z();
      Layer::Gradients gradients;
      layer.prepare(gradients);
      const Routing plan = layer.routing();
      Call call{layer.experts(),
                plan,
                layer.dy(),
                layer.x(),
                y.data(),
                gradients.pointers(),
                std::vector<std::int32_t>(plan.offsets, plan.offsets + E + 1),
                std::vector<std::int32_t>(plan.choice_of_row, plan.choice_of_row + R),
                std::vector<std::int32_t>(plan.row_of_choice, plan.row_of_choice + R)};
      call.routing.offsets = call.offsets.data();
      call.routing.choice_of_row = call.choice_of_row.data();
      call.routing.row_of_choice = call.row_of_choice.data();
      fault.make(call);
      const std::string text =
          text_of(with_rows) + (forward ? " forward" : " backward") + ", fault in " + fault.name;
      describe(text);
      const std::string message = refusal([&] {
        if (forward) {
          expert_mlp_forward(call.experts, call.routing, call.x, call.y, z.data());
        } else {
          expert_mlp_backward(call.experts, call.routing, call.dy, call.x, nullptr, call.gradients);
        }
      });
      describe(text + ": '" + message + "'");
      EXPECT(starts_with(message, std::string(fault.name) + ": expected"));
      EXPECT(y.untouched() && z.untouched());
      for (const Array* array : gradients.arrays) EXPECT(array->untouched());
    }
  }
  if (with_rows.K < 2) return;
  Routing no_gates = layer.routing();
  no_gates.gates = nullptr;
  Array y = layer.new_output();
  EXPECT(starts_with(
      refusal([&] { expert_mlp_forward(layer.experts(), no_gates, layer.x(), y.data(), nullptr); }),
      "K: expected 1 without gates"));
  EXPECT(y.untouched());
}

}  // namespace clipup::tests
