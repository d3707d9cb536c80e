// Permute, gather_sum and combine_backward as CUDA kernels, emulated, against the CPU's stages, which have tests of
// their own: to the bit, but for d_gates, whose sums have another order.
#include <algorithm>

#include "../moe_cuda.h"
#include "arrays.h"
#include "cuda_schedules.h"
#include "tests.h"

namespace clipup::tests {
namespace {

Array random_rows(DType dtype, std::int64_t size, std::int64_t shift) {
  Array rows(dtype, size, shift);
  rows.fill_normal(1.0F);
  return rows;
}

bool same(const Array& a, const Array& b) { return a.same_bits(b); }

// `shift` elements off the alignment that the widest loads need.
void expect_rows(DType dtype, std::int64_t T, std::int64_t K, std::int64_t D, std::int64_t shift) {
  describe("cuda rows dtype=" + std::to_string(static_cast<int>(dtype)) + " T=" + std::to_string(T) +
           " K=" + std::to_string(K) + " D=" + std::to_string(D) + " shift=" + std::to_string(shift));
  constexpr std::int64_t kExperts = 5;
  const std::int64_t R = T * K;
  Plan plan(T, K, kExperts);
  dispatch(random_experts(T, K, kExperts, 0.1F).data(), nullptr, nullptr, T, K, kExperts, 0.9,
           plan.offsets.data(), plan.choice_of_row.data(), plan.row_of_choice.data());
  const std::int32_t used = plan.offsets.back();
  std::vector<float> gates(R);
  std::generate(gates.begin(), gates.end(), uniform);
  const Array x = random_rows(dtype, T * D, shift);
  Array rows = random_rows(dtype, R * D, shift);
  for (std::int64_t i = used * D; i < R * D; ++i) rows.set(i, NAN);  // past the last offset: never read

  const std::int64_t row_bytes = D * (dtype == DType::kFloat32 ? 4 : 2);
  Array permuted(dtype, R * D);
  permute(x.data(), row_bytes, plan.choice_of_row.data(), &used, R, K, permuted.data());
  EXPECT(permuted.same_bits(under_every_schedule(
      [&] {
        Array ours(dtype, R * D, shift);
        cuda::permute(x.data(), row_bytes, plan.choice_of_row.data(), &used, R, K, ours.data(), nullptr);
        return ours;
      },
      same)));

  for (const float* const gates_or_null :
       {static_cast<const float*>(gates.data()), static_cast<const float*>(nullptr)}) {
    Array sums(dtype, T * D);
    gather_sum(rows.data(), dtype, plan.row_of_choice.data(), gates_or_null, T, K, D, sums.data());
    EXPECT(sums.same_bits(under_every_schedule(
        [&] {
          Array ours(dtype, T * D, shift);
          cuda::gather_sum(rows.data(), dtype, plan.row_of_choice.data(), gates_or_null, T, K, D, ours.data(),
                           nullptr);
          return ours;
        },
        same)));
  }

  Array d_rows(dtype, R * D);
  std::vector<float> d_gates(R, NAN);
  combine_backward(x.data(), rows.data(), dtype, gates.data(), plan.row_of_choice.data(), T, K, D, &used, R,
                   d_rows.data(), d_gates.data());
  const auto [our_rows, our_gates] = under_every_schedule(
      [&] {
        std::pair<Array, std::vector<float>> ours(Array(dtype, R * D, shift), std::vector<float>(R, NAN));
        cuda::combine_backward(x.data(), rows.data(), dtype, gates.data(), plan.row_of_choice.data(), T, K, D,
                               &used, R, ours.first.data(), ours.second.data(), nullptr);
        return ours;
      },
      [](const auto& a, const auto& b) {
        return a.first.same_bits(b.first) && same_bits(a.second, b.second);
      });
  EXPECT(d_rows.same_bits(our_rows));
  for (std::int64_t choice = 0; choice < R; ++choice) {
    const std::int64_t row = plan.row_of_choice[choice];
    Sum product;
    for (std::int64_t d = 0; row >= 0 && d < D; ++d)
      product.add(x.at(choice / K * D + d), rows.at(row * D + d));
    EXPECT(std::abs(our_gates[choice] - product.value) <= product.error());
  }
}

}  // namespace

void check_cuda_rows(std::int64_t T, std::int64_t K, std::int64_t D, std::int64_t shift) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    expect_rows(dtype, T, K, D, shift);
}

void test_cuda_rows() {
  for (const std::int64_t T : {0, 1, 9}) {
    for (const std::int64_t K : {0, 1, 3}) {
      for (const std::int64_t D : {0, 1, 15, 16, 256, 300, 2080}) {
        if (quick() && D == 2080) continue;
        check_cuda_rows(T, K, D, 0);
        check_cuda_rows(T, K, D, 1);
      }
    }
  }
  check_cuda_rows(quick() ? 40 : 150, 2, 64, 0);
}

}  // namespace clipup::tests
