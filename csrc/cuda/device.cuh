// Shared by all kernel files: launching, warp size, and sums over a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../checks.h"
#include "../moe_cuda.h"

namespace clipup::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

inline void check_most_experts(std::int64_t E) {
  check(E <= kMostExperts, [&] {
    return "E: expected at most " + std::to_string(kMostExperts) + " on CUDA, got " + std::to_string(E);
  });
}

// Queues kernel(arguments...) on `stream`, for `blocks` blocks of `threads` threads; throws when that fails.
// `threads` are whole warps.
template <class... Parameters, class... Arguments>
void launch(const char* stage, void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.blockDim.x = static_cast<unsigned>(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // clears the error, which is reported here
    throw std::runtime_error(std::string(stage) + ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

// The sum of `value` over the block, in every thread; every thread of the block must call it. Sums of
// integers do not depend on the order of the additions.
__device__ inline int block_total(int value) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (value != 0) atomicAdd(&total, value);
  __syncthreads();
  const int result = total;
  __syncthreads();  // `total` is free for the next call
  return result;
}

}  // namespace clipup::cuda
