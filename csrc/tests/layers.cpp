#include "layers.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace clipup::tests {
namespace {

// Errors of the activations: of the value, relative to |z|, and of the slope. test_activations.cpp holds
// tighter ones.
constexpr double kValue = 3e-7;
constexpr double kSlope = 5e-7;

// Operands that the engine multiplies as bfloat16 are rounded to it first.
double operand_error(DType dtype) {
  const bool pairs = dtype == DType::kBFloat16 && packed_layout(dtype).per_word == 2;
  return pairs ? 0x1p-8 : 0.0;
}

}  // namespace

Act activation_at(Activation activation, double z) {
  const double kRootHalf = std::sqrt(0.5);
  const double kRootTwoByPi = std::sqrt(2.0 / std::acos(-1.0));
  const auto sigmoid_unit = [z](double s, double slope_of_s) {
    const double sigmoid = 1.0 / (1.0 + std::exp(-s));
    const double complement = 1.0 / (1.0 + std::exp(s));
    const double product = sigmoid * complement;
    return Act{z * sigmoid, product == 0.0 ? sigmoid : sigmoid + z * product * slope_of_s};
  };
  switch (activation) {
    case Activation::kGelu: {
      const double phi = 0.5 * std::erfc(-z * kRootHalf);
      return {z * phi, phi + z * 0.5 * kRootTwoByPi * std::exp(-0.5 * z * z)};
    }
    case Activation::kGeluTanh:
      return sigmoid_unit(2.0 * kRootTwoByPi * (z + 0.044715 * z * z * z),
                          2.0 * kRootTwoByPi * (1.0 + 3.0 * 0.044715 * z * z));
    case Activation::kQuickGelu:
      return sigmoid_unit(1.702 * z, 1.702);
    case Activation::kRelu:
      return {std::max(z, 0.0), z > 0.0 ? 1.0 : 0.0};
    case Activation::kSilu:
      return sigmoid_unit(z, 1.0);
  }
  return {0.0, 0.0};
}

// ---------------------------------------------------------------- shapes

LayerShape random_shape(std::int64_t most_rows, std::int64_t most_columns) {
  // Ends of vectors, panels and tiles, and anything between.
  const auto size = [](std::int64_t most) {
    constexpr std::int64_t kEdges[] = {0, 1, 2, 4, 8, 14, 16, 32, 48, 64, 96, 128, 256};
    std::int64_t n = kEdges[integer(13)] + integer(3) - 1;
    if (uniform() < 0.4F) n = integer(most + 1);
    return std::clamp<std::int64_t>(n, 0, most);
  };
  LayerShape shape;
  shape.dtype = DType{static_cast<int>(integer(3))};
  shape.activation = Activation{static_cast<int>(integer(kActivations))};
  shape.gated = uniform() < 0.4F;
  shape.E = uniform() < 0.04F ? 0 : 1 + integer(uniform() < 0.2F ? 20 : 5);
  const float routed = uniform();
  shape.routed = routed < 0.1F   ? Routed::kIdentity
                 : routed < 0.2F ? Routed::kUngated
                 : routed < 0.3F ? Routed::kTangled
                                 : Routed::kGated;
  shape.K = shape.routed == Routed::kIdentity || shape.routed == Routed::kUngated ? 1
            : uniform() < 0.04F                                                   ? 0
                                                                                  : 1 + integer(3);
  shape.T = size(most_rows) / std::max<std::int64_t>(shape.K, 1);
  shape.D = size(most_columns);
  shape.H = size(most_columns);
  if (shape.E == 0 && shape.routed == Routed::kIdentity) shape.T = 0;
  if (uniform() < 0.5F) shape.capacity_factor = 0.1 + 1.4 * uniform();
  if (uniform() < 0.5F) shape.masked = uniform();
  if (uniform() < 0.1F && shape.E > 0) shape.expert = integer(shape.E);
  shape.nulls = uniform() < 0.5F;
  shape.biases = static_cast<unsigned>(integer(8));
  shape.shift = integer(3);
  if (uniform() < 0.1F) shape.masked_value = std::numeric_limits<float>::infinity();
  return shape;
}

