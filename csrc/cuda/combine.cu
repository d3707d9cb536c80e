// Permute, gather-sum and the gradient of combine on CUDA devices: one block a row or a token, memory-bound.
//
// No atomics and no sum whose order could change: results are the same to the bit from run to run.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../checks.h"
#include "../moe_cuda.h"
#include "device.cuh"
#include "element.cuh"

namespace clipup::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kPackBytes = 16;  // the widest load

// rows[r] = x[choice_of_row[r] / K], 0 from row *rows_used on. A row is `words` words; block r writes row r.
template <class Word>
__global__ void permute_kernel(const Word* __restrict__ x, std::int64_t words,
                               const std::int32_t* __restrict__ choice_of_row,
                               const std::int32_t* __restrict__ rows_used, std::int32_t R, std::int32_t K,
                               Word* __restrict__ rows) {
  const std::int64_t r = blockIdx.x;
  const std::int32_t choice = r < *rows_used ? choice_of_row[r] : -1;
  const bool used = choice >= 0 && choice < R;
  const Word* from = x + (used ? choice / K : 0) * words;
  Word* to = rows + r * words;
  for (std::int64_t w = threadIdx.x; w < words; w += blockDim.x) to[w] = used ? from[w] : Word{};
}

// y[t] = sum over k of gate * row, k ascending; block t writes token t, a thread kCount columns at a time.
template <class S, int kCount>
__global__ void gather_sum_kernel(const S* __restrict__ rows, const std::int32_t* __restrict__ row_of_choice,
                                  const float* __restrict__ gates, std::int64_t R, std::int64_t K,
                                  std::int64_t D, S* __restrict__ y) {
  using Columns = Pack<S, kCount>;
  const std::int64_t t = blockIdx.x;
  for (std::int64_t d = static_cast<std::int64_t>(threadIdx.x) * kCount; d < D; d += blockDim.x * kCount) {
    float sums[kCount] = {};
    for (std::int64_t choice = t * K; choice < (t + 1) * K; ++choice) {
      const std::int64_t row = row_of_choice[choice];
      if (row < 0 || row >= R) continue;
      const float gate = gates == nullptr ? 1.0F : gates[choice];
      const Columns columns = *reinterpret_cast<const Columns*>(rows + row * D + d);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = multiply_add(gate, load(columns.values[i]), sums[i]);
    }
    Columns result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) store(sums[i], result.values[i]);
    *reinterpret_cast<Columns*>(y + t * D + d) = result;
  }
}

// The sum of `value` over the block, in thread 0. Every thread of the block must call it.
__device__ float block_sum(float value) {
  __shared__ float of_warp[kMaxThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAllLanes, value, distance);
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0F;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += of_warp[warp];
  }
  __syncthreads();  // of_warp is free for the next call
  return sum;
}

// Block t writes what its token's choices own: d_gates[t], the rows of these choices, and of the rows
// t*K..t*K+K-1 those past *rows_used, which no choice owns.
template <class S, int kCount>
__global__ void combine_backward_kernel(const S* __restrict__ dy, const S* __restrict__ rows,
                                        const float* __restrict__ gates,
                                        const std::int32_t* __restrict__ row_of_choice, std::int64_t K,
                                        std::int64_t D, const std::int32_t* __restrict__ rows_used,
                                        S* __restrict__ d_rows, float* __restrict__ d_gates) {
  using Columns = Pack<S, kCount>;
  const std::int64_t t = blockIdx.x;
  const std::int64_t used = *rows_used;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kCount;
  const std::int64_t step = blockDim.x * kCount;

  for (std::int64_t choice = t * K; choice < (t + 1) * K; ++choice) {
    const std::int64_t row = row_of_choice[choice];
    float product = 0.0F;
    if (row >= 0 && row < used) {
      const float gate = gates[choice];
      for (std::int64_t d = first; d < D; d += step) {
        const Columns dy_columns = *reinterpret_cast<const Columns*>(dy + t * D + d);
        const Columns row_columns = *reinterpret_cast<const Columns*>(rows + row * D + d);
        Columns result;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float gradient = load(dy_columns.values[i]);
          store(gate * gradient, result.values[i]);
          product = multiply_add(gradient, load(row_columns.values[i]), product);
        }
        *reinterpret_cast<Columns*>(d_rows + row * D + d) = result;
      }
    }
    const float sum = block_sum(product);
    if (threadIdx.x == 0) d_gates[choice] = sum;

    if (choice < used) continue;
    for (std::int64_t d = first; d < D; d += step) {
      *reinterpret_cast<Columns*>(d_rows + choice * D + d) = Columns{};
    }
  }
}

