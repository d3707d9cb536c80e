// The engine of products: expert MLPs and grouped linear layers, both passes, packed weights, against naive
// loops in double; bitwise the same however they are run.
#include <cstring>
#include <thread>
#include <vector>

#include "layers.h"
#include "tests.h"

namespace clipup::tests {
namespace {

// Every storage type and activation, gated experts and plain ones, with random everything else.
void random_layers(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int activation = 0; activation < kActivations; ++activation) {
        LayerShape shape = random_shape(150, 70);
        shape.dtype = DType{dtype};
        shape.activation = Activation{activation};
        shape.gated = round % 2 == 1;
        Layer(shape).check();
      }
    }
  }
}

LayerShape layer_of(std::int64_t T, std::int64_t D, std::int64_t H, std::int64_t E, std::int64_t K) {
  LayerShape shape;
  shape.T = T;
  shape.D = D;
  shape.H = H;
  shape.E = E;
  shape.K = K;
  return shape;
}

// Sizes of zero and one, with arrays that are there and such that are null.
void empty_layers() {
  for (int zero = 0; zero < 32; ++zero) {
    for (const bool nulls : {false, true}) {
      for (const bool gated : {false, true}) {
        const auto size = [&](int bit, std::int64_t n) { return (zero >> bit & 1) != 0 ? 0 : n; };
        LayerShape shape = layer_of(size(0, 5), size(1, 3), size(2, 17), size(3, 2), size(4, 2));
        shape.dtype = DType{zero % 3};
        shape.nulls = nulls;
        shape.gated = gated;
        Layer(shape).check();
        shape.K = size(4, 1);
        shape.routed = Routed::kUngated;
        Layer(shape).check();
        shape.routed = Routed::kIdentity;
        if (shape.E > 0 || shape.T * shape.K == 0) Layer(shape).check();
      }
    }
  }
  for (const std::int64_t D : {1, 2}) {
    for (const std::int64_t H : {1, 2}) Layer(layer_of(3, D, H, 1, 1)).check();
  }
}

// Sums that are cut into blocks, experts whose rows are cut into pieces, matrices of several blocks of
// columns.
void large_layers() {
  const LayerShape shapes[] = {
      layer_of(20, 1700, 40, 2, 2),   // long rows of x
      layer_of(20, 40, 1700, 2, 2),   // long hidden rows
      layer_of(60, 290, 270, 3, 1),   // several blocks of panels
      layer_of(4100, 9, 17, 1, 1),    // pieces that meet
      layer_of(1400, 17, 10, 3, 3),   // the same, two or more experts
      layer_of(2016, 4, 8, 1, 1),     // a wave that is just full
      layer_of(2017, 8, 4, 2, 1),     // and one row too many
      layer_of(900, 20, 20, 200, 2),  // more experts than rows in a tile
  };
  for (const LayerShape& large : shapes) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      LayerShape shape = large;
      shape.dtype = DType{dtype};
      shape.activation = dtype == 0 ? Activation::kGelu : Activation::kSilu;
      shape.gated = large.E == 2;
      if (large.T > 2000) shape.expert = large.E - 1;
      Layer(shape).check(3);
      if (quick()) break;
    }
  }
  LayerShape identity = layer_of(4500, 16, 8, 3, 1);
  identity.routed = Routed::kIdentity;
  Layer(identity).check(3);
}

// Plain weights are packed in smaller steps where an expert has few rows (kernels.h, few_rows): numbers of
// rows on both sides of every tier's limit, several steps and several panels with a rest of each.
void few_rows_layers() {
  const std::int64_t all[] = {1, 2, 5, 13, 14, 15, 16, 31, 41, 42, 43, 49, 63, 64, 65, 98, 99};
  for (const std::int64_t rows : all) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      if (quick() && (rows + dtype) % 3 != 0 && rows < 41) continue;
      LayerShape shape = layer_of(rows, 97 + rows % 3, rows % 2 == 0 ? 209 : 67, 3, 1);
      shape.dtype = DType{dtype};
      shape.gated = rows % 2 == 1;
      shape.expert = 1;  // no rows before and after it
      Layer(shape).check(rows % 7 == 0 ? 3 : 1);
      check_linear({DType{dtype}, 2 * rows, 3, 67, 403, rows % 2 == 0, false, rows % 4});
    }
  }
}

