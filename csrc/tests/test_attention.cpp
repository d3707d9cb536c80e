// self_attention against loops in double; bitwise the same for every number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "arrays.h"
#include "tests.h"

namespace clipup::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Attention {
  AttentionShape shape;
  Array qkv;
  std::vector<float> mask;

  explicit Attention(const AttentionShape& shape)
      : shape(shape), qkv(shape.dtype, shape.B * shape.L * 3 * shape.heads * shape.d, shape.shift) {
    describe("attention " + std::string(kDtypeNames[static_cast<int>(shape.dtype)]) +
             " B=" + std::to_string(shape.B) + " L=" + std::to_string(shape.L) +
             " heads=" + std::to_string(shape.heads) + " d=" + std::to_string(shape.d) +
             " mask=" + std::to_string(shape.mask) + " shift=" + std::to_string(shape.shift));
    qkv.fill_normal(1.5F);
    if (shape.mask == AttentionShape::kNone) return;
    const std::int64_t masks = shape.mask == AttentionShape::kOfEachHead ? shape.B * shape.heads : 1;
    mask.resize(masks * shape.L * shape.L);
    for (float& value : mask) value = uniform() < 0.3F ? -std::numeric_limits<float>::infinity() : normal();
    if (!mask.empty()) std::fill_n(mask.begin(), shape.L, -std::numeric_limits<float>::infinity());
  }

  std::int64_t head_stride() const {
    return shape.mask == AttentionShape::kOfEachHead ? shape.L * shape.L : 0;
  }

  Array run(PackedType type) const {
    Array out(shape.dtype, shape.B * shape.L * shape.heads * shape.d, shape.shift);
    self_attention(shape.dtype, qkv.data(), mask.empty() ? nullptr : mask.data(), shape.heads * head_stride(),
                   head_stride(), shape.B, shape.L, shape.heads, shape.d, out.data(), type);
    return out;
  }

  double at(std::int64_t b, std::int64_t token, std::int64_t which, std::int64_t head, std::int64_t i) const {
    return qkv.at((((b * shape.L + token) * 3 + which) * shape.heads + head) * shape.d + i);
  }

  // Half of the step in which `count` numbers are quantized.
  template <class Of>
  static double half_step(std::int64_t count, const Of& of) {
    double most = 0.0;
    for (std::int64_t i = 0; i < count; ++i) most = std::max(most, std::abs(of(i)));
    return most / 254.0;
  }

  // One head's rows of the result, and how far rounding may move them.
  void head(std::int64_t b, std::int64_t h, bool int8, Expected& out) const {
    const std::int64_t L = shape.L, d = shape.d;
    std::vector<double> key_mean(d, 0.0), value_mean(d, 0.0), value_step(d), key_step(L);
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t l = 0; int8 && l < L; ++l) {
        key_mean[i] += at(b, l, 1, h, i) / L;
        value_mean[i] += at(b, l, 2, h, i) / L;
      }
      value_step[i] = half_step(L, [&](std::int64_t l) { return at(b, l, 2, h, i) - value_mean[i]; });
    }
    for (std::int64_t l = 0; l < L; ++l) {
      key_step[l] = half_step(d, [&](std::int64_t i) { return at(b, l, 1, h, i) - key_mean[i]; });
    }
    const double scale = 1.0 / std::sqrt(static_cast<double>(d));
    const double rounding = shape.dtype == DType::kBFloat16 && !int8 ? 1.0 / 256 : 0.0;  // of shares
    for (std::int64_t row = 0; row < L; ++row) {
      const double query_step = half_step(d, [&](std::int64_t i) { return at(b, row, 0, h, i); });
      std::vector<double> scores(L), shares(L);
      double most = -kInfinity, moved = 0.0, total = 0.0;
      for (std::int64_t l = 0; l < L; ++l) {
        Sum sum;
        for (std::int64_t i = 0; i < d; ++i) {
          sum.add_uncertain(at(b, l, 1, h, i) - key_mean[i], int8 ? key_step[l] : 0.0, at(b, row, 0, h, i),
                            int8 ? query_step : 0.0);
        }
        const double added = mask.empty() ? 0.0 : mask[(b * shape.heads + h) * head_stride() + row * L + l];
        scores[l] = sum.value * scale + added;
        most = std::max(most, scores[l]);
        if (added > -kInfinity) moved = std::max(moved, sum.error() * scale + 2e-7 * std::abs(added));
      }
      for (std::int64_t l = 0; l < L; ++l) {
        shares[l] = most == -kInfinity ? 0.0 : std::exp(scores[l] - most);
        total += shares[l];
      }
      const double factor = std::exp(2.0 * moved) - 1.0 + 2e-5 + rounding;
      const double level = int8 ? std::exp(2.0 * moved) * 0.5 / 255.0 : 0.0;
      for (std::int64_t i = 0; i < d; ++i) {
        Sum sum;
        double error = 0.0, all = 0.0;
        for (std::int64_t l = 0; l < L && total > 0.0; ++l) {
          const double value = at(b, l, 2, h, i) - value_mean[i];
          const double share = shares[l] / total;
          sum.add(share, value);
          error += (share * factor + level / total) * (std::abs(value) + value_step[i]);
          all += share;
        }
        const std::int64_t index = ((b * L + row) * shape.heads + h) * d + i;
        out.value[index] = sum.value + (total > 0.0 ? value_mean[i] : 0.0);
        out.error[index] =
            error + sum.error() + (int8 ? value_step[i] * all + 2e-6 * std::abs(value_mean[i]) : 0.0);
      }
    }
  }

  Expected naive(bool int8) const {
    Expected out(shape.B * shape.L * shape.heads * shape.d);
    for (std::int64_t b = 0; b < shape.B; ++b) {
      for (std::int64_t h = 0; h < shape.heads; ++h) head(b, h, int8, out);
    }
    return out;
  }
};

