// Argument checks that several stages share. Each throws std::invalid_argument with the name of the argument.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace clipup {

inline void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// The same with message(), which is composed only if it is needed: strings take longer than the work on a few
// tokens.
template <class Message>
auto check(bool holds, const Message& message) -> decltype(std::string(message()), void()) {
  if (!holds) throw std::invalid_argument(message());
}

inline void check_size(const char* name, std::int64_t size, std::int64_t smallest) {
  check(size >= smallest, [&] {
    return std::string(name) + ": expected at least " + std::to_string(smallest) + ", got " +
           std::to_string(size);
  });
}

// Row numbers are int32.
inline void check_row_count(std::int64_t T, std::int64_t K) {
  check_size("T", T, 0);
  check_size("K", K, 0);
  check(K == 0 || T <= std::numeric_limits<std::int32_t>::max() / K, [&] {
    return "T*K: expected fewer than 2^31 rows, got " + std::to_string(T) + " tokens of " +
           std::to_string(K) + " choices";
  });
}

// `permute` moves R rows of row_bytes bytes, K rows per token.
inline void check_permute_sizes(std::int64_t row_bytes, std::int64_t R, std::int64_t K) {
  check_size("row_bytes", row_bytes, 0);
  check_size("R", R, 0);
  check_size("K", K, R > 0 ? 1 : 0);
  check(R == 0 || R % K == 0,
        [&] { return "R: expected a multiple of K = " + std::to_string(K) + ", got " + std::to_string(R); });
  check_row_count(R, 1);
}

inline void check_pointer(const char* name, const void* pointer, std::int64_t elements) {
  check(pointer != nullptr || elements == 0, [&] {
    return std::string(name) + ": expected an array of " + std::to_string(elements) +
           " elements, got a null pointer";
  });
}

// Sizes of `topk_gating` and its gradient.
inline void check_gating_sizes(std::int64_t T, std::int64_t E, std::int64_t K) {
  check_size("E", E, 1);
  check_row_count(T, K);
  check(K <= E,
        [&] { return "K: expected at most E = " + std::to_string(E) + ", got " + std::to_string(K); });
}

inline void check_gating_outputs(std::int64_t T, std::int64_t E, std::int64_t K, const float* gates,
                                 const std::int32_t* expert_indices, const float* top_prob,
                                 const float* mean_probs, const float* z_loss,
                                 const std::int32_t* tokens_per_expert) {
  check_pointer("gates", gates, T * K);
  check_pointer("expert_indices", expert_indices, T * K);
  check_pointer("top_prob", top_prob, T);
  check_pointer("mean_probs", mean_probs, E);
  check_pointer("z_loss", z_loss, 1);
  check_pointer("tokens_per_expert", tokens_per_expert, K * E);
}

inline void check_dispatch_sizes(std::int64_t T, std::int64_t K, std::int64_t E) {
  check_size("E", E, 1);
  check_row_count(T, K);
}

inline void check_dispatch_arguments(std::int64_t R, std::int64_t E, double capacity_factor,
                                     const std::int32_t* expert_indices, const std::int32_t* offsets,
                                     const std::int32_t* choice_of_row, const std::int32_t* row_of_choice) {
  check(capacity_factor < 0.0 || capacity_factor > 0.0, [&] {
    return "capacity_factor: expected a positive number, or a negative one for no limit, got " +
           std::to_string(capacity_factor);
  });
  check_pointer("expert_indices", expert_indices, R);
  check_pointer("offsets", offsets, E + 1);
  check_pointer("choice_of_row", choice_of_row, R);
  check_pointer("row_of_choice", row_of_choice, R);
}

// Throws unless lowest <= values[i] < end for every i.
inline void check_values(const char* name, const std::int32_t* values, std::int64_t count,
                         std::int32_t lowest, std::int64_t end) {
  const auto* bad = std::find_if(values, values + count,
                                 [=](std::int32_t value) { return value < lowest || value >= end; });
  if (bad == values + count) return;
  throw std::invalid_argument(std::string(name) + ": expected values from " + std::to_string(lowest) +
                              " to " + std::to_string(end - 1) + ", got " + std::to_string(*bad) +
                              " at position " + std::to_string(bad - values));
}

}  // namespace clipup
