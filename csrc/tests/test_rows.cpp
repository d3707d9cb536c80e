// Permute, gather_sum and combine_backward against plain loops in all storage types, and these types.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../cpu/element.h"
#include "../moe.h"
#include "tests.h"

namespace clipup::tests {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class Element>
using Rows = std::vector<typename Element::Storage>;

template <class Element>
Rows<Element> random_rows(std::int64_t count) {
  Rows<Element> rows;
  for (std::int64_t i = 0; i < count; ++i) rows.push_back(Element::store(normal()));
  return rows;
}

template <class Element>
bool same_bits(const Rows<Element>& a, const Rows<Element>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
}

Plan random_plan(std::int64_t T, std::int64_t K) {
  constexpr std::int64_t kExperts = 5;
  Plan plan(T, K, kExperts);
  dispatch(random_experts(T, K, kExperts, 0.1F).data(), nullptr, nullptr, T, K, kExperts, 0.9,
           plan.offsets.data(), plan.choice_of_row.data(), plan.row_of_choice.data());
  return plan;
}

template <class Element>
void expect_rows(DType dtype, std::int64_t T, std::int64_t K, std::int64_t D) {
  describe("dtype=" + std::to_string(static_cast<int>(dtype)) + " T=" + std::to_string(T) +
           " K=" + std::to_string(K) + " D=" + std::to_string(D));
  const std::int64_t R = T * K;
  const auto nan = Element::store(kNaN);
  const Plan plan = random_plan(T, K);
  const std::int32_t used = plan.offsets.back();
  const Rows<Element> x = random_rows<Element>(T * D);

  Rows<Element> rows(R * D, nan);
  permute(x.data(), D * sizeof(typename Element::Storage), plan.choice_of_row.data(), &used, R, K,
          rows.data());
  Rows<Element> expected(R * D);
  for (std::int64_t i = 0; i < used * D; ++i) expected[i] = x[plan.choice_of_row[i / D] / K * D + i % D];
  EXPECT(same_bits<Element>(rows, expected));

  rows = random_rows<Element>(R * D);
  std::fill(rows.begin() + used * D, rows.end(), nan);  // past the last offset: never read
  std::vector<float> gates;
  for (std::int64_t i = 0; i < R; ++i) gates.push_back(uniform());
  for (const bool gated : {true, false}) {
    Rows<Element> y(T * D, nan);
    gather_sum(rows.data(), dtype, plan.row_of_choice.data(), gated ? gates.data() : nullptr, T, K, D,
               y.data());
    Rows<Element> sums(T * D);
    for (std::int64_t i = 0; i < T * D; ++i) {
      float sum = 0.0F;
      for (std::int64_t choice = i / D * K; choice < (i / D + 1) * K; ++choice) {
        const std::int64_t row = plan.row_of_choice[choice];
        if (row >= 0) sum += (gated ? gates[choice] : 1.0F) * Element::load(rows[row * D + i % D]);
      }
      sums[i] = Element::store(sum);
    }
    EXPECT(same_bits<Element>(y, sums));
  }

  Rows<Element> d_rows(R * D, nan);
  std::vector<float> d_gates(R, kNaN);
  combine_backward(x.data(), rows.data(), dtype, gates.data(), plan.row_of_choice.data(), T, K, D, &used, R,
                   d_rows.data(), d_gates.data());
  Rows<Element> d_rows_expected(R * D);
  for (std::int64_t choice = 0; choice < R; ++choice) {
    const std::int64_t row = plan.row_of_choice[choice];
    double product = 0.0;
    for (std::int64_t d = 0; row >= 0 && d < D; ++d) {
      const float dy = Element::load(x[choice / K * D + d]);
      d_rows_expected[row * D + d] = Element::store(gates[choice] * dy);
      product += static_cast<double>(dy) * Element::load(rows[row * D + d]);
    }
    EXPECT(close(d_gates[choice], product, 1e-5));
  }
  EXPECT(same_bits<Element>(d_rows, d_rows_expected));
}

// Loading and storing a stored value gives the value; floats between two stored values round to the nearer
// one.
template <class Element>
void expect_rounding() {
  for (std::uint32_t bits = 0; bits < 0x8000U; ++bits) {
    describe("bits=" + std::to_string(bits));
    const auto stored = static_cast<std::uint16_t>(bits);
    const float value = Element::load(stored);
    if (std::isnan(value)) {
      EXPECT(std::isnan(Element::load(Element::store(value))) &&
             std::isnan(Element::load(Element::store(-value))));
      continue;
    }
    EXPECT(Element::store(value) == stored && Element::store(-value) == (stored | 0x8000U));
    const float next = Element::load(static_cast<std::uint16_t>(bits + 1));
    if (!std::isfinite(next)) continue;
    EXPECT(value < next);
    const auto middle = static_cast<float>((static_cast<double>(value) + next) / 2);
    const auto even = static_cast<std::uint16_t>(bits + (bits & 1U));
    EXPECT(Element::store(middle) == even);
    EXPECT(Element::store(std::nextafter(middle, value)) == stored);
    EXPECT(Element::store(std::nextafter(middle, next)) == stored + 1);
  }
}

void expect_refusals() {
  const std::int64_t T = 2;
  const std::int64_t K = 2;
  const std::int32_t used = 4;
  const std::vector<float> x(8);
  std::vector<float> rows(16);
  std::vector<float> gates(4);
  std::vector<float> d_gates(4);

  const auto gather_refusal = [&](const std::vector<std::int32_t>& row_of_choice, int dtype) {
    return refusal(
        [&] { gather_sum(rows.data(), DType{dtype}, row_of_choice.data(), nullptr, T, K, 4, rows.data()); });
  };
  EXPECT(starts_with(gather_refusal({0, 1, 2, 4}, 0), "row_of_choice: expected values from -1 to 3, got 4"));
  EXPECT(starts_with(gather_refusal({0, 1, 2, 3}, 5), "dtype: expected 0 (float32)"));

  const auto backward_refusal = [&](const std::vector<std::int32_t>& row_of_choice) {
    return refusal([&] {
      combine_backward(x.data(), rows.data(), DType::kFloat32, gates.data(), row_of_choice.data(), T, K, 4,
                       &used, 4, rows.data(), d_gates.data());
    });
  };
  EXPECT(
      starts_with(backward_refusal({0, 1, 2, 2}), "row_of_choice: expected distinct rows, got row 2 twice"));
  EXPECT(starts_with(backward_refusal({0, 1, 2, -1}),
                     "row_of_choice: expected a choice for each of the 4 rows"));

  const auto permute_refusal = [&](const std::vector<std::int32_t>& choice_of_row, std::int64_t choices) {
    return refusal([&] { permute(x.data(), 16, choice_of_row.data(), &used, 4, choices, rows.data()); });
  };
  EXPECT(starts_with(permute_refusal({0, 1, 2, 4}, K), "choice_of_row: expected values from 0 to 3, got 4"));
  EXPECT(starts_with(permute_refusal({0, 1, 2, 3}, 3), "R: expected a multiple of K = 3, got 4"));
  const std::vector<std::int32_t> choice_of_row = {0, 1, 2, 3};
  EXPECT(starts_with(refusal([&] { permute(nullptr, 16, choice_of_row.data(), &used, 4, K, rows.data()); }),
                     "x: expected an array of 64 elements, got a null pointer"));
}

}  // namespace

void check_rows(std::int64_t T, std::int64_t K, std::int64_t D) {
  expect_rows<Float32>(DType::kFloat32, T, K, D);
  expect_rows<BFloat16>(DType::kBFloat16, T, K, D);
  expect_rows<Float16>(DType::kFloat16, T, K, D);
}

void check_rows_refusals() { expect_refusals(); }

void test_rows() {
  for (const int threads : {1, 4}) {
    set_threads(threads);
    for (const std::int64_t T : {0, 1, 9, 300}) {
      for (const std::int64_t K : {0, 1, 3}) {
        for (const std::int64_t D : {0, 1, 15, 16, 37, 256, 300}) check_rows(T, K, D);
      }
    }
  }
  expect_rounding<BFloat16>();
  expect_rounding<Float16>();
  EXPECT(Float16::store(65519.0F) == 0x7BFFU && Float16::store(65520.0F) == 0x7C00U &&
         Float16::store(1e30F) == 0x7C00U);
  expect_refusals();
}

}  // namespace clipup::tests