// A number that is not finite reaches the rows that attend to it, and no other sequence.
void check_not_finite(DType dtype, PackedType type, int which) {
  AttentionShape shape{dtype, 2, 9, 2, 5};
  Attention attention(shape);
  // With bits in its payload, which the arithmetic of an exponent would shift into it.
  attention.qkv.set((4 * 3 + which) * shape.heads * shape.d + 2, std::nanf("1"));
  const Array out = attention.run(type);
  const std::int64_t sequence = shape.L * shape.heads * shape.d;
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const std::int64_t row = i / (shape.heads * shape.d), head = i / shape.d % shape.heads;
    const bool reached =
        i < sequence && head == 0 && (which != 0 || row == 4) && (which != 2 || i % shape.d == 2);
    EXPECT(std::isnan(out.at(i)) == reached);
  }
}

void check_refusals() {
  Attention good(AttentionShape{DType::kFloat32, 1, 3, 2, 4});
  Array out(DType::kFloat32, 24);
  const auto said = [&](int dtype, const void* qkv, std::int64_t B, std::int64_t L, std::int64_t heads,
                        std::int64_t d, void* to) {
    return refusal([&] { self_attention(DType{dtype}, qkv, nullptr, 0, 0, B, L, heads, d, to); });
  };
  const void* const qkv = good.qkv.data();
  EXPECT(starts_with(said(9, qkv, 1, 3, 2, 4, out.data()), "dtype"));
  EXPECT(starts_with(said(0, nullptr, 1, 3, 2, 4, out.data()), "qkv"));
  EXPECT(starts_with(said(0, qkv, -1, 3, 2, 4, out.data()), "B"));
  EXPECT(starts_with(said(0, qkv, 1, -3, 2, 4, out.data()), "L"));
  EXPECT(starts_with(said(0, qkv, 1, 3, -2, 4, out.data()), "heads"));
  EXPECT(starts_with(said(0, qkv, 1, 3, 2, -4, out.data()), "d"));
  EXPECT(starts_with(said(0, qkv, 1, 3, 2, 4, nullptr), "out"));
  EXPECT(out.untouched());
}

}  // namespace

void check_attention(const AttentionShape& shape) {
  const Attention attention(shape);
  for (const bool int8 : {false, true}) {
    const PackedType type = int8 ? PackedType::kInt8 : PackedType::kExact;
    set_threads(1);
    const Array out = attention.run(type);
    EXPECT_CLOSE(out, attention.naive(int8));
    set_threads(3);
    EXPECT(attention.run(type).same_bits(out));
  }
  set_threads(1);
}

void test_attention() {
  start_case(7);
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (const std::int64_t L : {0, 1, 13, 14, 15, 33, 64, 97}) {
      for (const std::int64_t d : {0, 1, 7, 16, 33, 64}) {
        check_attention({DType{dtype}, 1 + L % 2, L, 1 + d % 2, d, static_cast<int>((L + d) % 3), d % 4});
      }
    }
    for (int which = 0; which < 3; ++which) {
      check_not_finite(DType{dtype}, PackedType::kExact, which);
      check_not_finite(DType{dtype}, PackedType::kInt8, which);
    }
  }
  check_refusals();
}

}  // namespace clipup::tests
