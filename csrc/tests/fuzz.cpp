// Random calls of the native interface, right ones against naive loops and wrong ones that have to be
// refused. Every case is made from its own seed, so that a failing one can be run alone: native_tests --fuzz
// 0 --seed N.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "layers.h"
#include "tests.h"

namespace clipup::tests {
namespace {

std::int64_t random_size(std::int64_t most) {
  const float kind = uniform();
  if (kind < 0.1F) return integer(2);
  return integer(most + 1);
}

void fuzz_dispatch() {
  const std::int64_t E = 1 + integer(uniform() < 0.05F ? 9000 : 12);
  const std::int64_t K = integer(std::min<std::int64_t>(E, 4) + 1);
  const double f = uniform() < 0.3F ? -1.0 : 2.0 * uniform() + 1e-3;
  check_dispatch(random_size(uniform() < 0.1F ? 9000 : 200), K, E, f, uniform() < 0.5F, uniform() < 0.5F);
}

LinearShape random_linear() {
  LayerShape random = random_shape(120, 60);
  if (uniform() < 0.03F) random.T = 2000 + integer(500), random.D %= 20, random.H %= 20;
  LinearShape shape;
  shape.dtype = random.dtype;
  shape.E = random.E;
  shape.R = random.E == 0 ? 0 : random.T;
  shape.O = random.D;
  shape.I = random.H;
  shape.bias = uniform() < 0.5F;
  shape.nulls = random.nulls;
  shape.shift = random.shift;
  return shape;
}

LayerShape random_layer() {
  LayerShape shape = random_shape(100, 50);
  if (uniform() < 0.02F && shape.E > 0) {  // pieces of an expert
    shape.T = 2100 + integer(300);
    shape.K = 1;
    shape.D %= 20;
    shape.H %= 20;
    shape.expert = 0;
  }
  return shape;
}

void fuzz_attention() {
  check_attention({DType{static_cast<int>(integer(3))}, random_size(3), random_size(90), random_size(4),
                   random_size(70), static_cast<int>(integer(3)), integer(8)});
}

void fuzz_case() {
  set_threads(1 + static_cast<int>(integer(3)));
  switch (integer(12)) {
    case 0:
      return fuzz_dispatch();
    case 1:
      return check_rows(random_size(150), integer(6), random_size(70));
    case 2:
      return check_rows_refusals();
    case 3:
      return check_layer_refusals(random_layer());
    case 4:
      return check_linear_refusals(random_linear());
    case 5:
      return check_router_logits(random_size(150), random_size(150), random_size(20), uniform() < 0.5F);
    case 6:
    case 7:
      return check_linear(random_linear());
    case 8:
      return fuzz_attention();
    default:
      return Layer(random_layer()).check();
  }
}

}  // namespace

void fuzz(double seconds, std::uint64_t seed) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::printf("fuzzing %s for %g seconds from seed %llu\n", instruction_tier(), seconds,
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::uint64_t cases = 0;
  do {
    start_case(seed + cases);
    fuzz_case();
    ++cases;
  } while (Clock::now() < end);
  std::printf("%llu cases, the last of seed %llu\n", static_cast<unsigned long long>(cases),
              static_cast<unsigned long long>(seed + cases - 1));
}

}  // namespace clipup::tests
