// Dispatch on CUDA devices: a stable counting sort of (token, choice) pairs by expert, cut at the capacity.
//
//   count_kernel    slots of every expert per block, and before every warp in it; unmasked tokens
//   assign_kernel   first rows and capacity, recomputed by every block; then the row of each slot
//
// Slot s = k*T + i is the k-th choice of the i-th token in serving order. A warp owns a range of slots and
// processes 32 at a time: a lane's rank among the lanes with the same expert is its rank among these slots.
#include <cmath>
#include <cstdint>

#include "../checks.h"
#include "../moe_cuda.h"
#include "device.cuh"

namespace clipup::cuda {
namespace {

constexpr int kDispatchThreads = 256;
constexpr int kDispatchWarps = kDispatchThreads / kWarp;

struct SlotGrid {
  std::int64_t T, R;
  int K, E;
  int slots_per_warp, blocks;
};

SlotGrid slot_grid(std::int64_t T, std::int64_t K, std::int64_t E) {
  // Every block of `assign_kernel` reads the counts of all: with many experts, fewer blocks. At most
  // kDispatchThreads.
  const std::int64_t most = (E > 128 ? 128 : 256) * kDispatchWarps;
  const std::int64_t R = T * K;
  const std::int64_t slots = (R + most - 1) / most;
  const std::int64_t slots_per_warp = slots == 0 ? kWarp : (slots + kWarp - 1) / kWarp * kWarp;
  const std::int64_t slots_per_block = slots_per_warp * kDispatchWarps;
  const std::int64_t blocks = R == 0 ? 1 : (R + slots_per_block - 1) / slots_per_block;
  return {T,
          R,
          static_cast<int>(K),
          static_cast<int>(E),
          static_cast<int>(slots_per_warp),
          static_cast<int>(blocks)};
}

// From `count_kernel` to `assign_kernel`.
struct Counts {
  std::int32_t* of_block;  // [blocks, E]
  std::int32_t* in_front;  // [blocks, warps, E]: of the earlier warps of the block
  std::int32_t* tokens;    // [blocks]: unmasked tokens with a choice
};

Counts counts_at(void* workspace, const SlotGrid& grid) {
  auto* const of_block = static_cast<std::int32_t*>(workspace);
  std::int32_t* const in_front = of_block + std::int64_t{grid.blocks} * grid.E;
  return {of_block, in_front, in_front + std::int64_t{grid.blocks} * kDispatchWarps * grid.E};
}

struct Choices {
  const std::int32_t* expert_indices;
  const std::uint8_t* mask;   // or null
  const std::int64_t* order;  // or null

  // The expert of the k-th choice of token t, -1 if the token is masked or has none.
  __device__ int expert(std::int64_t t, int k, const SlotGrid& grid) const {
    if (mask != nullptr && mask[t] == 0) return -1;
    const std::int32_t e = expert_indices[t * grid.K + k];
    return e >= 0 && e < grid.E ? e : -1;
  }
};

// Calls visit(choice, expert) for the slots of this warp, 32 at a time and in order, by all lanes together;
// choice -1: no slot is left for the lane.
template <class Visit>
__device__ void for_each_slot(const Choices& choices, const SlotGrid& grid, const Visit& visit) {
  const std::int64_t warp = std::int64_t{blockIdx.x} * kDispatchWarps + threadIdx.x / kWarp;
  const std::int64_t begin = warp * grid.slots_per_warp;
  for (int i = threadIdx.x % kWarp; i < grid.slots_per_warp; i += kWarp) {  // slots_per_warp: whole warps
    const std::int64_t slot = begin + i;
    std::int64_t choice = -1;
    int expert = -1;
    if (slot < grid.R) {
      const auto k = static_cast<int>(static_cast<unsigned>(slot) / static_cast<unsigned>(grid.T));
      const std::int64_t served = slot - k * grid.T;
      const std::int64_t t = choices.order == nullptr ? served : choices.order[served];
      if (t >= 0 && t < grid.T) {
        choice = t * grid.K + k;
        expert = choices.expert(t, k, grid);
      }
    }
    visit(choice, expert);
  }
}

// Counters by warp and expert, in shared memory. Of the lanes with the same expert, only the first adds to a
// counter.
struct WarpCounters {
  std::int32_t (*counters)[kMostExperts];

  // The counter of `expert` plus the lane's rank among the lanes with the same expert; adds all of them to
  // the counter. Every lane of the warp must call it; expert -1: none.
  __device__ std::int32_t take(int expert) const {
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1U << threadIdx.x % kWarp) - 1U));
    std::int32_t* const counter = &counters[threadIdx.x / kWarp][expert < 0 ? 0 : expert];
    const std::int32_t place = *counter + rank;
    __syncwarp();  // all have read it
    if (expert >= 0 && rank == 0) *counter += __popc(same);
    __syncwarp();
    return place;
  }
};

__global__ void __launch_bounds__(kDispatchThreads)
    count_kernel(Choices choices, SlotGrid grid, bool limited, Counts counts) {
  __shared__ std::int32_t counters[kDispatchWarps][kMostExperts];
  const std::int64_t block = blockIdx.x;
  for (int e = threadIdx.x; e < grid.E; e += blockDim.x) {
    for (int warp = 0; warp < kDispatchWarps; ++warp) counters[warp][e] = 0;
  }
  __syncthreads();
  for_each_slot(choices, grid, [&](std::int64_t, int expert) { WarpCounters{counters}.take(expert); });
  __syncthreads();
  for (int e = threadIdx.x; e < grid.E; e += blockDim.x) {
    std::int32_t sum = 0;
    for (int warp = 0; warp < kDispatchWarps; ++warp) {
      counts.in_front[(block * kDispatchWarps + warp) * grid.E + e] = sum;
      sum += counters[warp][e];
    }
    counts.of_block[block * grid.E + e] = sum;
  }

  if (!limited) return;
  int tokens = 0;
  for (std::int64_t t = block * blockDim.x + threadIdx.x; t < grid.T;
       t += std::int64_t{gridDim.x} * blockDim.x) {
    bool routed = false;
    for (int k = 0; k < grid.K && !routed; ++k) routed = choices.expert(t, k, grid) >= 0;
    tokens += routed ? 1 : 0;
  }
  tokens = block_total(tokens);
  if (threadIdx.x == 0) counts.tokens[block] = tokens;
}