// Threads of a block whose threads share `items` items: whole warps, no more than there is work for.
int threads_for(std::int64_t items) {
  const std::int64_t warps = (items + kWarp - 1) / kWarp;
  return static_cast<int>(std::clamp<std::int64_t>(warps * kWarp, kWarp, kMaxThreads));
}

bool aligned(const void* pointer, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// Calls function(S{}, std::integral_constant<int, kCount>{}) with the storage type that `dtype` stands for
// and the number of columns that can move together: a full pack when `packable`, else one.
template <class Function>
void with_element(DType dtype, bool packable, const Function& function) {
  const auto call = [&](auto element) {
    constexpr int kFull = kPackBytes / sizeof(element);
    if (packable) {
      function(element, std::integral_constant<int, kFull>{});
    } else {
      function(element, std::integral_constant<int, 1>{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return call(float{});
    case DType::kBFloat16:
      return call(__nv_bfloat16{});
    case DType::kFloat16:
      return call(__half{});
  }
  throw std::invalid_argument("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                              std::to_string(static_cast<int>(dtype)));
}

std::int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

void permute(const void* x, std::int64_t row_bytes, const std::int32_t* choice_of_row,
             const std::int32_t* rows_used, std::int64_t R, std::int64_t K, void* rows, void* stream) {
  check_permute_sizes(row_bytes, R, K);
  if (R == 0 || row_bytes == 0) return;

  const auto move = [&](auto word) {
    using Word = decltype(word);
    const std::int64_t words = row_bytes / static_cast<std::int64_t>(sizeof(Word));
    launch("permute", permute_kernel<Word>, R, threads_for(words), stream, static_cast<const Word*>(x), words,
           choice_of_row, rows_used, static_cast<std::int32_t>(R), static_cast<std::int32_t>(K),
           static_cast<Word*>(rows));
  };
  const auto in_words_of = [&](std::int64_t bytes) {
    return row_bytes % bytes == 0 && aligned(x, bytes) && aligned(rows, bytes);
  };
  if (in_words_of(kPackBytes)) {
    move(uint4{});
  } else if (in_words_of(4)) {
    move(std::uint32_t{});
  } else {
    move(static_cast<unsigned char>(0));
  }
}

void gather_sum(const void* rows, DType dtype, const std::int32_t* row_of_choice, const float* gates,
                std::int64_t T, std::int64_t K, std::int64_t D, void* y, void* stream) {
  check_row_count(T, K);
  check_size("D", D, 0);
  if (T == 0 || D == 0) return;

  const bool packable =
      D * element_bytes(dtype) % kPackBytes == 0 && aligned(rows, kPackBytes) && aligned(y, kPackBytes);
  with_element(dtype, packable, [&](auto element, auto count) {
    using S = decltype(element);
    constexpr int kCount = decltype(count)::value;
    launch("gather_sum", gather_sum_kernel<S, kCount>, T, threads_for(D / kCount), stream,
           static_cast<const S*>(rows), row_of_choice, gates, T * K, K, D, static_cast<S*>(y));
  });
}

void combine_backward(const void* dy, const void* rows, DType dtype, const float* gates,
                      const std::int32_t* row_of_choice, std::int64_t T, std::int64_t K, std::int64_t D,
                      const std::int32_t* rows_used, std::int64_t R, void* d_rows, float* d_gates,
                      void* stream) {
  check_row_count(T, K);
  check_size("D", D, 0);
  check(R == T * K, "R: expected T*K = " + std::to_string(T * K) + ", got " + std::to_string(R));
  if (R == 0) return;

  const bool packable = D * element_bytes(dtype) % kPackBytes == 0 && aligned(dy, kPackBytes) &&
                        aligned(rows, kPackBytes) && aligned(d_rows, kPackBytes);
  with_element(dtype, packable, [&](auto element, auto count) {
    using S = decltype(element);
    constexpr int kCount = decltype(count)::value;
    launch("combine_backward", combine_backward_kernel<S, kCount>, T, threads_for(D / kCount), stream,
           static_cast<const S*>(dy), static_cast<const S*>(rows), gates, row_of_choice, K, D, rows_used,
           static_cast<S*>(d_rows), d_gates);
  });
}

}  // namespace clipup::cuda
