// Storage types of row elements: load to float, store from float. Branch-free integer code, so that loops
// over them vectorise on every CPU without special instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace clipup {

inline std::uint32_t float_bits(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(std::uint32_t bits) {
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float32 {
  using Storage = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

// The upper half of a float. Stores round to nearest, ties to even; a NaN stays a (quiet) NaN.
struct BFloat16 {
  using Storage = std::uint16_t;

  static float load(std::uint16_t value) { return bits_float(static_cast<std::uint32_t>(value) << 16U); }

  static std::uint16_t store(float value) {
    const std::uint32_t bits = float_bits(value);
    const std::uint32_t rounded = bits + 0x7FFFU + ((bits >> 16U) & 1U);
    const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    return static_cast<std::uint16_t>((is_nan ? bits | 0x400000U : rounded) >> 16U);
  }
};

// IEEE binary16: 5 exponent bits of bias 15, 10 mantissa bits. Stores round to nearest, ties to even, and
// beyond 65504 to infinity; a NaN stays a (quiet) NaN.
struct Float16 {
  using Storage = std::uint16_t;

  static float load(std::uint16_t value) {
    const std::uint32_t magnitude = value & 0x7FFFU;
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000U) << 16U;
    // Rebias the exponent by 127 - 15 = 112, once more where it is all ones.
    const std::uint32_t normal =
        (magnitude << 13U) + (112U << 23U) + (magnitude >= 0x7C00U ? 112U << 23U : 0U);
    // Below 2^-14 the value is magnitude * 2^-24: what the mantissa of 0.5 + it holds.
    const std::uint32_t subnormal = float_bits(bits_float(0x3F000000U | magnitude) - 0.5F);
    return bits_float(sign | (magnitude < 0x400U ? subnormal : normal));
  }

  static std::uint16_t store(float value) {
    const std::uint32_t bits = float_bits(value);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    const std::uint32_t normal = (magnitude - (112U << 23U) + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
    // The float addition rounds to multiples of 2^-24, the spacing of subnormals.
    const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5F) - 0x3F000000U;
    const std::uint32_t special = magnitude > 0x7F800000U ? 0x7E00U | ((magnitude >> 13U) & 0x3FFU) : 0x7C00U;
    const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;  // 2^-14
    const std::uint32_t result = magnitude >= 0x47800000U ? special : finite;   // 65536
    return static_cast<std::uint16_t>(result | ((bits >> 16U) & 0x8000U));
  }
};

}  // namespace clipup
