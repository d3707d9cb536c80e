// Activations and their derivatives on vectors of floats. csrc/tests/test_activations.cpp bounds their errors
// over the whole range. `coarse` is within 1e-4 of the value, for results that are quantized to int8.
#pragma once

#include "simd.h"

namespace clipup {
namespace {

constexpr float kLog2E = 1.44269504F;

// exp(x) for x <= 88; 0 below -87.3, where floats become subnormal. x = n ln 2 + r with |r| <= ln 2 / 2; the
// polynomial is the minimax one of degree 6 with 1 + r in front (3e-9).
inline F32x exp_of(F32x x) {
  const F32x kMagic = splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const F32x shifted = x * kLog2E + kMagic;
  const F32x n = shifted - kMagic;
  const F32x r = (x - n * 0.693145752F) - n * 1.42860677e-6F;
  F32x p = splat(0.00138146128F);
  p = p * r + 0.00836871006F;
  p = p * r + 0.041668389F;
  p = p * r + 0.166665211F;
  p = p * r + 0.49999994F;
  p = p * (r * r) + (r + 1.0F);
  const F32x scaled = from_bits(bits(p) + (bits(shifted) << 23));
  return x < -87.3F ? F32x{} : scaled;
}

// 2^x to 3e-6, for x <= 0; 0 below -126. 2^r by the minimax polynomial of degree 4.
inline F32x coarse_exp2(F32x x) {
  F32x r;
  const F32x whole = integer_part(x, r);
  F32x p = splat(0.00957010221F);
  p = p * r + 0.0559178628F;
  p = p * r + 0.240247443F;
  p = p * r + 0.693121791F;
  p = p * r + 0.999999285F;
  return times_power_of_two(p, whole, x);
}

inline F32x coarse_exp(F32x x) { return coarse_exp2(x * kLog2E); }

// max(z, 0) - u q(u) with u = |z|, at most 4.5; u q(u) approximates max(z, 0) - activation(z), which is even.
template <int kTerms>
inline F32x coarse_even(F32x z, const float (&q)[kTerms]) {
  const F32x magnitude = from_bits(bits(z) & 0x7FFFFFFFU);
  const F32x u = magnitude < 4.5F ? magnitude : splat(4.5F);
  F32x p = splat(q[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) p = p * u + q[i];
  return (z <= 0.0F ? F32x{} : z) - u * p;
}

// z sigmoid(s), to 1e-4 of z.
inline F32x coarse_sigmoid_unit(F32x z, F32x s) {
  const F32x e = coarse_exp(from_bits(bits(s) | 0x80000000U));
  return z * ((s < 0.0F ? e : splat(1.0F)) * coarse_inverse(1.0F + e));
}

// Value and slope of an activation at z; the compiler drops the one that is not used.
struct ValueSlope {
  F32x value, slope;
};

// z * Phi(z), the normal distribution by erf. For u = |z|: Phi(-u) = exp(-u^2/2) * R(u), R by a minimax
// polynomial in t = 1 / (1 + 0.35 u), 3.2e-8 relative for u <= 14.5, beyond which Phi(-u) is 0 in floats.
struct Gelu {
  static ValueSlope at(F32x z) {
    const F32x magnitude = from_bits(bits(z) & 0x7FFFFFFFU);
    const F32x u = magnitude < 15.0F ? magnitude : splat(15.0F);
    const F32x density = exp_of(z * z * -0.5F);
    const F32x t = inverse(u * 0.35F + 1.0F);
    F32x p = splat(-0.0291578863F);
    p = p * t + 0.144030914F;
    p = p * t + -0.25583899F;
    p = p * t + 0.159319699F;
    p = p * t + -0.0232123509F;
    p = p * t + 0.105552502F;
    p = p * t + 0.119821288F;
    p = p * t + 0.139863521F;
    p = p * t + 0.139621302F;
    const F32x tail = density * (p * t);
    const F32x phi = z < 0.0F ? tail : 1.0F - tail;
    return {z * phi, phi + z * (density * 0.398942280F)};
  }
  static F32x coarse(F32x z) {
    constexpr float kTerms[] = {0.499744624F,    -0.397845685F,   0.00168042153F, 0.0521974377F,
                                0.0281657279F,   -0.0375072472F,  0.0148843499F,  -0.00296960096F,
                                0.000305004884F, -1.28937372e-05F};
    return coarse_even(z, kTerms);
  }
};

// z * sigmoid(s) with s a function of z and s' its derivative.
inline ValueSlope sigmoid_unit(F32x z, F32x s, F32x slope_of_s) {
  const F32x e = exp_of(from_bits(bits(s) | 0x80000000U));  // exp(-|s|)
  const F32x positive = inverse(1.0F + e);
  const F32x sigmoid = s < 0.0F ? e * positive : positive;
  const F32x complement = s < 0.0F ? positive : e * positive;
  return {z * sigmoid, sigmoid + z * (sigmoid * complement) * slope_of_s};
}

// (1 + tanh(w)) / 2 = sigmoid(2 w), w = sqrt(2 / pi) (z + 0.044715 z^3).
struct GeluTanh {
  static ValueSlope at(F32x z) {
    const F32x square = z * z;
    return sigmoid_unit(z, z * (square * 0.0713548163F + 1.59576912F), square * 0.214064449F + 1.59576912F);
  }
  static F32x coarse(F32x z) {
    constexpr float kTerms[] = {0.499660075F,    -0.396653146F,   -0.00333952508F, 0.0621689558F,
                                0.0183474813F,   -0.0322064534F,  0.0132232495F,   -0.0026669302F,
                                0.000275165687F, -1.16602305e-05F};
    return coarse_even(z, kTerms);
  }
};

struct QuickGelu {
  static ValueSlope at(F32x z) { return sigmoid_unit(z, z * 1.702F, splat(1.702F)); }
  static F32x coarse(F32x z) { return coarse_sigmoid_unit(z, z * 1.702F); }
};

struct Silu {
  static ValueSlope at(F32x z) { return sigmoid_unit(z, z, splat(1.0F)); }
  static F32x coarse(F32x z) { return coarse_sigmoid_unit(z, z); }
};

struct Relu {
  static ValueSlope at(F32x z) { return {z <= 0.0F ? F32x{} : z, z <= 0.0F ? F32x{} : splat(1.0F)}; }
  static F32x coarse(F32x z) { return at(z).value; }
};

}  // namespace
}  // namespace clipup
