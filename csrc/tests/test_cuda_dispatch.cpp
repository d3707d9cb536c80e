// Dispatch as emulated CUDA kernels equals a naive implementation with lists.
#include <limits>

#include "../moe_cuda.h"
#include "cuda_schedules.h"
#include "routing_cases.h"
#include "tests.h"

namespace clipup::tests {
namespace {

Plan run(const DispatchCase& c) {
  const std::vector<std::int64_t> order = c.order();
  return under_every_schedule(
      [&] {
        Plan plan(c.T, c.K, c.E);
        auto workspace = poisoned_workspace(cuda::dispatch_workspace_bytes(c.T, c.K, c.E));
        cuda::dispatch(c.expert_indices.data(), c.mask.empty() ? nullptr : c.mask.data(),
                       c.priority.empty() ? nullptr : order.data(), c.T, c.K, c.E, c.capacity_factor,
                       plan.offsets.data(), plan.choice_of_row.data(), plan.row_of_choice.data(),
                       workspace.data(), nullptr);
        return plan;
      },
      [](const Plan& a, const Plan& b) { return a == b; });
}

void expect_plan(const DispatchCase& c) { EXPECT(run(c) == c.naive()); }

void expect_indices_outside_count_as_none() {
  DispatchCase c(70, 2, 5, 1.0, true, true);
  DispatchCase cleaned = c;
  for (std::size_t i = 0; i < c.expert_indices.size(); ++i) {
    if (uniform() < 0.5F)
      c.expert_indices[i] = i % 2 == 0 ? 5 + 1000000 * integer(2) : -7, cleaned.expert_indices[i] = -1;
  }
  EXPECT(run(c) == cleaned.naive());
}

void expect_refusals() {
  const auto refused = [](const DispatchCase& c, bool with_workspace, const char* message) {
    Plan plan(c.T, c.K, c.E);
    std::vector<std::int32_t> workspace(with_workspace ? 10000 : 0);
    EXPECT(starts_with(refusal([&] {
                         cuda::dispatch(c.expert_indices.data(), nullptr, nullptr, c.T, c.K, c.E,
                                        c.capacity_factor, plan.offsets.data(), plan.choice_of_row.data(),
                                        plan.row_of_choice.data(),
                                        with_workspace ? workspace.data() : nullptr, nullptr);
                       }),
                       message));
    EXPECT(plan == Plan(c.T, c.K, c.E));  // nothing was written
  };
  refused(DispatchCase(4, 2, 3, 0.0, false, false), true, "capacity_factor: expected a positive number");
  refused(DispatchCase(4, 2, 3, std::numeric_limits<double>::quiet_NaN(), false, false), true,
          "capacity_factor");
  refused(DispatchCase(4, 2, 257, 1.0, false, false), true, "E: expected at most 256 on CUDA, got 257");
  refused(DispatchCase(4, 2, 3, 1.0, false, false), false, "workspace: expected an array of ");
}

}  // namespace

void check_cuda_dispatch(std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, bool masked,
                         bool prioritised) {
  expect_plan(DispatchCase(T, K, E, capacity_factor, masked, prioritised));
}

void test_cuda_dispatch() {
  for (const std::int64_t T : {0, 1, 100, 700}) {
    for (const std::int64_t E : {1, 8, 256}) {
      for (const std::int64_t K : {0, 1, 2, 8}) {
        if (K > E) continue;
        for (const double f : {-1.0, 0.05, 1.0, 1.3, 1e300}) {
          for (int options = 0; options < 4; options += quick() ? 3 : 1) {
            check_cuda_dispatch(T, K, E, f, (options & 1) != 0, (options & 2) != 0);
          }
        }
      }
    }
  }
  check_cuda_dispatch(5, 256, 256, 0.7, true, true);  // K = E

  DispatchCase one_expert(500, 1, 4, 1.0, false, false);
  std::fill(one_expert.expert_indices.begin(), one_expert.expert_indices.end(), 2);
  EXPECT((run(one_expert).offsets == std::vector<std::int32_t>{0, 0, 0, 125, 125}));
  one_expert.capacity_factor = 1.0 + 1e-12;  // in double
  EXPECT((run(one_expert).offsets == std::vector<std::int32_t>{0, 0, 0, 126, 126}));

  DispatchCase all_masked(300, 2, 4, 1.0, true, true);
  std::fill(all_masked.mask.begin(), all_masked.mask.end(), std::uint8_t{0});
  expect_plan(all_masked);

  // A token may name an expert more than once.
  for (const double f : {-1.0, 0.7, 1.5, 4.0}) {
    DispatchCase repeated(60, 4, 6, f, true, true);
    for (std::int32_t& e : repeated.expert_indices) e = static_cast<std::int32_t>(integer(3)) - 1;
    expect_plan(repeated);
  }
  // The most blocks that there are, and several rounds of slots for a warp.
  check_cuda_dispatch(quick() ? 34000 : 70000, 2, 8, 1.0, true, true);
  expect_indices_outside_count_as_none();
  expect_refusals();
}

}  // namespace clipup::tests