std::string text_of(const LayerShape& s) {
  constexpr const char* kRouted[] = {"identity", "ungated", "gated", "tangled"};
  return std::string(kDtypeNames[static_cast<int>(s.dtype)]) + " " +
         kActivationNames[static_cast<int>(s.activation)] + (s.gated ? " gated experts" : "") +
         " T=" + std::to_string(s.T) + " D=" + std::to_string(s.D) + " H=" + std::to_string(s.H) +
         " E=" + std::to_string(s.E) + " K=" + std::to_string(s.K) + " routing " +
         kRouted[static_cast<int>(s.routed)] + " f=" + std::to_string(s.capacity_factor) +
         " masked=" + std::to_string(s.masked) + " expert=" + std::to_string(s.expert) +
         " biases=" + std::to_string(s.biases) + " nulls=" + std::to_string(s.nulls) +
         " shift=" + std::to_string(s.shift);
}

std::vector<std::int32_t> random_offsets(std::int64_t E, std::int64_t used) {
  std::vector<std::int32_t> offsets(E + 1, 0);
  for (std::int64_t e = 1; e < E; ++e) offsets[e] = static_cast<std::int32_t>(integer(used + 1));
  if (E > 0) offsets[E] = static_cast<std::int32_t>(used);
  std::sort(offsets.begin(), offsets.end());
  return offsets;
}

// ---------------------------------------------------------------- a layer

Layer::Layer(const LayerShape& shape)
    : shape_(shape), plan_(shape.T, shape.K, shape.E), gates_(shape.T * shape.K, shape.masked_value) {
  describe(text_of(shape));
  const std::int64_t T = shape.T, K = shape.K, E = shape.E, D = shape.D, H = shape.H;
  const std::int64_t R = T * K;
  const bool identity = shape.routed == Routed::kIdentity;

  if (identity) {
    plan_.offsets = random_offsets(E, R);
  } else if (E == 0) {
    plan_.offsets[0] = 0;
    std::fill(plan_.row_of_choice.begin(), plan_.row_of_choice.end(), -1);
  } else {
    std::vector<std::int32_t> experts(R, static_cast<std::int32_t>(shape.expert));
    if (shape.expert < 0 && K <= E) experts = random_experts(T, K, E, 0.1F);
    if (shape.expert < 0 && K > E) {
      for (std::int32_t& e : experts) e = static_cast<std::int32_t>(integer(E + 1)) - 1;
    }
    std::vector<std::uint8_t> mask(T, 1);
    for (std::uint8_t& unmasked : mask) unmasked = uniform() < shape.masked ? 0 : 1;
    dispatch(experts.data(), mask.data(), nullptr, T, K, E, shape.capacity_factor, plan_.offsets.data(),
             plan_.choice_of_row.data(), plan_.row_of_choice.data());
  }
  if (shape.routed == Routed::kTangled) {
    for (std::int64_t r = 0; r < used(); ++r) {
      plan_.choice_of_row[r] = static_cast<std::int32_t>(integer(R));
    }
    for (std::int32_t& row : plan_.row_of_choice) row = static_cast<std::int32_t>(integer(used() + 1)) - 1;
  }
  // The rest is never read.
  constexpr std::int32_t kNoChoice = std::numeric_limits<std::int32_t>::max();
  std::fill(plan_.choice_of_row.begin() + (identity ? 0 : used()), plan_.choice_of_row.end(), kNoChoice);

  const float deviation = uniform() < 0.3F ? 6.0F : 1.0F;
  x_ = array(T * D);
  dy_ = array(T * D);
  x_.fill_normal(deviation);
  dy_.fill_normal(1.0F);
  std::vector<bool> seen(T, false);
  for (std::int64_t r = 0; r < used(); ++r) {
    seen[token_of(r)] = true;
    if (!identity) gates_[plan_.choice_of_row[r]] = uniform() - 0.2F;
  }
  for (std::int64_t choice = 0; !identity && choice < R; ++choice) {
    if (plan_.row_of_choice[choice] >= 0) gates_[choice] = uniform() - 0.2F;
  }
  for (std::int64_t i = 0; i < T * D; ++i) {
    if (seen[i / D]) continue;
    x_.set(i, shape.masked_value);
    dy_.set(i, shape.masked_value);
  }

  const auto weight = [&](std::int64_t fan_in) {
    Array matrix = array(E * D * H);
    matrix.fill_normal(1.0F / std::sqrt(static_cast<float>(std::max<std::int64_t>(fan_in, 1))));
    return matrix;
  };
  const auto bias = [&](unsigned bit, std::int64_t n) {
    if ((shape.biases & bit) == 0) return Array();
    Array vector = array(E * n);
    vector.fill_normal(0.5F);
    return vector;
  };
  in_weight_ = weight(D);
  out_weight_ = weight(H);
  in_bias_ = bias(1, H);
  out_bias_ = bias(2, D);
  if (!shape.gated) return;
  gate_weight_ = weight(D);
  if (gate_weight_.data() != nullptr) gate_bias_ = bias(4, H);
  if (gate_weight_.data() == nullptr)
    shape_.gated = false;  // without elements and null: the engine cannot tell
}

