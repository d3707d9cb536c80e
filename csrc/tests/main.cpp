// Native tests of csrc/cpu: every stage against naive loops over random shapes, sizes of zero included. No
// framework, so that sanitizers need nothing but the compiler. Exit status 1 when an expectation fails.
//
//   native_tests [--quick] [--errors]      all tests, of the tier that CLIPUP_CPU_ISA names or the best one.
//                                          --quick: fewer cases; --errors: prints measured errors
//   native_tests --fuzz SECONDS [--seed N] random calls; a failing case by itself: --fuzz 0 --seed N
//   native_tests --int8-digest             a hash of the bits of int8 results, equal on tiers with equal
//                                          results
//   native_tests --tiers                   the tiers that this CPU has, one a line
//
// With --emulate-tiles, each of them takes a CPU without AMX for one that has it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "../cpu/kernels.h"
#include "../moe.h"
#include "arrays.h"
#include "tests.h"
#include "tile_emulation.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// gcc gives locals of 64 bytes, which are read by aligned instructions, a place of 32 on the heap where their
// use after return is to be found (gcc bug 110027).
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}

namespace clipup::tests {
void print_running_case();
}
// Called when the undefined-behaviour sanitizer has found something.
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report() {
  clipup::tests::print_running_case();
}

// The sanitizers' runtime, where there is one.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace clipup::tests {
namespace {

int expectations = 0;
int failures = 0;
std::int64_t elements = 0;
double worst_error = 0.0;  // of all sums before they are rounded, in units of what they may be off
std::string running;
std::string seed_of_case;
bool is_quick = false;
bool is_printing_errors = false;

}  // namespace

void print_running_case() {
  std::printf("ended in   [%s%s]\n", running.c_str(), seed_of_case.c_str());
  std::fflush(stdout);
}

void expect(bool holds, const char* file, int line, const char* text) {
  ++expectations;
  if (holds) return;
  if (++failures > 20) return;
  std::printf("%s:%d: failed: %s   [%s%s]\n", file, line, text, running.c_str(), seed_of_case.c_str());
  std::fflush(stdout);
}

void expect_close(const char* name, const Array& array, const Expected& expected, const char* file,
                  int line) {
  const auto size = static_cast<std::int64_t>(expected.value.size());
  count_elements(size);
  // Half the distance between neighbours, relative and, among subnormals, absolute. An instruction may flush
  // those.
  constexpr double kRounding[] = {0x1p-24, 0x1p-8, 0x1p-11};
  constexpr double kSmallest[] = {0x1p-125, 0x1p-125, 0x1p-25};
  const auto dtype = static_cast<int>(array.dtype());
  std::string text;
  for (std::int64_t i = 0; i < size && text.empty() && array.size() == size; ++i) {
    const double error = std::abs(array.at(i) - expected.value[i]);
    const double rounding = kRounding[dtype] * (std::abs(expected.value[i]) + expected.error[i]);
    const double allowed = expected.error[i] + rounding + kSmallest[dtype];
    if (error <= allowed) {
      if (error > rounding) worst_error = std::max(worst_error, (error - rounding) / (allowed - rounding));
      continue;
    }
    text = std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(array.at(i)) +
           ", expected " + std::to_string(expected.value[i]) + " within " + std::to_string(allowed);
  }
  if (array.size() != size) {
    text = std::string(name) + ": " + std::to_string(array.size()) + " elements, expected " +
           std::to_string(size);
  }
  expect(text.empty(), file, line, text.c_str());
}

void describe(const std::string& text) { running = text; }

void start_case(std::uint64_t seed) {
  seed_of_case = " --fuzz 0 --seed " + std::to_string(seed);
  std::seed_seq words{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)};
  random_engine().seed(words);
}

void set_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
}

bool quick() { return is_quick; }
bool print_errors() { return is_printing_errors; }
void count_elements(std::int64_t count) { elements += count; }

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

namespace {

// Prints the tiers of this CPU, as listed in the error for an unknown tier.
int print_tiers() {
  setenv("CLIPUP_CPU_ISA", "none", 1);
  const std::string message = refusal([] { instruction_tier(); });
  const std::size_t begin = message.find('(');
  const std::size_t end = message.find(')');
  if (!starts_with(message, "CLIPUP_CPU_ISA: expected one that this CPU has (") || end == std::string::npos) {
    std::fprintf(stderr, "CLIPUP_CPU_ISA=none was not refused by the names of the tiers: '%s'\n",
                 message.c_str());
    return 1;
  }
  for (const char c : message.substr(begin + 1, end - begin - 1)) {
    if (c != ' ') std::putchar(c == ',' ? '\n' : c);
  }
  std::putchar('\n');
  return 0;
}

int usage() {
  std::fprintf(stderr,
               "usage: native_tests [--emulate-tiles] [--quick] [--errors] | --fuzz SECONDS [--seed N] | "
               "--int8-digest | --tiers\n");
  return 2;
}

int run(int count, char** arguments) {
  double fuzz_seconds = -1.0;
  std::uint64_t seed = std::random_device{}();
  bool is_listing_tiers = false, is_digest = false;
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    if (option == "--emulate-tiles") {
      if (!emulate_tiles()) {
        std::fprintf(stderr, "--emulate-tiles needs x86-64 Linux and AVX-512\n");
        return 2;
      }
      tiles_are_emulated = true;
    } else if (option == "--tiers") {
      is_listing_tiers = true;
    } else if (option == "--int8-digest") {
      is_digest = true;
    } else if (option == "--quick") {
      is_quick = true;
    } else if (option == "--errors") {
      is_printing_errors = true;
    } else if (option == "--fuzz" && i + 1 < count) {
      fuzz_seconds = std::atof(arguments[++i]);
    } else if (option == "--seed" && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else {
      return usage();
    }
  }
  if (is_listing_tiers) return print_tiers();
  if (is_digest) return print_int8_digest(), 0;
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(print_running_case);

  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  if (fuzz_seconds >= 0.0) {
    fuzz(fuzz_seconds, seed);
  } else {
    const char* const wanted = std::getenv("CLIPUP_CPU_ISA");
    EXPECT(wanted == nullptr || *wanted == '\0' || std::string(wanted) == instruction_tier());
    test_router_logits();
    test_topk_gating();
    test_dispatch();
    test_rows();
    test_memory();
    test_activations();
    test_products();
    test_attention();
#ifdef CLIPUP_ASSEMBLES_AMX
    if (std::string(instruction_tier()) == "amx") test_tiles(tiles_are_emulated);
#endif
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  std::printf("%s: %d passed, %d failed, %lld elements compared, %.1f s\n", instruction_tier(),
              expectations - failures, failures, static_cast<long long>(elements), seconds);
  if (is_printing_errors) std::printf("largest error of a sum: %.2f of what is allowed\n", worst_error);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace clipup::tests

int main(int count, char** arguments) { return clipup::tests::run(count, arguments); }
