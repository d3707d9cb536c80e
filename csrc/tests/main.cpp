// Native tests of csrc/cpu: every stage against naive loops over random shapes, sizes of zero included. No
// framework, so that sanitizers need nothing but the compiler. Exit status 1 when an expectation fails.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "tests.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace clipup::tests {
namespace {

int expectations = 0;
int failures = 0;
std::string running;

}  // namespace

void expect(bool holds, const char* file, int line, const char* text) {
  ++expectations;
  if (holds) return;
  if (++failures <= 20) std::printf("%s:%d: failed: %s   [%s]\n", file, line, text, running.c_str());
}

void describe(const std::string& text) { running = text; }

void set_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
}

std::mt19937& random_engine() {
  static std::mt19937 engine(20250202);
  return engine;
}

float uniform() { return std::uniform_real_distribution<float>(0.0F, 1.0F)(random_engine()); }
float normal() { return std::normal_distribution<float>(0.0F, 1.0F)(random_engine()); }
std::int64_t integer(std::int64_t end) {
  return std::uniform_int_distribution<std::int64_t>(0, end - 1)(random_engine());
}

std::vector<std::int32_t> random_experts(std::int64_t T, std::int64_t K, std::int64_t E, float missing) {
  std::vector<std::int32_t> all(E);
  std::iota(all.begin(), all.end(), 0);
  std::vector<std::int32_t> experts;
  for (std::int64_t t = 0; t < T; ++t) {
    std::shuffle(all.begin(), all.end(), random_engine());
    for (std::int64_t k = 0; k < K; ++k) experts.push_back(uniform() < missing ? -1 : all[k]);
  }
  return experts;
}

}  // namespace clipup::tests

int main() {
  clipup::tests::test_routing();
  clipup::tests::test_dispatch();
  clipup::tests::test_rows();
  std::printf("%d passed, %d failed\n", clipup::tests::expectations - clipup::tests::failures,
              clipup::tests::failures);
  return clipup::tests::failures == 0 ? 0 : 1;
}