Array Layer::array(std::int64_t size) const {
  return size == 0 && shape_.nulls ? Array() : Array(shape_.dtype, size, shape_.shift);
}

Experts Layer::experts() const {
  Experts experts{};
  experts.dtype = shape_.dtype;
  experts.activation = shape_.activation;
  experts.E = shape_.E;
  experts.D = shape_.D;
  experts.H = shape_.H;
  experts.in_weight = in_weight_.data();
  experts.in_bias = in_bias_.data();
  experts.out_weight = out_weight_.data();
  experts.out_bias = out_bias_.data();
  experts.gate_weight = gate_weight_.data();
  experts.gate_bias = gate_bias_.data();
  return experts;
}

Routing Layer::routing() const {
  Routing routing{shape_.T, shape_.K, nullptr, plan_.offsets.data(), nullptr, nullptr};
  if (shape_.routed == Routed::kIdentity) return routing;
  routing.choice_of_row = plan_.choice_of_row.data();
  routing.row_of_choice = plan_.row_of_choice.data();
  if (shape_.routed != Routed::kUngated) routing.gates = gates_.data();
  return routing;
}

std::int64_t Layer::token_of(std::int64_t row) const {
  return shape_.routed == Routed::kIdentity ? row : plan_.choice_of_row[row] / shape_.K;
}

double Layer::gate_of(std::int64_t row) const {
  const bool gated = shape_.routed == Routed::kGated || shape_.routed == Routed::kTangled;
  return gated ? gates_[plan_.choice_of_row[row]] : 1.0;
}

ExpertGradients Layer::Gradients::pointers(unsigned wanted) {
  const auto at = [&](unsigned i) { return (wanted >> i & 1U) != 0 ? arrays[i]->data() : nullptr; };
  return {at(0), static_cast<float*>(at(1)), at(2), at(3), at(4), at(5), at(6), at(7)};
}

void Layer::prepare(Gradients& gradients) const {
  const std::int64_t E = shape_.E, D = shape_.D, H = shape_.H;
  gradients.x = array(shape_.T * D);
  gradients.gates = Array(DType::kFloat32, rows());
  gradients.in_weight = array(E * H * D);
  gradients.in_bias = array(E * H);
  gradients.out_weight = array(E * D * H);
  gradients.out_bias = array(E * D);
  if (!shape_.gated) return;
  gradients.gate_weight = array(E * H * D);
  gradients.gate_bias = array(E * H);
}

Array Layer::int8_forward() const {
  const auto packed = [this](const Array& weight, std::int64_t O, std::int64_t I) {
    return Packed(shape_.dtype, weight.data(), shape_.E, O, I, PackedType::kInt8);
  };
  const Packed in = packed(in_weight_, shape_.H, shape_.D), out = packed(out_weight_, shape_.D, shape_.H),
               gate = packed(shape_.gated ? gate_weight_ : in_weight_, shape_.H, shape_.D);
  Experts int8 = experts();
  int8.in_weight = int8.out_weight = int8.gate_weight = nullptr;
  int8.packed_type = PackedType::kInt8;
  int8.packed_in = in.data();
  int8.packed_out = out.data();
  if (shape_.gated) int8.packed_gate = gate.data();
  Array y = new_output();
  expert_mlp_forward(int8, routing(), x(), y.data(), nullptr);
  return y;
}

// ---------------------------------------------------------------- by naive loops

