// grouped_linear and pack_weight: calls that are right against loops, calls that are wrong.
#include <algorithm>
#include <functional>

#include "layers.h"

namespace clipup::tests {

std::string text_of(const LinearShape& s) {
  return std::string("linear ") + kDtypeNames[static_cast<int>(s.dtype)] + " R=" + std::to_string(s.R) +
         " E=" + std::to_string(s.E) + " O=" + std::to_string(s.O) + " I=" + std::to_string(s.I) +
         " bias=" + std::to_string(s.bias) + " nulls=" + std::to_string(s.nulls) +
         " shift=" + std::to_string(s.shift);
}

namespace {

// A linear layer's arguments.
struct Linear {
  LinearShape shape;
  std::vector<std::int32_t> offsets;
  Array rows, d_out, weight, bias;

  Array array(std::int64_t size) const {
    return size == 0 && shape.nulls ? Array() : Array(shape.dtype, size, shape.shift);
  }

  explicit Linear(const LinearShape& shape)
      : shape(shape), offsets(random_offsets(shape.E, uniform() < 0.3F ? shape.R : integer(shape.R + 1))) {
    describe(text_of(shape));
    const std::int64_t used = offsets.back();
    rows = array(shape.R * shape.I);
    d_out = array(shape.R * shape.O);
    for (std::int64_t i = 0; i < used * shape.I; ++i) rows.set(i, normal());
    for (std::int64_t i = 0; i < used * shape.O; ++i) d_out.set(i, normal());
    weight = array(shape.E * shape.O * shape.I);
    weight.fill_normal(1.0F / std::sqrt(static_cast<float>(shape.I + 1)));
    if (shape.bias) bias = array(shape.E * shape.O);
    bias.fill_normal(0.5F);
  }

  Array forward() const {
    Array out = array(shape.R * shape.O);
    grouped_linear(shape.dtype, rows.data(), weight.data(), bias.data(), offsets.data(), shape.R, shape.E,
                   shape.O, shape.I, out.data());
    return out;
  }

  struct Gradients {
    Array rows, weight, bias;
  };
  Gradients backward(unsigned wanted) const {
    Gradients g{array(shape.R * shape.I), array(shape.E * shape.O * shape.I), array(shape.E * shape.O)};
    grouped_linear_backward(shape.dtype, d_out.data(), rows.data(), weight.data(), offsets.data(), shape.R,
                            shape.E, shape.O, shape.I, (wanted & 1U) != 0 ? g.rows.data() : nullptr,
                            (wanted & 2U) != 0 ? g.weight.data() : nullptr,
                            (wanted & 4U) != 0 ? g.bias.data() : nullptr);
    return g;
  }

  void naive(Expected& out, Expected& d_rows, Expected& d_weight, Expected& d_bias) const {
    const std::int64_t E = shape.E, O = shape.O, I = shape.I;
    const std::vector<double> x = rows.values(), w = weight.values(), b = bias.values(), d = d_out.values();
    out = Expected(shape.R * O);
    d_rows = Expected(shape.R * I);
    d_weight = Expected(E * O * I);
    d_bias = Expected(E * O);
    for (std::int64_t e = 0; e < E; ++e) {
      std::vector<Sum> weight_sums(O * I), bias_sums(O);
      for (std::int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
        std::vector<Sum> row_sums(I);
        for (std::int64_t o = 0; o < O; ++o) {
          Sum sum;
          for (std::int64_t i = 0; i < I; ++i) {
            sum.add(w[(e * O + o) * I + i], x[r * I + i]);
            row_sums[i].add(w[(e * O + o) * I + i], d[r * O + o]);
            weight_sums[o * I + i].add(d[r * O + o], x[r * I + i]);
          }
          if (!b.empty()) sum.add(b[e * O + o], 1.0);
          bias_sums[o].add(d[r * O + o], 1.0);
          sum.into(out, r * O + o);
        }
        for (std::int64_t i = 0; i < I; ++i) row_sums[i].into(d_rows, r * I + i);
      }
      for (std::int64_t i = 0; i < O * I; ++i) weight_sums[i].into(d_weight, e * O * I + i);
      for (std::int64_t o = 0; o < O; ++o) bias_sums[o].into(d_bias, e * O + o);
    }
  }