// A whole layer in one call writes what the stages write, and nothing past its blocks.
void sparse_layers(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    LayerShape shape = layer_of(integer(40), 1 + integer(40), 1 + integer(40), 1 + integer(9), 1);
    shape.K = 1 + integer(shape.E);
    shape.dtype = DType{round % 3};
    shape.gated = round % 2 == 1;
    const Layer layer(shape);
    describe("sparse layer of " + text_of(shape));
    const std::int64_t T = shape.T, K = shape.K, E = shape.E, R = T * K;
    std::vector<float> weight(E * shape.D), bias(E);
    for (float& value : weight) value = normal();
    for (float& value : bias) value = normal();
    std::vector<std::uint8_t> mask(T);
    for (std::uint8_t& flag : mask) flag = uniform() < 0.8F ? 1 : 0;
    const Router router{weight.data(),
                        round % 4 == 0 ? bias.data() : nullptr,
                        K,
                        round % 5 != 0,
                        round % 3 == 0 ? -1.0 : 0.5 + uniform(),
                        round % 2 == 0,
                        round % 7 == 0 ? 2.0F : 1.0F};
    const std::uint8_t* const tokens = round % 2 == 0 && T > 0 ? mask.data() : nullptr;

    Array y = layer.new_output();
    std::vector<float> floats(T * E + R + T + E + 1);
    std::vector<std::int32_t> ints(R + K * E + E + 1 + 2 * R);
    sparse_mlp_forward(layer.experts(), router, tokens, T, layer.x(), y.data(), floats.data(), ints.data());

    std::vector<float> logits(T * E), gates(R), top_prob(T), mean_probs(E), z_loss(1);
    std::vector<std::int32_t> experts(R), counts(K * E);
    Plan plan(T, K, E);
    router_logits(layer.x(), shape.dtype, tokens, weight.data(), T, shape.D, E, logits.data());
    topk_gating(logits.data(), tokens, router.selection_bias, T, E, K, router.renormalize, gates.data(),
                experts.data(), top_prob.data(), mean_probs.data(), z_loss.data(), counts.data());
    dispatch(experts.data(), tokens, router.by_priority ? top_prob.data() : nullptr, T, K, E,
             router.capacity_factor, plan.offsets.data(), plan.choice_of_row.data(),
             plan.row_of_choice.data());
    std::vector<float> all_floats;
    for (const auto* part : {&logits, &gates, &top_prob, &mean_probs, &z_loss}) {
      all_floats.insert(all_floats.end(), part->begin(), part->end());
    }
    std::vector<std::int32_t> all_ints;
    for (const auto* part : {&experts, &counts, &plan.offsets, &plan.choice_of_row, &plan.row_of_choice}) {
      all_ints.insert(all_ints.end(), part->begin(), part->end());
    }
    EXPECT(std::memcmp(floats.data(), all_floats.data(), floats.size() * sizeof(float)) == 0);  // NaN too
    EXPECT(ints == all_ints);
    for (float& gate : gates) gate *= router.gate_scale;
    Array wanted = layer.new_output();
    expert_mlp_forward(
        layer.experts(),
        {T, K, gates.data(), plan.offsets.data(), plan.choice_of_row.data(), plan.row_of_choice.data()},
        layer.x(), wanted.data(), nullptr);
    EXPECT(y.same_bits(wanted));
    EXPECT(refusal([&] {
             sparse_mlp_forward(layer.experts(), router, tokens, T, layer.x(), y.data(), nullptr,
                                ints.data());
           }) == "floats: expected an array of 1 elements, got a null pointer");
  }
}

