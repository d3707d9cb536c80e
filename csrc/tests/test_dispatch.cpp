// Dispatch against lists: one list an expert, filled in slot order until it holds the capacity.
#include <algorithm>
#include <limits>
#include <numeric>

#include "../moe.h"
#include "tests.h"

namespace clipup::tests {
namespace {

struct Case {
  std::int64_t T, K, E;
  double capacity_factor;
  std::vector<std::int32_t> experts;
  std::vector<std::uint8_t> mask;
  std::vector<float> priority;

  Case(std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, bool masked, bool prioritised)
      : T(T), K(K), E(E), capacity_factor(capacity_factor), experts(random_experts(T, K, E, 0.1F)) {
    for (std::int64_t t = 0; masked && t < T; ++t) mask.push_back(uniform() < 0.7F ? 1 : 0);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> ties = {-1.5F, -0.0F, 0.0F, 0.25F, 2.0F, kNaN, kInfinity, -kInfinity};
    for (std::int64_t t = 0; prioritised && t < T; ++t) priority.push_back(ties[integer(ties.size())]);
    describe("T=" + std::to_string(T) + " K=" + std::to_string(K) + " E=" + std::to_string(E) +
             " f=" + std::to_string(capacity_factor) + " masked=" + std::to_string(masked) +
             " prioritised=" + std::to_string(prioritised));
  }

  bool takes_part(std::int64_t t) const { return mask.empty() || mask[t] != 0; }

  Plan run() const {
    Plan plan(T, K, E);
    dispatch(experts.data(), mask.empty() ? nullptr : mask.data(),
             priority.empty() ? nullptr : priority.data(), T, K, E, capacity_factor, plan.offsets.data(),
             plan.choice_of_row.data(), plan.row_of_choice.data());
    return plan;
  }

  Plan naive() const {
    const auto ranked = [](float p) { return std::isnan(p) ? -std::numeric_limits<float>::infinity() : p; };
    std::vector<std::int64_t> order(T);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      if (priority.empty()) return false;
      return ranked(priority[a]) > ranked(priority[b]);
    });
    std::int64_t participating = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      bool routed = false;
      for (std::int64_t k = 0; k < K; ++k) routed = routed || experts[t * K + k] >= 0;
      participating += routed && takes_part(t) ? 1 : 0;
    }
    double capacity = std::ceil(capacity_factor * K * participating / E);
    if (capacity_factor < 0) capacity = std::numeric_limits<double>::infinity();

    std::vector<std::vector<std::int32_t>> rows(E);
    for (std::int64_t k = 0; k < K; ++k) {
      for (const std::int64_t t : order) {
        const std::int32_t e = experts[t * K + k];
        if (takes_part(t) && e >= 0 && rows[e].size() < capacity) rows[e].push_back(t * K + k);
      }
    }
    Plan plan(T, K, E);
    std::fill(plan.choice_of_row.begin(), plan.choice_of_row.end(), -1);
    std::fill(plan.row_of_choice.begin(), plan.row_of_choice.end(), -1);
    std::int32_t row = 0;
    plan.offsets[0] = 0;
    for (std::int64_t e = 0; e < E; ++e) {
      for (const std::int32_t choice : rows[e]) {
        plan.row_of_choice[choice] = row;
        plan.choice_of_row[row++] = choice;
      }
      plan.offsets[e + 1] = row;
    }
    return plan;
  }
};

void expect_refused(const Case& c, const std::string& message) {
  Plan plan(c.T, c.K, c.E);
  const std::string refused = refusal([&] {
    dispatch(c.experts.data(), nullptr, nullptr, c.T, c.K, c.E, c.capacity_factor, plan.offsets.data(),
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
  std::fill(one_expert.experts.begin(), one_expert.experts.end(), 2);
  EXPECT((one_expert.run().offsets == std::vector<std::int32_t>{0, 0, 0, 125, 125}));

  // A token may name an expert more than once; without a limit nothing is dropped, with one the expert's rows count.
  for (const double f : {-1.0, 0.7, 1.5, 4.0}) {
    Case repeated(60, 4, 6, f, true, true);
    for (std::int32_t& e : repeated.experts) e = static_cast<std::int32_t>(integer(3)) - 1;
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
  bad.experts[5] = 3;
  expect_refused(bad, "experts: expected values from -1 to 2, got 3 at position 5");
  bad.experts[5] = -2;
  expect_refused(bad, "experts: expected values from -1 to 2, got -2 at position 5");
  expect_refused(Case(4, 2, 3, 0.0, false, false), "capacity_factor: expected a positive number");
  expect_refused(Case(4, 2, 3, std::numeric_limits<double>::quiet_NaN(), false, false), "capacity_factor");
}

}  // namespace clipup::tests