Expected Layer::naive_z() const {
  const std::int64_t D = shape_.D, H = shape_.H;
  Expected z((shape_.gated ? 2 : 1) * rows() * H);
  const std::vector<double> x = x_.values();
  for (int part = 0; part < (shape_.gated ? 2 : 1); ++part) {
    const std::vector<double> weight = (part == 0 ? in_weight_ : gate_weight_).values();
    const std::vector<double> bias = (part == 0 ? in_bias_ : gate_bias_).values();
    for (std::int64_t e = 0; e < shape_.E; ++e) {
      for (std::int64_t r = plan_.offsets[e]; r < plan_.offsets[e + 1]; ++r) {
        const double* const token = x.data() + token_of(r) * D;
        for (std::int64_t h = 0; h < H; ++h) {
          Sum sum;
          const double* const row = weight.data() + (e * H + h) * D;
          for (std::int64_t d = 0; d < D; ++d) sum.add(row[d], token[d]);
          if (!bias.empty()) sum.add(bias[e * H + h], 1.0);
          sum.into(z, (part * rows() + r) * H + h);
        }
      }
    }
  }
  return z;
}

Expected Layer::combined(const Expected& out) const {
  const std::int64_t T = shape_.T, K = shape_.K, D = shape_.D;
  if (shape_.routed == Routed::kIdentity && K == 1) return out;
  Expected y(T * D);
  for (std::int64_t i = 0; i < T * D; ++i) {
    Sum sum;
    for (std::int64_t choice = i / D * K; choice < (i / D + 1) * K; ++choice) {
      const std::int64_t row = plan_.row_of_choice[choice];
      if (row < 0) continue;
      const double gate = shape_.routed == Routed::kUngated ? 1.0 : gates_[choice];
      sum.add(gate, out.value[row * D + i % D], out.error[row * D + i % D]);
    }
    sum.into(y, i);
  }
  return y;
}

Expected Layer::naive_forward(const Array& z_array) const {
  const std::int64_t D = shape_.D, H = shape_.H;
  const double operand = operand_error(shape_.dtype);
  const std::vector<double> z = z_array.values();
  const std::vector<double> weight = out_weight_.values();
  const std::vector<double> bias = out_bias_.values();
  Expected out(used() * D);
  std::vector<double> a(H), a_error(H);
  for (std::int64_t e = 0; e < shape_.E; ++e) {
    for (std::int64_t r = plan_.offsets[e]; r < plan_.offsets[e + 1]; ++r) {
      for (std::int64_t h = 0; h < H; ++h) {
        const double linear = z[r * H + h];
        const double z_act = shape_.gated ? z[(rows() + r) * H + h] : linear;
        const double factor = shape_.gated ? linear : 1.0;
        a[h] = activation_at(shape_.activation, z_act).value * factor;
        a_error[h] = kValue * std::abs(z_act * factor) + operand * std::abs(a[h]);
      }
      for (std::int64_t d = 0; d < D; ++d) {
        Sum sum;
        const double* const row = weight.data() + (e * D + d) * H;
        for (std::int64_t h = 0; h < H; ++h) sum.add(row[h], a[h], a_error[h]);
        if (!bias.empty()) sum.add(bias[e * D + d], 1.0);
        sum.into(out, r * D + d);
      }
    }
  }
  return combined(out);
}

double half_step(const double* row, std::int64_t n) {
  double most = 0.0;
  for (std::int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(row[i]));
  return 0.5001 * most / 127.0 + 1e-30;
}

