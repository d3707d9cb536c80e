// The router's logits and their gradients against sums in double.
#include <algorithm>

#include "arrays.h"

namespace clipup::tests {
namespace {

// An expected sum for every element of [rows, columns]: terms(row, column, sum) adds them.
template <class Terms>
Expected sums(std::int64_t rows, std::int64_t columns, const Terms& terms) {
  Expected expected(rows * columns);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      Sum sum;
      terms(row, column, sum);
      sum.into(expected, row * columns + column);
    }
  }
  return expected;
}

Array normals(DType dtype, std::int64_t size, std::int64_t shift = 0) {
  Array array(dtype, size, shift);
  array.fill_normal(1.0F);
  return array;
}

float* floats(Array& array) { return static_cast<float*>(array.data()); }

void check_type(DType dtype, std::int64_t T, std::int64_t D, std::int64_t E, bool masked) {
  describe(std::string("router_logits ") + kDtypeNames[static_cast<int>(dtype)] + " T=" + std::to_string(T) +
           " D=" + std::to_string(D) + " E=" + std::to_string(E) + (masked ? " masked" : ""));
  Array x = normals(dtype, T * D, integer(3));
  Array weight = normals(DType::kFloat32, E * D, integer(3));
  Array d_logits = normals(DType::kFloat32, T * E);
  std::vector<std::uint8_t> mask(T, 1);
  for (std::int64_t t = 0; masked && t < T; ++t) {
    if (uniform() < 0.6F) continue;
    mask[t] = 0;  // masked tokens are never read
    for (std::int64_t d = 0; d < D; ++d) x.set(t * D + d, std::nanf(""));
    for (std::int64_t e = 0; e < E; ++e) d_logits.set(t * E + e, std::nanf(""));
  }
  const std::uint8_t* const flags = masked ? mask.data() : nullptr;

  Array logits(DType::kFloat32, T * E);
  router_logits(x.data(), dtype, flags, floats(weight), T, D, E, floats(logits));
  EXPECT_CLOSE(logits, sums(T, E, [&](std::int64_t t, std::int64_t e, Sum& sum) {
                 for (std::int64_t d = 0; mask[t] != 0 && d < D; ++d)
                   sum.add(x.at(t * D + d), weight.at(e * D + d));
               }));

  Array d_x(dtype, T * D);
  Array d_weight(DType::kFloat32, E * D);
  router_logits_backward(floats(d_logits), x.data(), dtype, flags, floats(weight), T, D, E, d_x.data(),
                         floats(d_weight));
  EXPECT_CLOSE(d_x, sums(T, D, [&](std::int64_t t, std::int64_t d, Sum& sum) {
                 for (std::int64_t e = 0; mask[t] != 0 && e < E; ++e)
                   sum.add(d_logits.at(t * E + e), weight.at(e * D + d));
               }));
  EXPECT_CLOSE(d_weight, sums(E, D, [&](std::int64_t e, std::int64_t d, Sum& sum) {
                 for (std::int64_t t = 0; t < T; ++t) {
                   if (mask[t] != 0) sum.add(d_logits.at(t * E + e), x.at(t * D + d));
                 }
               }));

  // Unwanted outputs are not written, and do not change the others.
  Array alone(DType::kFloat32, E * D);
  router_logits_backward(floats(d_logits), x.data(), dtype, flags, floats(weight), T, D, E, nullptr,
                         floats(alone));
  EXPECT(alone.same_bits(d_weight));

  // A token's logits are bitwise the same without the tokens before it.
  if (T > 1) {
    Array last(DType::kFloat32, E);
    const std::int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    const auto* const row = static_cast<const unsigned char*>(x.data()) + (T - 1) * D * size;
    router_logits(row, dtype, masked ? &mask[T - 1] : nullptr, floats(weight), 1, D, E, floats(last));
    EXPECT(E == 0 || std::memcmp(last.data(), floats(logits) + (T - 1) * E, E * sizeof(float)) == 0);
  }
}

void expect_refusals() {
  std::vector<float> floats(8);
  const auto refused = [&](const void* x, int dtype, std::int64_t T, std::int64_t E) {
    return refusal([&] { router_logits(x, DType{dtype}, nullptr, floats.data(), T, 2, E, floats.data()); });
  };
  EXPECT(refused(floats.data(), 0, 2, 2).empty());
  EXPECT(starts_with(refused(nullptr, 0, 2, 2), "x: expected an array of 4 elements, got a null pointer"));
  EXPECT(starts_with(refused(floats.data(), 3, 2, 2), "dtype: expected 0 (float32)"));
  EXPECT(starts_with(refused(floats.data(), 0, -1, 2), "T: expected at least 0, got -1"));
  EXPECT(starts_with(refused(floats.data(), 0, 2, -1), "E: expected at least 0, got -1"));
  EXPECT(starts_with(refusal([&] {
                       router_logits_backward(nullptr, floats.data(), DType::kFloat32, nullptr, floats.data(),
                                              2, 2, 2, nullptr, nullptr);
                     }),
                     "d_logits: expected an array of 4 elements, got a null pointer"));
}

}  // namespace

void check_router_logits(std::int64_t T, std::int64_t D, std::int64_t E, bool masked) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    check_type(dtype, T, D, E, masked);
}

void test_router_logits() {
  for (const int threads : {1, 4}) {
    set_threads(threads);
    for (const std::int64_t T : {0, 1, 7, 40, 600}) {
      for (const std::int64_t D : {0, 1, 16, 37, 200}) {
        for (const std::int64_t E : {0, 1, 3, 8, 17}) check_router_logits(T, D, E, (T + D + E) % 2 == 0);
      }
    }
  }
  expect_refusals();
}

}  // namespace clipup::tests
