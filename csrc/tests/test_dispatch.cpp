// Dispatch against lists: one list an expert, filled in slot order until it holds the capacity.
#include <algorithm>
#include <limits>

#include "../moe.h"
#include "routing_cases.h"
#include "tests.h"

namespace clipup::tests {
namespace {

using Case = DispatchCase;

void expect_refused(const Case& c, const std::string& message) {
  Plan plan(c.T, c.K, c.E);
  const std::string refused = refusal([&] {
    dispatch(c.expert_indices.data(), nullptr, nullptr, c.T, c.K, c.E, c.capacity_factor, plan.offsets.data(),
             plan.choice_of_row.data(), plan.row_of_choice.data());
  });
  EXPECT(starts_with(refused, message));
  EXPECT(plan == Plan(c.T, c.K, c.E));  // nothing was written
}

}  // namespace

void check_dispatch(std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, bool masked,
                    bool prioritised) {
  const Case c(T, K, E, capacity_factor, masked, prioritised);
  EXPECT(c.run() == c.naive());
}

void test_dispatch() {
  for (const std::int64_t T : {0, 1, 6, 100, 5000}) {
    for (const std::int64_t E : {1, 2, 8}) {
      for (const std::int64_t K : {0, 1, 2, 8}) {
        if (K > E) continue;
        for (const double f : {-1.0, 0.05, 0.5, 1.0, 1.3, 1e300}) {
          for (int options = 0; options < 4; ++options) {
            check_dispatch(T, K, E, f, (options & 1) != 0, (options & 2) != 0);
          }
        }
      }
    }
  }

  Case one_expert(500, 1, 4, 1.0, false, false);
  std::fill(one_expert.expert_indices.begin(), one_expert.expert_indices.end(), 2);
  EXPECT((one_expert.run().offsets == std::vector<std::int32_t>{0, 0, 0, 125, 125}));

  // A token may name an expert more than once; without a limit nothing is dropped, with one the expert's rows
  // count.
  for (const double f : {-1.0, 0.7, 1.5, 4.0}) {
    Case repeated(60, 4, 6, f, true, true);
    for (std::int32_t& e : repeated.expert_indices) e = static_cast<std::int32_t>(integer(3)) - 1;
    EXPECT(repeated.run() == repeated.naive());
  }

  const Case many_experts(3000, 2, 6000, 1.0, true, true);  // more experts than slots in a block
  EXPECT(many_experts.run() == many_experts.naive());

  const Case c(9000, 2, 8, 1.0, true, true);
  set_threads(1);
  const Plan alone = c.run();
  set_threads(4);
  EXPECT(c.run() == alone);

  Case bad(4, 2, 3, -1.0, false, false);
  bad.expert_indices[5] = 3;
  expect_refused(bad, "expert_indices: expected values from -1 to 2, got 3 at position 5");
  bad.expert_indices[5] = -2;
  expect_refused(bad, "expert_indices: expected values from -1 to 2, got -2 at position 5");
  expect_refused(Case(4, 2, 3, 0.0, false, false), "capacity_factor: expected a positive number");
  expect_refused(Case(4, 2, 3, std::numeric_limits<double>::quiet_NaN(), false, false), "capacity_factor");
}

}  // namespace clipup::tests