Expected Layer::naive_int8() const {
  const std::int64_t D = shape_.D, H = shape_.H;
  const std::vector<double> x = x_.values();
  const std::vector<double> in = in_weight_.values(), in_bias = in_bias_.values();
  const std::vector<double> gate = gate_weight_.values(), gate_bias = gate_bias_.values();
  const std::vector<double> out = out_weight_.values(), out_bias = out_bias_.values();
  constexpr double kSteepest = 1.2;  // of any activation's slope
  constexpr double kStorage =
      0x1p-8;  // pre-activations and hidden activations are rounded to the storage type
  const auto project = [&](const std::vector<double>& weight, const std::vector<double>& bias,
                           std::int64_t row, const double* values, const double* errors, std::int64_t n) {
    const double* const w = weight.data() + row * n;
    const double step = half_step(w, n);
    Sum sum;
    for (std::int64_t i = 0; i < n; ++i) sum.add_uncertain(w[i], step, values[i], errors[i]);
    if (!bias.empty()) sum.add(bias[row], 1.0);
    return sum;
  };
  Expected rows(used() * D);
  std::vector<double> a(H), a_error(H);
  for (std::int64_t e = 0; e < shape_.E; ++e) {
    for (std::int64_t r = plan_.offsets[e]; r < plan_.offsets[e + 1]; ++r) {
      const double* const token = x.data() + token_of(r) * D;
      const std::vector<double> x_error(D, half_step(token, D));
      double least = INFINITY, most = -INFINITY;
      for (std::int64_t h = 0; h < H; ++h) {
        const Sum z = project(in, in_bias, e * H + h, token, x_error.data(), D);
        const double z_error = z.error() + kStorage * std::abs(z.value);
        const Sum z_act = shape_.gated ? project(gate, gate_bias, e * H + h, token, x_error.data(), D) : z;
        const double act = activation_at(shape_.activation, z_act.value).value;
        const double act_error = kSteepest * (z_act.error() + kStorage * std::abs(z_act.value));
        a[h] = shape_.gated ? act * z.value : act;
        a_error[h] =
            shape_.gated ? std::abs(act) * z_error + act_error * (std::abs(z.value) + z_error) : act_error;
        a_error[h] += kStorage * (std::abs(a[h]) + a_error[h]);
        least = std::min(least, a[h] - a_error[h]);
        most = std::max(most, a[h] + a_error[h]);
      }
      const double range = (most - least) / 2;  // around the middle of a row
      for (double& error : a_error) error += half_step(&range, 1);
      for (std::int64_t d = 0; d < D; ++d) {
        project(out, out_bias, e * D + d, a.data(), a_error.data(), H).into(rows, r * D + d);
      }
    }
  }
  return combined(rows);
}

