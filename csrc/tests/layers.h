// Random layers with their routing, run by the engine and by naive loops in double. For the tests of the
// products and the fuzzer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../moe.h"
#include "arrays.h"

namespace clipup::tests {

struct Act {
  double value, slope;
};
Act activation_at(Activation activation, double z);

// How tokens are routed.
enum class Routed {
  kIdentity,  // token t is row t; neither choices nor gates
  kUngated,   // choices, K = 1, every gate is 1
  kGated,
  kTangled,  // gated; choices are in range but no plan: rows without a choice, rows with several
};

struct LayerShape {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kGelu;
  bool gated = false;
  std::int64_t T = 0, D = 0, H = 0, E = 1, K = 1;
  Routed routed = Routed::kGated;
  double capacity_factor = -1.0;
  float masked = 0.0F;       // share of masked tokens
  std::int64_t expert = -1;  // the one that every choice is for; -1: random ones
  bool nulls = false;        // arrays without elements are null
  unsigned biases = 7;       // 1 in, 2 out, 4 gate
  std::int64_t shift = 0;    // of every array, from a 64-byte boundary
  float masked_value = NAN;  // in masked rows of x and dy, which must not be read
};
LayerShape random_shape(std::int64_t most_rows, std::int64_t most_columns);
std::string text_of(const LayerShape& shape);

// E experts and all of their arguments.
class Layer {
 public:
  explicit Layer(const LayerShape& shape);

  Experts experts() const;
  Routing routing() const;
  std::int64_t used() const { return plan_.offsets.back(); }
  const LayerShape& shape() const { return shape_; }
  const void* x() const { return x_.data(); }
  const void* dy() const { return dy_.data(); }

  Array new_output() const { return array(shape_.T * shape_.D); }
  Array new_z() const { return array((shape_.gated ? 2 : 1) * rows() * shape_.H); }

  struct Gradients {
    Array x, gates, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias;
    // By `wanted`, one bit an array in the order above; the others are null.
    ExpertGradients pointers(unsigned wanted = 0xFF);
    Array* arrays[8] = {&x, &gates, &in_weight, &in_bias, &out_weight, &out_bias, &gate_weight, &gate_bias};
  };
  void prepare(Gradients& gradients) const;

  // y of experts whose weights are int8.
  Array int8_forward() const;

  // Both passes in every way: against the loops, packed, z not kept, subsets of the gradients, several
  // threads.
  void check(int ways = 4) const;

  // Both passes by naive loops. z: from the engine, and checked separately.
  Expected naive_z() const;
  Expected naive_forward(const Array& z) const;
  // y with exact weights, and how far quantized ones may move it.
  Expected naive_int8() const;
  struct NaiveGradients {
    Expected x, gates, in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias;
  };
  NaiveGradients naive_backward(const Array& z) const;

 private:
  Array array(std::int64_t size) const;
  // y from the rows of all experts, by naive loops.
  Expected combined(const Expected& out) const;
  std::int64_t rows() const { return shape_.T * shape_.K; }
  std::int64_t token_of(std::int64_t row) const;
  double gate_of(std::int64_t row) const;

  LayerShape shape_;
  Plan plan_;
  std::vector<float> gates_;
  Array x_, dy_, in_weight_, in_bias_, out_weight_, out_bias_, gate_weight_, gate_bias_;
};

// Packed by pack_weight, in memory of exactly that size.
class Packed {
 public:
  Packed(DType dtype, const void* weight, std::int64_t E, std::int64_t O, std::int64_t I,
         PackedType type = PackedType::kExact)
      : bytes_(DType::kFloat32, packed_weight_bytes(dtype, E, O, I, type) / 4) {
    pack_weight(dtype, weight, E, O, I, bytes_.data(), type);
  }
  const void* data() const { return bytes_.data(); }

 private:
  Array bytes_;
};

// What a row of n values may be off by when it is quantized: half a step.
double half_step(const double* row, std::int64_t n);

// E+1 ascending offsets from 0 to `used`, at random places between.
std::vector<std::int32_t> random_offsets(std::int64_t E, std::int64_t used);

struct LinearShape {
  DType dtype = DType::kFloat32;
  std::int64_t R = 0, E = 1, O = 0, I = 0;
  bool bias = true, nulls = false;
  std::int64_t shift = 0;
};
std::string text_of(const LinearShape& shape);

// grouped_linear and its backward pass against loops.
void check_linear(const LinearShape& shape);

// Wrong arguments, one at a time, of a layer with rows: each is refused by name and nothing is written.
void check_layer_refusals(const LayerShape& shape);
void check_linear_refusals(const LinearShape& shape);

}  // namespace clipup::tests