// Rows that an expert may take: ceil(f*K*N/E), at most all.
__device__ std::int64_t expert_capacity(double capacity_factor, int tokens, const SlotGrid& grid) {
  const double most = static_cast<double>(tokens) * grid.K;
  const double capacity = ceil(capacity_factor * grid.K * tokens / grid.E);
  return static_cast<std::int64_t>(capacity < most ? capacity : most);
}

__global__ void __launch_bounds__(kDispatchThreads)
    assign_kernel(Choices choices, SlotGrid grid, double capacity_factor, Counts counts,
                  std::int32_t* __restrict__ offsets, std::int32_t* __restrict__ choice_of_row,
                  std::int32_t* __restrict__ row_of_choice) {
  __shared__ std::int32_t in_front[kMostExperts], kept[kMostExperts], first_row[kMostExperts + 1];
  __shared__ std::int32_t counters[kDispatchWarps][kMostExperts];
  const std::int64_t block = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);

  // Slots of every expert, in earlier blocks and in all: a thread sums some rows of a column.
  for (int e = thread; e < grid.E; e += kDispatchThreads) in_front[e] = kept[e] = 0;
  __syncthreads();
  const int parts = kDispatchThreads / grid.E;
  if (thread / grid.E < parts) {
    const int e = thread % grid.E;
    std::int32_t front = 0;
    std::int32_t all = 0;
    for (int b = thread / grid.E; b < grid.blocks; b += parts) {
      const std::int32_t count = counts.of_block[std::int64_t{b} * grid.E + e];
      all += count;
      front += b < block ? count : 0;
    }
    atomicAdd(&in_front[e], front);
    atomicAdd(&kept[e], all);
  }
  std::int64_t capacity = grid.R;
  if (capacity_factor >= 0.0) {
    const int tokens = block_total(thread < grid.blocks ? counts.tokens[thread] : 0);
    capacity = expert_capacity(capacity_factor, tokens, grid);
  }
  __syncthreads();
  for (int e = thread; e < grid.E; e += kDispatchThreads) {
    if (kept[e] > capacity) kept[e] = static_cast<std::int32_t>(capacity);
    for (int warp = 0; warp < kDispatchWarps; ++warp) {
      counters[warp][e] = in_front[e] + counts.in_front[(block * kDispatchWarps + warp) * grid.E + e];
    }
  }
  __syncthreads();
  for (int e = thread; e <= grid.E; e += kDispatchThreads) {
    std::int32_t row = 0;
    for (int other = 0; other < e; ++other) row += kept[other];
    first_row[e] = row;
    if (block == 0) offsets[e] = row;
  }
  __syncthreads();

  for_each_slot(choices, grid, [&](std::int64_t choice, int expert) {
    const std::int32_t place = WarpCounters{counters}.take(expert);
    if (choice < 0) return;
    const bool placed = expert >= 0 && place < kept[expert];
    const std::int32_t row = placed ? first_row[expert] + place : -1;
    row_of_choice[choice] = row;
    if (placed) choice_of_row[row] = static_cast<std::int32_t>(choice);
  });
  // Rows past the last one in use, by the block that owns the slot of the same number.
  const std::int64_t begin = block * kDispatchWarps * grid.slots_per_warp;
  for (std::int64_t i = thread; i < std::int64_t{kDispatchWarps} * grid.slots_per_warp;
       i += kDispatchThreads) {
    const std::int64_t row = begin + i;
    if (row >= first_row[grid.E] && row < grid.R) choice_of_row[row] = -1;
  }
}

}  // namespace

std::int64_t dispatch_workspace_bytes(std::int64_t T, std::int64_t K, std::int64_t E) {
  check_dispatch_sizes(T, K, E);
  check_most_experts(E);
  const std::int64_t blocks = slot_grid(T, K, E).blocks;
  return blocks * ((kDispatchWarps + 1) * E + 1) * static_cast<std::int64_t>(sizeof(std::int32_t));
}

void dispatch(const std::int32_t* expert_indices, const std::uint8_t* mask, const std::int64_t* order,
              std::int64_t T, std::int64_t K, std::int64_t E, double capacity_factor, std::int32_t* offsets,
              std::int32_t* choice_of_row, std::int32_t* row_of_choice, void* workspace, void* stream) {
  check_dispatch_sizes(T, K, E);
  check_most_experts(E);
  check_dispatch_arguments(T * K, E, capacity_factor, expert_indices, offsets, choice_of_row, row_of_choice);
  check_pointer("workspace", workspace, dispatch_workspace_bytes(T, K, E));

  const SlotGrid grid = slot_grid(T, K, E);
  const Choices choices{expert_indices, mask, order};
  const Counts counts = counts_at(workspace, grid);
  launch("dispatch", count_kernel, grid.blocks, kDispatchThreads, stream, choices, grid,
         capacity_factor >= 0.0, counts);
  launch("dispatch", assign_kernel, grid.blocks, kDispatchThreads, stream, choices, grid, capacity_factor,
         counts, offsets, choice_of_row, row_of_choice);
}

}  // namespace clipup::cuda
