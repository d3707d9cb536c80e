// combine: the gated sum of every token's rows, and its gradients.
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../checks.h"
#include "../moe.h"
#include "element.h"
#include "parallel.h"

namespace clipup {
namespace {

constexpr std::int64_t kTile = 256;  // columns summed at a time, in registers and the first-level cache
constexpr std::int64_t kLanes = 16;  // partial sums of a dot product

template <class Element>
using Stored = typename Element::Storage;

// y[0:width] = sum over k of gate * row.
template <class Element>
void sum_rows(const Stored<Element>* rows, const std::int32_t* row_of_choice_K, const float* gates_K,
              std::int64_t K, std::int64_t D, Stored<Element>* y_D) {
  std::array<float, kTile> sums;
  for (std::int64_t begin = 0; begin < D; begin += kTile) {
    const std::int64_t width = std::min(kTile, D - begin);
    std::fill_n(sums.begin(), width, 0.0F);
    for (std::int64_t k = 0; k < K; ++k) {
      if (row_of_choice_K[k] < 0) continue;
      const float gate = gates_K == nullptr ? 1.0F : gates_K[k];
      const Stored<Element>* row = rows + row_of_choice_K[k] * D + begin;
      for (std::int64_t d = 0; d < width; ++d) sums[d] += gate * Element::load(row[d]);
    }
    for (std::int64_t d = 0; d < width; ++d) y_D[begin + d] = Element::store(sums[d]);
  }
}

// <a, b>: element d goes to lane d % kLanes, and the lanes are added pairwise.
template <class Element>
float dot(const Stored<Element>* a, const Stored<Element>* b, std::int64_t D) {
  std::array<float, kLanes> lanes{};
  std::int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += Element::load(a[d + lane]) * Element::load(b[d + lane]);
    }
  }
  for (; d < D; ++d) lanes[d % kLanes] += Element::load(a[d]) * Element::load(b[d]);
  for (std::int64_t step = kLanes / 2; step > 0; step /= 2) {
    for (std::int64_t lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  }
  return lanes[0];
}

// Calls function(Element{}) with the storage type of `dtype`.
template <class Function>
void with_element(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(Float32{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
  throw std::invalid_argument("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                              std::to_string(static_cast<int>(dtype)));
}

// Throws unless the choices name each of the rows [0, used) exactly once: writing by choice then
// writes every row.
void check_rows_covered(const std::int32_t* row_of_choice, std::int64_t R, std::int64_t used) {
  check_values("row_of_choice", row_of_choice, R, -1, used);
  std::vector<bool> seen(used);
  for (std::int64_t choice = 0; choice < R; ++choice) {
    const std::int32_t row = row_of_choice[choice];
    if (row < 0) continue;
    if (seen[row]) {
      throw std::invalid_argument("row_of_choice: expected distinct rows, got row " + std::to_string(row) +
                                  " twice");
    }
    seen[row] = true;
  }
  check(std::find(seen.begin(), seen.end(), false) == seen.end(), [&] {
    return "row_of_choice: expected a choice for each of the " + std::to_string(used) +
           " rows used, one is missing";
  });
}

}  // namespace

void gather_sum(const void* rows, DType dtype, const std::int32_t* row_of_choice, const float* gates,
                std::int64_t T, std::int64_t K, std::int64_t D, void* y) {
  check_row_count(T, K);
  check_size("D", D, 0);
  check_pointer("rows", rows, T * K * D);
  check_pointer("row_of_choice", row_of_choice, T * K);
  check_pointer("y", y, T * D);
  check_values("row_of_choice", row_of_choice, T * K, -1, T * K);

  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    const auto* from = static_cast<const Stored<Element>*>(rows);
    auto* to = static_cast<Stored<Element>*>(y);
    parallel_for(T, parallel_from(D * sizeof(Stored<Element>)), [&](std::int64_t t) {
      const float* gates_K = gates == nullptr ? nullptr : gates + t * K;
      sum_rows<Element>(from, row_of_choice + t * K, gates_K, K, D, to + t * D);
    });
  });
}

void combine_backward(const void* dy, const void* rows, DType dtype, const float* gates,
                      const std::int32_t* row_of_choice, std::int64_t T, std::int64_t K, std::int64_t D,
                      const std::int32_t* rows_used, std::int64_t R, void* d_rows, float* d_gates) {
  check_row_count(T, K);
  check_size("D", D, 0);
  check(R == T * K,
        [&] { return "R: expected T*K = " + std::to_string(T * K) + ", got " + std::to_string(R); });
  check_pointer("dy", dy, T * D);
  check_pointer("rows", rows, R * D);
  check_pointer("gates", gates, R);
  check_pointer("row_of_choice", row_of_choice, R);
  check_pointer("rows_used", rows_used, 1);
  check_pointer("d_rows", d_rows, R * D);
  check_pointer("d_gates", d_gates, R);
  check_values("rows_used", rows_used, 1, 0, R + 1);
  const std::int64_t used = *rows_used;
  check_rows_covered(row_of_choice, R, used);

  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    const auto* dy_TD = static_cast<const Stored<Element>*>(dy);
    const auto* rows_RD = static_cast<const Stored<Element>*>(rows);
    auto* d_rows_RD = static_cast<Stored<Element>*>(d_rows);
    const std::int64_t from = parallel_from(D * sizeof(Stored<Element>));
    parallel_for(R, from, [&](std::int64_t choice) {
      if (choice >= used)
        std::fill_n(d_rows_RD + choice * D, D,
                    Stored<Element>{});  // here `choice` is a row number: a row that no choice has
      const std::int64_t row = row_of_choice[choice];
      if (row < 0) {
        d_gates[choice] = 0.0F;
        return;
      }
      const Stored<Element>* dy_D = dy_TD + choice / K * D;
      const float gate = gates[choice];
      for (std::int64_t d = 0; d < D; ++d)
        d_rows_RD[row * D + d] = Element::store(gate * Element::load(dy_D[d]));
      d_gates[choice] = dot<Element>(dy_D, rows_RD + row * D, D);
    });
  });
}

}  // namespace clipup
