// The router's logits and their gradients, in float, from tokens in their storage type.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../checks.h"
#include "../moe.h"
#include "expert_rows.h"
#include "kernels.h"
#include "parallel.h"

namespace clipup {
namespace {

constexpr std::int64_t kRows = 16;        // tokens per task
constexpr std::int64_t kSmall = 1 << 16;  // multiply-adds that do not pay for waking threads

void check_router(const void* x, DType dtype, const float* weight, std::int64_t T, std::int64_t D,
                  std::int64_t E) {
  check_row_count(T, 1);
  check_size("D", D, 0);
  check_size("E", E, 0);
  check_dtype(dtype);
  check_pointer("x", x, T * D);
  check_pointer("weight", weight, E * D);
}

// Calls work(begin, end) for runs of unmasked tokens, rest(begin, end) for masked ones, spread over threads.
template <class Work, class Rest>
void for_token_runs(std::int64_t T, std::int64_t products, const std::uint8_t* mask, const Work& work,
                    const Rest& rest) {
  parallel_for(ceil_div(T, kRows), ceil_div(parallel_from(products), kRows), [&](std::int64_t task) {
    const std::int64_t end = std::min((task + 1) * kRows, T);
    for (std::int64_t t = task * kRows; t < end;) {
      const bool unmasked = mask == nullptr || mask[t] != 0;
      std::int64_t run = t + 1;
      while (run < end && (mask == nullptr || (mask[run] != 0) == unmasked)) ++run;
      unmasked ? work(t, run) : rest(t, run);
      t = run;
    }
  });
}

}  // namespace

void router_logits(const void* x, DType dtype, const std::uint8_t* mask, const float* weight, std::int64_t T,
                   std::int64_t D, std::int64_t E, float* logits) {
  check_router(x, dtype, weight, T, D, E);
  check_pointer("logits", logits, T * E);
  const TypedKernels& typed = kernels().of(dtype);
  for_token_runs(
      T, D * E, mask,
      [&](std::int64_t t, std::int64_t end) {
        typed.router_logits(element(x, dtype, t * D), end - t, weight, D, E, logits + t * E);
      },
      [&](std::int64_t t, std::int64_t end) { std::fill(logits + t * E, logits + end * E, 0.0F); });
}

void router_logits_backward(const float* d_logits, const void* x, DType dtype, const std::uint8_t* mask,
                            const float* weight, std::int64_t T, std::int64_t D, std::int64_t E, void* d_x,
                            float* d_weight) {
  check_router(x, dtype, weight, T, D, E);
  check_pointer("d_logits", d_logits, T * E);
  const TypedKernels& typed = kernels().of(dtype);
  if (d_x != nullptr) {
    for_token_runs(
        T, D * E, mask,
        [&](std::int64_t t, std::int64_t end) {
          typed.router_input_gradient(d_logits + t * E, end - t, weight, D, E, element(d_x, dtype, t * D));
        },
        [&](std::int64_t t, std::int64_t end) {
          std::memset(element(d_x, dtype, t * D), 0, (end - t) * D * element_size(dtype));
        });
  }
  if (d_weight != nullptr) {
    const std::int64_t tasks = ceil_div(D, kRouterColumns);
    const bool small = T * D * E < kSmall;
    parallel_for(tasks, small ? tasks + 1 : 2, [&](std::int64_t task) {
      const std::int64_t d = task * kRouterColumns;
      typed.router_weight_gradient(element(x, dtype, d), mask, d_logits, T, D, E,
                                   std::min(kRouterColumns, D - d), d_weight + d);
    });
  }
}

}  // namespace clipup