Layer::NaiveGradients Layer::naive_backward(const Array& z_array) const {
  const std::int64_t T = shape_.T, K = shape_.K, D = shape_.D, H = shape_.H, E = shape_.E;
  const double operand = operand_error(shape_.dtype);
  const double slope_error = shape_.activation == Activation::kRelu ? 0.0 : kSlope;
  const std::vector<double> z = z_array.values();
  const std::vector<double> x = x_.values();
  const std::vector<double> dy = dy_.values();
  const std::vector<double> in_weight = in_weight_.values();
  const std::vector<double> gate_weight = gate_weight_.values();
  const std::vector<double> out_weight = out_weight_.values();
  const std::vector<double> out_bias = out_bias_.values();

  // By row: a, dz of both parts with what they may be off.
  Expected a(used() * H), dz(used() * H), dz_gate(used() * H), dx(used() * D), d_gate(used());
  NaiveGradients all;
  all.in_weight = all.out_weight = Expected(E * D * H);
  all.in_bias = Expected(E * H);
  all.out_bias = Expected(E * D);
  if (shape_.gated) all.gate_weight = all.in_weight;
  if (shape_.gated) all.gate_bias = all.in_bias;

  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t begin = plan_.offsets[e];
    const std::int64_t end = plan_.offsets[e + 1];
    for (std::int64_t r = begin; r < end; ++r) {
      const double* const d_out = dy.data() + token_of(r) * D;
      const double gate = gate_of(r);
      std::vector<Sum> da(H);
      for (std::int64_t d = 0; d < D; ++d) {
        const double* const row = out_weight.data() + (e * D + d) * H;
        for (std::int64_t h = 0; h < H; ++h) da[h].add(d_out[d], row[h]);
      }
      Sum product;
      for (std::int64_t h = 0; h < H; ++h) {
        const std::int64_t i = r * H + h;
        const double linear = z[i];
        const double z_act = shape_.gated ? z[(rows() + r) * H + h] : linear;
        const double factor = shape_.gated ? linear : 1.0;
        const Act act = activation_at(shape_.activation, z_act);
        const double value = act.value * factor;
        const double value_error = kValue * std::abs(z_act * factor);
        product.add_uncertain(value, value_error, da[h].value, da[h].error());
        a.value[i] = value;
        a.error[i] = value_error + operand * std::abs(value);

        const auto put = [&](Expected& to, double slope, double error) {
          to.value[i] = gate * da[h].value * slope;
          to.error[i] =
              std::abs(gate) * (da[h].error() * (std::abs(slope) + error) + std::abs(da[h].value) * error) +
              (kSum + operand) * std::abs(to.value[i]);
        };
        if (shape_.gated) {
          put(dz, act.value, kValue * std::abs(z_act));
          put(dz_gate, linear * act.slope, std::abs(linear) * slope_error);
        } else {
          put(dz, act.slope, slope_error);
        }
      }
      for (std::int64_t d = 0; !out_bias.empty() && d < D; ++d) product.add(d_out[d], out_bias[e * D + d]);
      product.into(d_gate, r);

      std::vector<Sum> dx_row(D);
      for (std::int64_t h = 0; h < H; ++h) {
        const std::int64_t i = r * H + h;
        for (std::int64_t d = 0; d < D; ++d) {
          dx_row[d].add(in_weight[(e * H + h) * D + d], dz.value[i], dz.error[i]);
          if (shape_.gated)
            dx_row[d].add(gate_weight[(e * H + h) * D + d], dz_gate.value[i], dz_gate.error[i]);
        }
      }
      for (std::int64_t d = 0; d < D; ++d) dx_row[d].into(dx, r * D + d);
    }

    // weight[m, n] = sum over the rows of left[r, m] right[r, n], bias[m] = sum of left.
    const auto sum_rows = [&](std::int64_t M, std::int64_t N, const auto& left, const auto& left_error,
                              const auto& right, const auto& right_error, Expected& weight, Expected& bias) {
      std::vector<Sum> sums(M * (N + 1));
      for (std::int64_t r = begin; r < end; ++r) {
        for (std::int64_t m = 0; m < M; ++m) {
          const double l = left(r, m);
          const double l_error = left_error(r, m);
          Sum* const row = sums.data() + m * (N + 1);
          for (std::int64_t n = 0; n < N; ++n)
            row[n].add_uncertain(l, l_error, right(r, n), right_error(r, n));
          row[N].add(1.0, l, l_error);
        }
      }
      for (std::int64_t m = 0; m < M; ++m) {
        for (std::int64_t n = 0; n < N; ++n) sums[m * (N + 1) + n].into(weight, (e * M + m) * N + n);
        sums[m * (N + 1) + N].into(bias, e * M + m);
      }
    };
    const auto none = [](std::int64_t, std::int64_t) { return 0.0; };
    const auto of_x = [&](std::int64_t r, std::int64_t d) { return x[token_of(r) * D + d]; };
    const auto of_dy = [&](std::int64_t r, std::int64_t d) { return gate_of(r) * dy[token_of(r) * D + d]; };
    const auto of_dy_error = [&](std::int64_t r, std::int64_t d) {
      return (operand + kSum) * std::abs(of_dy(r, d));
    };
    const auto of = [H](const std::vector<double>& array) {
      return [&array, H](std::int64_t r, std::int64_t h) { return array[r * H + h]; };
    };
    sum_rows(H, D, of(dz.value), of(dz.error), of_x, none, all.in_weight, all.in_bias);
    sum_rows(D, H, of_dy, of_dy_error, of(a.value), of(a.error), all.out_weight, all.out_bias);
    if (shape_.gated) {
      sum_rows(H, D, of(dz_gate.value), of(dz_gate.error), of_x, none, all.gate_weight, all.gate_bias);
    }
  }

  all.x = Expected(T * D);
  all.gates = Expected(rows());
  for (std::int64_t choice = 0; choice < rows(); ++choice) {
    const std::int64_t row = plan_.row_of_choice[choice];
    if (row < 0) continue;
    all.gates.value[choice] = d_gate.value[row];
    all.gates.error[choice] = d_gate.error[row];
  }
  for (std::int64_t i = 0; i < T * D; ++i) {
    Sum sum;
    for (std::int64_t choice = i / D * K; choice < (i / D + 1) * K; ++choice) {
      const std::int64_t row = plan_.row_of_choice[choice];
      if (row >= 0) sum.add(1.0, dx.value[row * D + i % D], dx.error[row * D + i % D]);
    }
    sum.into(all.x, i);
  }
  return all;
}

