// Storage types of row elements on the device, and packs of them that one instruction loads.
#pragma once

#include "device.cuh"

namespace clipup::cuda {

__device__ inline float load(float value) { return value; }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float load(__half value) { return __half2float(value); }

// Round to nearest, ties to even.
__device__ inline void store(float value, float& to) { to = value; }
__device__ inline void store(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ inline void store(float value, __half& to) { to = __float2half_rn(value); }

// `kCount` neighbours, aligned so that they move in one piece.
template <class S, int kCount>
struct alignas(sizeof(S) * kCount) Pack {
  S values[kCount];
};

// A product and a sum that are never fused, so that they round as the CPU's do.
__device__ inline float multiply_add(float a, float b, float sum) { return __fadd_rn(sum, __fmul_rn(a, b)); }

}  // namespace clipup::cuda
