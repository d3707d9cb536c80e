// Dispatch: a stable counting sort of (token, choice) pairs by expert, in slot order, cut at the capacity.
//
// Slot s = k*T + i is the k-th choice of the i-th token in serving order. Slots are counted by block and
// expert, the counts summed over the blocks, and every block then knows the first place of each expert.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../moe.h"
#include "parallel.h"

namespace clipup {
namespace {

constexpr std::int64_t kBlock =
    4096;  // slots counted together; never fewer than E, so counts fit beside the slots

// Order-reversing map to unsigned: the higher the priority the smaller the key, -0 like 0, NaN like
// minus infinity.
std::uint64_t descending_key(float priority) {
  const float ranked = std::isnan(priority) ? -std::numeric_limits<float>::infinity() : priority + 0.0F;
  std::uint32_t bits = 0;
  std::memcpy(&bits, &ranked, sizeof bits);
  return (bits & 0x80000000U) != 0 ? bits : ~(bits | 0x80000000U);
}

// Tokens in the order in which they are served.
std::vector<std::int32_t> serving_order(const float* priority, std::int64_t T) {
  std::vector<std::int32_t> order(T);
  if (priority == nullptr) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  std::vector<std::uint64_t> keys(T);  // the position below the key makes the sort stable
  for (std::int64_t t = 0; t < T; ++t)
    keys[t] = descending_key(priority[t]) << 32U | static_cast<std::uint64_t>(t);
  std::sort(keys.begin(), keys.end());
  for (std::int64_t i = 0; i < T; ++i) order[i] = static_cast<std::int32_t>(keys[i] & 0xFFFFFFFFU);
  return order;
}

// Rows that an expert may take: ceil(f*K*N/E), at most all.
std::int64_t expert_capacity(const std::int32_t* expert_indices, const std::uint8_t* mask, std::int64_t T,
                             std::int64_t K, std::int64_t E, double capacity_factor) {
  if (capacity_factor < 0.0) return T * K;
  std::int64_t num_routed = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    const bool routed = std::any_of(expert_indices + t * K, expert_indices + (t + 1) * K,
                                    [](std::int32_t e) { return e >= 0; });
    num_routed += routed && (mask == nullptr || mask[t] != 0) ? 1 : 0;
  }
  const auto tokens = static_cast<double>(num_routed);
  const double capacity =
      std::ceil(capacity_factor * static_cast<double>(K) * tokens / static_cast<double>(E));
  // In this order a NaN, infinity times no token, leaves the limit.
  return static_cast<std::int64_t>(std::min(tokens * static_cast<double>(K), capacity));
}

}  // namespace

void dispatch(const std::int32_t* expert_indices, const std::uint8_t* mask, const float* priority,
              std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, std::int32_t* offsets,
              std::int32_t* choice_of_row, std::int32_t* row_of_choice) {
  const std::int64_t R = T * K;
  check_dispatch_sizes(T, K, E);
  check_dispatch_arguments(R, E, capacity_factor, expert_indices, offsets, choice_of_row, row_of_choice);
  check_values("expert_indices", expert_indices, R, -1, E);

  const std::vector<std::int32_t> order = serving_order(priority, T);
  const std::int64_t capacity = expert_capacity(expert_indices, mask, T, K, E, capacity_factor);
  const std::int64_t block_size = std::max(kBlock, E);
  const std::int64_t blocks = ceil_div(R, block_size);

  // Calls visit(choice, expert) for the slots of a block, in order; expert -1: none, or a masked token.
  const auto for_each_slot = [&](std::int64_t block, const auto& visit) {
    const std::int64_t begin = block * block_size;
    const std::int64_t end = std::min(R, begin + block_size);
    for (std::int64_t slot = begin, k = begin / T, i = begin % T; slot < end; ++slot) {
      const std::int64_t t = order[i];
      visit(t * K + k, mask == nullptr || mask[t] != 0 ? expert_indices[t * K + k] : -1);
      if (++i == T) i = 0, ++k;
    }
  };

  std::vector<std::int32_t> places(blocks *
                                   E);  // per block and expert: first the count, then the first place
  parallel_for(blocks, 2, [&](std::int64_t block) {
    for_each_slot(block, [&](std::int64_t, std::int32_t e) {
      if (e >= 0) ++places[block * E + e];
    });
  });

  offsets[0] = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    std::int32_t place = 0;
    for (std::int64_t block = 0; block < blocks; ++block) {
      place += std::exchange(places[block * E + e], place);
    }
    offsets[e + 1] = offsets[e] + static_cast<std::int32_t>(std::min<std::int64_t>(place, capacity));
  }

  parallel_for(blocks, 2, [&](std::int64_t block) {
    for_each_slot(block, [&](std::int64_t choice, std::int32_t e) {
      const std::int32_t place = e >= 0 ? places[block * E + e]++ : 0;
      if (e < 0 || place >= capacity) {
        row_of_choice[choice] = -1;
        return;
      }
      row_of_choice[choice] = offsets[e] + place;
      choice_of_row[offsets[e] + place] = static_cast<std::int32_t>(choice);
    });
  });
  std::fill(choice_of_row + offsets[E], choice_of_row + R, -1);
}

}  // namespace clipup