  // The exact result, and how far quantized operands may move it.
  Expected naive_int8() const {
    const std::int64_t O = shape.O, I = shape.I;
    const std::vector<double> x = rows.values(), w = weight.values(), b = bias.values();
    Expected out(shape.R * O);
    for (std::int64_t e = 0; e < shape.E; ++e) {
      for (std::int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
        const double row_step = half_step(x.data() + r * I, I);
        for (std::int64_t o = 0; o < O; ++o) {
          const double* const channel = w.data() + (e * O + o) * I;
          const double step = half_step(channel, I);
          Sum sum;
          for (std::int64_t i = 0; i < I; ++i) sum.add_uncertain(channel[i], step, x[r * I + i], row_step);
          if (!b.empty()) sum.add(b[e * O + o], 1.0);
          sum.into(out, r * O + o);
        }
      }
    }
    return out;
  }
};

}  // namespace

void check_linear(const LinearShape& shape) {
  const Linear linear(shape);
  Expected out, d_rows, d_weight, d_bias;
  linear.naive(out, d_rows, d_weight, d_bias);
  set_threads(1);
  const Array alone = linear.forward();
  EXPECT_CLOSE(alone, out);
  const Linear::Gradients gradients = linear.backward(7);
  EXPECT_CLOSE(gradients.rows, d_rows);
  EXPECT_CLOSE(gradients.weight, d_weight);
  EXPECT_CLOSE(gradients.bias, d_bias);

  set_threads(3);
  EXPECT(linear.forward().same_bits(alone));
  const Packed packed(shape.dtype, linear.weight.data(), shape.E, shape.O, shape.I);
  Array from_packed(shape.dtype, shape.R * shape.O);
  grouped_linear(shape.dtype, linear.rows.data(), nullptr, linear.bias.data(), linear.offsets.data(), shape.R,
                 shape.E, shape.O, shape.I, from_packed.data(), packed.data());
  EXPECT(from_packed.same_bits(alone));

  const Packed int8(shape.dtype, linear.weight.data(), shape.E, shape.O, shape.I, PackedType::kInt8);
  Array quantized(shape.dtype, shape.R * shape.O);
  grouped_linear(shape.dtype, linear.rows.data(), nullptr, linear.bias.data(), linear.offsets.data(), shape.R,
                 shape.E, shape.O, shape.I, quantized.data(), int8.data(), PackedType::kInt8);
  EXPECT_CLOSE(quantized, linear.naive_int8());
  const auto wanted = static_cast<unsigned>(integer(8));
  const Linear::Gradients again = linear.backward(wanted);
  const auto same = [&](unsigned bit, const Array& a, const Array& b) {
    EXPECT((wanted & bit) != 0 ? a.same_bits(b) : a.untouched());
  };
  same(1, again.rows, gradients.rows);
  same(2, again.weight, gradients.weight);
  same(4, again.bias, gradients.bias);
  set_threads(1);
}

void check_linear_refusals(const LinearShape& shape) {
  LinearShape with_rows = shape;
  with_rows.R = std::max<std::int64_t>(shape.R, 2);
  with_rows.E = std::max<std::int64_t>(shape.E, 2);
  with_rows.O = std::max<std::int64_t>(shape.O, 1);
  with_rows.I = std::max<std::int64_t>(shape.I, 1);
  const Linear good(with_rows);
  const std::int64_t R = with_rows.R, E = with_rows.E;

  struct Call {
    DType dtype;
    const void *rows, *d_out, *weight;
    const std::int32_t* offsets;
    std::int64_t R, E, O, I;
    void* out;
    std::vector<std::int32_t> own_offsets;
  };
  struct Fault {
    const char* name;
    std::function<void(Call&)> make;
    bool forward = true, backward = true;
  };
  const std::int64_t bad_offset = std::vector<std::int64_t>{-1, R + 1, 1LL << 30}[integer(3)];
  const std::vector<Fault> faults = {
      {"dtype", [](Call& c) { c.dtype = DType{7}; }},
      {"R", [](Call& c) { c.R = -1; }},
      {"T*K", [](Call& c) { c.R = std::int64_t{1} << 31U; }},  // a count of rows, and refused as such
      {"E", [](Call& c) { c.E = -1; }},
      {"O", [](Call& c) { c.O = -1; }},
      {"I", [](Call& c) { c.I = -2; }},
      {"rows", [](Call& c) { c.rows = nullptr; }},
      {"weight", [](Call& c) { c.weight = nullptr; }},
      {"out", [](Call& c) { c.out = nullptr; }, true, false},
      {"d_out", [](Call& c) { c.d_out = nullptr; }, false, true},
      {"offsets", [](Call& c) { c.offsets = nullptr; }},
      {"offsets", [&](Call& c) { c.own_offsets[integer(E + 1)] = static_cast<std::int32_t>(bad_offset); }},
      {"offsets", [&](Call& c) { c.own_offsets[0] = 1; }},
      {"offsets", [&](Call& c) { c.own_offsets[E - 1] = c.own_offsets[E] + 1; }},
  };
  for (const Fault& fault : faults) {
    for (const bool forward : {true, false}) {
      if (forward ? !fault.forward : !fault.backward) continue;
      Array out(with_rows.dtype, R * with_rows.O);
      Array d_rows(with_rows.dtype, R * with_rows.I);
      Array d_weight(with_rows.dtype, E * with_rows.O * with_rows.I);
      Array d_bias(with_rows.dtype, E * with_rows.O);
      Call c{with_rows.dtype, good.rows.data(), good.d_out.data(), good.weight.data(), nullptr, R, E,
             with_rows.O,     with_rows.I,      out.data(),        good.offsets};
      c.offsets = c.own_offsets.data();
      fault.make(c);
      const std::string text =
          text_of(with_rows) + (forward ? " forward" : " backward") + ", fault in " + fault.name;
      describe(text);
      const std::string message = refusal([&] {
        if (forward) {
          grouped_linear(c.dtype, c.rows, c.weight, good.bias.data(), c.offsets, c.R, c.E, c.O, c.I, c.out);
        } else {
          grouped_linear_backward(c.dtype, c.d_out, c.rows, c.weight, c.offsets, c.R, c.E, c.O, c.I,
                                  d_rows.data(), d_weight.data(), d_bias.data());
        }
      });
      describe(text + ": '" + message + "'");
      EXPECT(starts_with(message, std::string(fault.name) + ": expected"));
      EXPECT(out.untouched() && d_rows.untouched() && d_weight.untouched() && d_bias.untouched());
    }
  }

  const auto pack_refusal = [&](DType dtype, const void* weight, std::int64_t E, std::int64_t O,
                                std::int64_t I, void* packed) {
    return refusal([&] { pack_weight(dtype, weight, E, O, I, packed); });
  };
  const void* const weight = good.weight.data();
  Array packed(DType::kFloat32, packed_weight_bytes(with_rows.dtype, E, with_rows.O, with_rows.I) / 4);
  const std::int64_t O = with_rows.O, I = with_rows.I;
  EXPECT(starts_with(pack_refusal(DType{3}, weight, E, O, I, packed.data()), "dtype: expected"));
  EXPECT(starts_with(pack_refusal(with_rows.dtype, nullptr, E, O, I, packed.data()), "weight: expected"));
  EXPECT(starts_with(pack_refusal(with_rows.dtype, weight, E, O, I, nullptr), "packed: expected"));
  EXPECT(starts_with(pack_refusal(with_rows.dtype, weight, -1, O, I, packed.data()), "E: expected"));
  EXPECT(starts_with(pack_refusal(with_rows.dtype, weight, E, -1, I, packed.data()), "O: expected"));
  EXPECT(starts_with(pack_refusal(with_rows.dtype, weight, E, O, -1, packed.data()), "I: expected"));
  EXPECT(starts_with(refusal([&] { packed_weight_bytes(DType{-2}, E, O, I); }), "dtype: expected"));
  const auto bytes_refusal = [&](std::int64_t I, PackedType type) {
    return refusal([&] { packed_weight_bytes(with_rows.dtype, E, O, I, type); });
  };
  EXPECT(starts_with(bytes_refusal(I, PackedType{2}), "packed_type: expected 0 (exact) or 1 (int8)"));
  EXPECT(starts_with(bytes_refusal(65537, PackedType::kInt8), "packed_type: expected at most 65536"));
  Array unwritten(with_rows.dtype, R * O);
  EXPECT(starts_with(refusal([&] {
                       grouped_linear(with_rows.dtype, good.rows.data(), weight, good.bias.data(),
                                      good.offsets.data(), R, E, O, I, unwritten.data(), nullptr,
                                      PackedType::kInt8);
                     }),
                     "packed: expected an int8 weight"));
  EXPECT(unwritten.untouched());
  EXPECT(starts_with(refusal([&] { packed_weight_bytes(with_rows.dtype, E, -9, I); }), "O: expected"));
  EXPECT(packed.untouched());
}

}  // namespace clipup::tests