void linear_layers(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const LayerShape random = random_shape(150, 70);
    LinearShape shape;
    shape.dtype = DType{round % 3};
    shape.R = random.T;
    shape.E = random.E;
    shape.O = random.D;
    shape.I = random.H;
    if (shape.E == 0) shape.R = 0;
    shape.bias = round % 2 == 0;
    shape.nulls = random.nulls;
    shape.shift = random.shift;
    check_linear(shape);
  }
  for (int zero = 0; zero < 16; ++zero) {
    for (const bool nulls : {false, true}) {
      const auto size = [&](int bit, std::int64_t n) { return (zero >> bit & 1) != 0 ? 0 : n; };
      check_linear({DType{zero % 3}, size(0, 9), size(1, 2), size(2, 5), size(3, 18), true, nulls, 0});
    }
  }
  const std::int64_t large[][4] = {{4300, 1, 12, 20}, {2500, 2, 33, 5}, {30, 2, 20, 1700}, {30, 2, 1700, 20}};
  for (const auto& sizes : large) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      check_linear({DType{dtype}, sizes[0], sizes[1], sizes[2], sizes[3], true, false, dtype});
    }
  }
}

// Gradients larger than 8 MiB are written past the caches, where they are aligned for it and where not.
void streamed_gradients() {
  if (quick()) return;
  check_linear({DType::kFloat32, 3, 1, 2049, 2112, true, false, 0});
  check_linear({DType::kFloat32, 3, 1, 2112, 2049, true, false, 1});
  check_linear({DType::kBFloat16, 2, 2, 2176, 2048, true, false, 0});
  check_linear({DType::kFloat16, 2, 1, 4224, 2064, true, false, 0});
}

// Two callers at once: each gets what it gets alone.
void concurrent_calls() {
  LayerShape shape = layer_of(90, 40, 50, 3, 2);
  shape.gated = true;
  const Layer layer(shape);
  const auto run = [&](Array& y, Array& z, Layer::Gradients& gradients) {
    y = layer.new_output();
    z = layer.new_z();
    layer.prepare(gradients);
    expert_mlp_forward(layer.experts(), layer.routing(), layer.x(), y.data(), z.data());
    expert_mlp_backward(layer.experts(), layer.routing(), layer.dy(), layer.x(), z.data(),
                        gradients.pointers());
  };
  Array y, z;
  Layer::Gradients gradients;
  run(y, z, gradients);
  constexpr int kCallers = 3;
  Array ys[kCallers], zs[kCallers];
  Layer::Gradients all[kCallers];
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 5; ++repeat) run(ys[i], zs[i], all[i]);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int i = 0; i < kCallers; ++i) {
    EXPECT(ys[i].same_bits(y) && zs[i].same_bits(z));
    for (int g = 0; g < 8; ++g) EXPECT(all[i].arrays[g]->same_bits(*gradients.arrays[g]));
  }
}

void refusals() {
  for (const bool gated : {false, true}) {
    for (const std::int64_t K : {1, 2}) {
      LayerShape shape = layer_of(6, 5, 4, 3, K);
      shape.gated = gated;
      shape.routed = K == 1 && !gated ? Routed::kUngated : Routed::kGated;
      check_layer_refusals(shape);
    }
  }
  check_linear_refusals({DType::kBFloat16, 6, 2, 3, 5, true, false, 0});

  // Nothing comes back from the identity: there are no choices to sum by.
  LayerShape shape = layer_of(4, 3, 2, 2, 1);
  shape.routed = Routed::kIdentity;
  const Layer layer(shape);
  Layer::Gradients gradients;
  layer.prepare(gradients);
  const std::string message = refusal([&] {
    expert_mlp_backward(layer.experts(), layer.routing(), layer.dy(), layer.x(), nullptr,
                        gradients.pointers());
  });
  EXPECT(starts_with(message, "choice_of_row: expected"));
}

}  // namespace

void test_products() {
  random_layers(quick() ? 1 : 8);
  empty_layers();
  large_layers();
  few_rows_layers();
  sparse_layers(quick() ? 20 : 120);
  linear_layers(quick() ? 20 : 120);
  streamed_gradients();
  concurrent_calls();
  refusals();
}

}  // namespace clipup::tests
