// Shared by the native tests: expectations, random numbers, and the arrays that the stages write.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../moe.h"

namespace clipup::tests {

// Counts and prints a failure, with the case that was running.
void expect(bool holds, const char* file, int line, const char* text);
#define EXPECT(condition) ::clipup::tests::expect((condition), __FILE__, __LINE__, #condition)

// Names the current case for later failures, and for a sanitizer that ends the process.
void describe(const std::string& text);

// Seeds the random numbers; later failures print the seed.
void start_case(std::uint64_t seed);

// Sets the number of threads that the stages use.
void set_threads(int threads);

// Fewer cases, for an emulated CPU.
bool quick();

// Whether to print measured errors beside their bounds.
bool print_errors();

// Counts compared elements, for the summary.
void count_elements(std::int64_t count);

std::mt19937& random_engine();
float uniform();                         // [0, 1)
float normal();                          // mean 0, standard deviation 1
std::int64_t integer(std::int64_t end);  // [0, end)

inline bool close(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance * (1.0 + std::abs(b));
}

// The message of the std::invalid_argument that `function` throws; empty when it throws none.
template <class Function>
std::string refusal(const Function& function) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

inline bool starts_with(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

// A routing plan filled with guard values, so that unwritten elements show.
struct Plan {
  static constexpr std::int32_t kUnwritten = -12345;

  Plan(std::int64_t T, std::int64_t K, std::int64_t E)
      : offsets(E + 1, kUnwritten), choice_of_row(T * K, kUnwritten), row_of_choice(T * K, kUnwritten) {}

  bool operator==(const Plan& other) const {
    return offsets == other.offsets && choice_of_row == other.choice_of_row &&
           row_of_choice == other.row_of_choice;
  }

  std::vector<std::int32_t> offsets;
  std::vector<std::int32_t> choice_of_row;
  std::vector<std::int32_t> row_of_choice;
};

// K distinct random experts for each of T tokens; each is -1 with probability `missing`.
std::vector<std::int32_t> random_experts(std::int64_t T, std::int64_t K, std::int64_t E, float missing);

void test_router_logits();
void test_topk_gating();
void test_dispatch();
void test_rows();
void test_activations();
void test_products();
void test_attention();
void test_memory();
void test_tiles(bool emulated);

struct AttentionShape {
  enum { kNone, kOfAll, kOfEachHead };
  DType dtype = DType::kFloat32;
  std::int64_t B = 1, L = 1, heads = 1, d = 1;
  int mask = kNone;
  std::int64_t shift = 0;  // elements after a cache line's beginning
};

// Single cases of these tests, for the fuzzer.
void check_dispatch(std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, bool masked,
                    bool prioritised);
void check_rows(std::int64_t T, std::int64_t K, std::int64_t D);
void check_rows_refusals();
void check_attention(const AttentionShape& shape);
void check_router_logits(std::int64_t T, std::int64_t D, std::int64_t E, bool masked);

// Random cases for `seconds`, at least one; case i has the seed `seed` + i.
void fuzz(double seconds, std::uint64_t seed);

// Prints a hash of the bits of int8 results (int8_digest.cpp).
void print_int8_digest();

}  // namespace clipup::tests