// ---------------------------------------------------------------- a layer, checked

void Layer::check(int ways) const {
  const Experts plain = experts();
  const Routing plan = routing();
  set_threads(1);
  Array y = new_output();
  Array z = new_z();
  expert_mlp_forward(plain, plan, x(), y.data(), z.data());
  EXPECT_CLOSE(z, naive_z());
  EXPECT_CLOSE(y, naive_forward(z));

  const Packed in(shape_.dtype, plain.in_weight, shape_.E, shape_.H, shape_.D);
  const Packed out(shape_.dtype, plain.out_weight, shape_.E, shape_.D, shape_.H);
  const Packed gate(shape_.dtype, shape_.gated ? plain.gate_weight : plain.in_weight, shape_.E, shape_.H,
                    shape_.D);
  Experts packed = plain;
  packed.packed_in = in.data();
  packed.packed_out = out.data();
  if (shape_.gated) packed.packed_gate = gate.data();
  Experts only_packed = packed;
  only_packed.in_weight = only_packed.out_weight = only_packed.gate_weight = nullptr;

  const auto same_forward = [&](const Experts& other, bool keep) {
    Array y_again = new_output();
    Array z_again = new_z();
    expert_mlp_forward(other, plan, x(), y_again.data(), keep ? z_again.data() : nullptr);
    EXPECT(y_again.same_bits(y));
    EXPECT(keep ? z_again.same_bits(z) : z_again.untouched());
  };
  if (ways > 0) {
    const Array quantized = int8_forward();
    EXPECT_CLOSE(quantized, naive_int8());
    set_threads(3);
    EXPECT(int8_forward().same_bits(quantized));
    set_threads(1);
    same_forward(plain, false);
    same_forward(packed, true);
    same_forward(only_packed, uniform() < 0.5F);
  }

  Array kept = new_z();  // NaN past the last row: never read
  for (std::int64_t i = 0; i < z.size(); ++i) {
    if (i / std::max<std::int64_t>(shape_.H, 1) % rows() < used()) kept.set(i, static_cast<float>(z.at(i)));
  }
  Gradients first;
  const bool backward = shape_.routed != Routed::kIdentity || rows() == 0;
  if (backward) {
    prepare(first);
    expert_mlp_backward(plain, plan, dy(), x(), kept.data(), first.pointers());
    const NaiveGradients naive = naive_backward(z);
    EXPECT_CLOSE(first.x, naive.x);
    EXPECT_CLOSE(first.gates, naive.gates);
    EXPECT_CLOSE(first.in_weight, naive.in_weight);
    EXPECT_CLOSE(first.in_bias, naive.in_bias);
    EXPECT_CLOSE(first.out_weight, naive.out_weight);
    EXPECT_CLOSE(first.out_bias, naive.out_bias);
    if (shape_.gated) {
      EXPECT_CLOSE(first.gate_weight, naive.gate_weight);
      EXPECT_CLOSE(first.gate_bias, naive.gate_bias);
    }
  }
  const auto same_backward = [&](const Experts& other, const void* kept, unsigned wanted) {
    Gradients again;
    prepare(again);
    expert_mlp_backward(other, plan, dy(), x(), kept, again.pointers(wanted));
    for (unsigned i = 0; i < 8; ++i) {
      if ((wanted >> i & 1U) != 0) EXPECT(again.arrays[i]->same_bits(*first.arrays[i]));
      if ((wanted >> i & 1U) == 0) EXPECT(again.arrays[i]->untouched());
    }
  };
  if (backward && ways > 1) {
    same_backward(plain, nullptr, 0xFF);
    same_backward(packed, nullptr, static_cast<unsigned>(integer(256)));
    same_backward(packed, kept.data(), static_cast<unsigned>(integer(256)));
    same_backward(plain, kept.data(), 1U << static_cast<unsigned>(integer(8)));
  }
  for (int way = 2; way < ways; ++way) {
    set_threads(way == 2 ? 3 : 2);
    same_forward(way == 2 ? plain : packed, true);
    if (backward) same_backward(plain, way == 2 ? kept.data() : nullptr, 0xFF);
  }
  set_threads(1);
}

}  // namespace clipup::tests
