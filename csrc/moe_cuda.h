// The native interface on CUDA devices: the stages of moe.h that have kernels in csrc/cuda.
//
// Arrays and results are as in moe.h, with these differences:
//   - pointers are addresses on the current device, which the caller has made current;
//   - work is queued on `stream` (a cudaStream_t); the host never waits, so the calls can be captured in
//     a CUDA graph;
//   - sizes are checked, values on the device are not: an index outside its range counts as -1, and of the
//     rows below rows_used `combine_backward` writes those that row_of_choice names;
//   - a failed launch throws std::runtime_error.
// `permute` and `gather_sum` give the CPU's results to the bit; `combine_backward` adds up d_gates in another
// order, which depends on D alone.
#pragma once

#include <cstdint>

#include "moe.h"

namespace clipup::cuda {

void permute(const void* x, std::int64_t row_bytes, const std::int32_t* choice_of_row,
             const std::int32_t* rows_used, std::int64_t R, std::int64_t K, void* rows, void* stream);

void gather_sum(const void* rows, DType dtype, const std::int32_t* row_of_choice, const float* gates,
                std::int64_t T, std::int64_t K, std::int64_t D, void* y, void* stream);

void combine_backward(const void* dy, const void* rows, DType dtype, const float* gates,
                      const std::int32_t* row_of_choice, std::int64_t T, std::int64_t K, std::int64_t D,
                      const std::int32_t* rows_used, std::int64_t R, void* d_rows, float* d_gates,
                      void* stream);

}  // namespace clipup::cuda
