// The router's products: few outputs per token, so that time goes into reading the tokens, once.
#pragma once

#include "operands.h"

namespace clipup {
namespace {

// Tokens and experts per tile: their sums fill half of the registers.
constexpr int kRouterGroup = kLanes == 16 ? 4 : 2;

template <class Storage, int kRows, int kExperts>
void logits_of(const typename Storage::Element* x, const float* weight, std::int64_t D, std::int64_t E,
               float* logits) {
  F32x sum[kRows][kExperts] = {};
  const auto add = [&](std::int64_t d, std::int64_t left) {
    F32x row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) row[i] = load_some<Storage>(x + i * D + d, left);
#pragma GCC unroll 4
    for (int e = 0; e < kExperts; ++e) {
      const F32x expert = load_some<Float32>(weight + e * D + d, left);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][e] = multiply_add(row[i], expert, sum[i][e]);
    }
  };
  std::int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) add(d, kLanes);
  if (d < D) add(d, D - d);
  for (int i = 0; i < kRows; ++i) {
    for (int e = 0; e < kExperts; ++e) logits[i * E + e] = sum_of(sum[i][e]);
  }
}

// The order of a logit's sum does not depend on the tile's other tokens and experts.
template <class Storage, int kRows>
void logits_of_rows(const typename Storage::Element* x, const float* weight, std::int64_t D, std::int64_t E,
                    float* logits) {
  std::int64_t e = 0;
  for (; e + kRouterGroup <= E; e += kRouterGroup) {
    logits_of<Storage, kRows, kRouterGroup>(x, weight + e * D, D, E, logits + e);
  }
  for (; e < E; ++e) logits_of<Storage, kRows, 1>(x, weight + e * D, D, E, logits + e);
}

template <class Storage>
void router_logits(const void* x, std::int64_t rows, const float* weight, std::int64_t D, std::int64_t E,
                   float* logits) {
  const auto* from = static_cast<const typename Storage::Element*>(x);
  std::int64_t i = 0;
  for (; i + kRouterGroup <= rows; i += kRouterGroup) {
    logits_of_rows<Storage, kRouterGroup>(from + i * D, weight, D, E, logits + i * E);
  }
  for (; i < rows; ++i) logits_of_rows<Storage, 1>(from + i * D, weight, D, E, logits + i * E);
}

template <class Storage, int kRows>
void input_gradient_of(const float* d_logits, const float* weight, std::int64_t D, std::int64_t E,
                       typename Storage::Element* d_x) {
  for (std::int64_t d = 0; d < D; d += kPanel) {
    const std::int64_t left = D - d;
    F32x sum[kRows][2] = {};
    for (std::int64_t e = 0; e < E; ++e) {
      const F32x low = load_some<Float32>(weight + e * D + d, left);
      const F32x high = load_some<Float32>(weight + e * D + d + kLanes, left - kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const F32x slope = splat(d_logits[i * E + e]);
        sum[i][0] = multiply_add(low, slope, sum[i][0]);
        sum[i][1] = multiply_add(high, slope, sum[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      store_some<Storage>(d_x + i * D + d, sum[i][0], left);
      if (left > kLanes) store_some<Storage>(d_x + i * D + d + kLanes, sum[i][1], left - kLanes);
    }
  }
}

template <class Storage>
void router_input_gradient(const float* d_logits, std::int64_t rows, const float* weight, std::int64_t D,
                           std::int64_t E, void* d_x) {
  auto* const to = static_cast<typename Storage::Element*>(d_x);
  std::int64_t i = 0;
  for (; i + kRouterGroup <= rows; i += kRouterGroup) {
    input_gradient_of<Storage, kRouterGroup>(d_logits + i * E, weight, D, E, to + i * D);
  }
  for (; i < rows; ++i) input_gradient_of<Storage, 1>(d_logits + i * E, weight, D, E, to + i * D);
}

constexpr int kRouterVectors = 4;  // columns of x that a pass over its rows sums, in vectors
static_assert(kRouterVectors * kLanes <= kRouterColumns && kRouterColumns % (kRouterVectors * kLanes) == 0);

template <class Storage, int kExperts>
void add_weight_gradient(const typename Storage::Element* x, const std::uint8_t* mask, const float* d_logits,
                         std::int64_t T, std::int64_t D, std::int64_t E, std::int64_t columns,
                         float* d_weight) {
  F32x sum[kExperts][kRouterVectors] = {};
  for (std::int64_t t = 0; t < T; ++t) {
    if (mask != nullptr && mask[t] == 0) continue;
    F32x row[kRouterVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kRouterVectors; ++v) {
      row[v] = load_some<Storage>(x + t * D + v * kLanes, columns - v * kLanes);
    }
#pragma GCC unroll 4
    for (int e = 0; e < kExperts; ++e) {
      const F32x slope = splat(d_logits[t * E + e]);
#pragma GCC unroll 4
      for (int v = 0; v < kRouterVectors; ++v) sum[e][v] = multiply_add(row[v], slope, sum[e][v]);
    }
  }
  for (int e = 0; e < kExperts; ++e) {
    for (int v = 0; v < kRouterVectors; ++v) {
      float* const to = d_weight + e * D + v * kLanes;
      const std::int64_t left = columns - v * kLanes;
      if (left > 0) store_some<Float32>(to, load_some<Float32>(to, left) + sum[e][v], left);
    }
  }
}

template <class Storage>
void router_weight_gradient(const void* x, const std::uint8_t* mask, const float* d_logits, std::int64_t T,
                            std::int64_t D, std::int64_t E, std::int64_t columns, float* d_weight) {
  constexpr std::int64_t kTokens =
      256;  // summed at a time: they stay in the cache, and rounding errors do not accumulate
  constexpr std::int64_t kColumns = kRouterVectors * kLanes;
  const auto* from = static_cast<const typename Storage::Element*>(x);
  for (std::int64_t e = 0; e < E; ++e) {
    for (std::int64_t d = 0; d < columns; ++d) d_weight[e * D + d] = 0.0F;
  }
  for (std::int64_t t = 0; t < T; t += kTokens) {
    const std::int64_t tokens = smaller(kTokens, T - t);
    const std::uint8_t* const mask_t = mask == nullptr ? nullptr : mask + t;
    for (std::int64_t d = 0; d < columns; d += kColumns) {
      const std::int64_t width = smaller(kColumns, columns - d);
      std::int64_t e = 0;
      for (; e + kRouterGroup <= E; e += kRouterGroup) {
        add_weight_gradient<Storage, kRouterGroup>(from + t * D + d, mask_t, d_logits + t * E + e, tokens, D,
                                                   E, width, d_weight + e * D + d);
      }
      for (; e < E; ++e) {
        add_weight_gradient<Storage, 1>(from + t * D + d, mask_t, d_logits + t * E + e, tokens, D, E, width,
                                        d_weight + e * D + d);
      }
    }
  }
}

}  // namespace
}  // namespace clipup
