// Packing weights once, in the order in which the forward products read them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "../checks.h"
#include "element.h"
#include "expert_rows.h"

namespace clipup {
namespace {

void check_sizes(DType dtype, std::int64_t E, std::int64_t O, std::int64_t I, PackedType type) {
  check_dtype(dtype);
  check_size("E", E, 0);
  check_size("O", O, 0);
  check_size("I", I, 0);
  check_packed_type(type, I);
}

float value_at(const void* weight, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(weight)[index];
    case DType::kBFloat16:
      return BFloat16::load(static_cast<const std::uint16_t*>(weight)[index]);
    default:
      return Float16::load(static_cast<const std::uint16_t*>(weight)[index]);
  }
}

// One output channel of I elements, from element `first` on, over the input scales, as bytes `stride` words
// apart. Its scale is NaN if it has a value that is not finite.
void quantize_channel(const void* weight, DType dtype, std::int64_t first, std::int64_t I,
                      const float* input_scale, std::int64_t stride, std::int8_t* bytes, float& scale,
                      std::int32_t& sum) {
  const auto value_of = [&](std::int64_t i) { return value_at(weight, dtype, first + i) / input_scale[i]; };
  constexpr float kMost = 127.0F;
  constexpr float kSmallest = 1e-30F;  // as for rows (int8_products.h)
  float range = 0.0F;
  bool finite = true;
  for (std::int64_t i = 0; i < I; ++i) {
    const float magnitude = std::fabs(value_of(i));
    finite = finite && std::isfinite(magnitude);
    range = std::max(range, magnitude);
  }
  const bool zero = !finite || range <= kSmallest;
  const double inverse = zero ? 0.0 : static_cast<double>(kMost / range);
  scale = finite ? (zero ? 0.0F : range / kMost) : std::numeric_limits<float>::quiet_NaN();
  sum = 0;
  for (std::int64_t i = 0; i < I; ++i) {
    const double value = zero ? 0.0 : value_of(i) * inverse;
    const auto q = static_cast<std::int8_t>(std::nearbyint(value));
    bytes[i / 4 * stride * 4 + i % 4] = q;
    sum += q;
  }
}

void pack_int8(DType dtype, const void* weight, std::int64_t E, std::int64_t O, std::int64_t I, void* packed,
               const float* input_scale, const float* input_offset) {
  const Kernels& ks = kernels();
  const std::int64_t words = ceil_div(I, ks.int8.per_word);
  const std::int64_t panels = ceil_div(O, ks.panel);
  Word* const first = static_cast<Word*>(packed);
  auto* const scales = reinterpret_cast<float*>(first + E * words * panels * ks.panel);
  auto* const sums = reinterpret_cast<std::int32_t*>(scales) + E * panels * ks.panel;
  float* const inputs = scales + 2 * E * panels * ks.panel;
  const std::int64_t input_stride = int8_input_stride(I);
  for (std::int64_t e = 0; e < E; ++e) {
    float* const to = inputs + e * 2 * input_stride;
    float* const shifts = to + input_stride;
    std::fill_n(to, input_stride, 1.0F);
    std::fill_n(shifts, input_stride, 0.0F);
    if (input_scale != nullptr) std::copy_n(input_scale + e * I, I, to);
    for (std::int64_t i = 0; input_offset != nullptr && i < I; ++i)
      shifts[i] = -input_offset[e * I + i] * to[i];
  }
  parallel_tasks(E * panels, [&](std::int64_t task, std::int64_t) {
    Word* const b_panel = first + task * words * ks.panel;
    std::fill_n(b_panel, words * ks.panel, 0);
    for (std::int64_t column = 0; column < ks.panel; ++column) {
      const std::int64_t at = task * ks.panel + column;
      const std::int64_t channel = task % panels * ks.panel + column;
      scales[at] = 0.0F;
      sums[at] = 0;
      if (channel >= O) continue;
      quantize_channel(weight, dtype, (task / panels * O + channel) * I, I,
                       inputs + task / panels * 2 * input_stride, ks.panel,
                       reinterpret_cast<std::int8_t*>(b_panel + column), scales[at], sums[at]);
    }
  });
}

}  // namespace

std::int64_t packed_weight_bytes(DType dtype, std::int64_t E, std::int64_t O, std::int64_t I,
                                 PackedType type) {
  check_sizes(dtype, E, O, I, type);
  const Kernels& ks = kernels();
  std::int64_t words = E * packed_words(ks, ks.products(dtype, type), O, I);
  if (type == PackedType::kInt8) words += E * 2 * (round_up(O, ks.panel) + int8_input_stride(I));
  return words * static_cast<std::int64_t>(sizeof(Word));
}

void pack_weight(DType dtype, const void* weight, std::int64_t E, std::int64_t O, std::int64_t I,
                 void* packed, PackedType type, const float* input_scale, const float* input_offset) {
  check_sizes(dtype, E, O, I, type);
  check_pointer("weight", weight, E * O * I);
  check_pointer("packed", packed, E * O * I);
  check((input_scale == nullptr && input_offset == nullptr) || type == PackedType::kInt8,
        "input_scale and input_offset: expected none for an exact weight");
  for (std::int64_t i = 0; input_scale != nullptr && i < E * I; ++i) {
    check(std::isnormal(input_scale[i]) && input_scale[i] > 0.0F,
          [&] { return "input_scale: expected positive numbers, got " + std::to_string(input_scale[i]); });
  }
  for (std::int64_t i = 0; input_offset != nullptr && i < E * I; ++i) {
    check(std::isfinite(input_offset[i]),
          [&] { return "input_offset: expected finite numbers, got " + std::to_string(input_offset[i]); });
  }
  if (type == PackedType::kInt8) return pack_int8(dtype, weight, E, O, I, packed, input_scale, input_offset);
  const Kernels& ks = kernels();
  const std::int64_t words = ceil_div(I, ks.of(dtype).per_word);
  const std::int64_t panels = ceil_div(O, ks.panel);
  parallel_tasks(E * panels, [&](std::int64_t task, std::int64_t) {
    const Right right = Matrices{dtype, true, O, I, weight, O * I}.of(ks, task / panels);
    Word* const b_panel = static_cast<Word*>(packed) + task * words * ks.panel;
    pack_right(right, ks, task % panels, 1, 0, words, b_panel);
  });
}

PackedLayout packed_layout(DType dtype, PackedType type) {
  check_dtype(dtype);
  check_packed_type(type, 0);
  const Kernels& ks = kernels();
  return {ks.panel, ks.products(dtype, type).per_word};
}

}  // namespace clipup
