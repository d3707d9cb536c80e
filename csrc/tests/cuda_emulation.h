// Replaces the CUDA runtime in the native tests: the part of it that the kernels of csrc/cuda use, on the
// CPU.
//
// A launch runs its blocks one after another. A block's threads are fibers: one runs at a time, up to the
// next barrier or collective instruction. A seed decides which fiber runs next and in which order blocks run,
// so that a result that depends on either, as after a missing barrier, changes with the seed. Under the
// thread sanitizer only __syncthreads and __syncwarp order two fibers, so that it reports the race itself. A
// shuffle orders nothing, as on a GPU.
//
// Static __shared__ arrays keep the values of earlier blocks. Threads that wait for each other at different
// barriers end the program.
#pragma once

#define CLIPUP_CUDA_EMULATION

#include <math.h>  // expf and similar functions without std::

#include <cstdint>
#include <cstring>
#include <functional>

namespace clipup::cuda::emulation {

struct Index {
  unsigned x;
};

// Indices of the running fiber.
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

// Calls body() once for every thread of every block.
void run(std::int64_t blocks, int threads, const std::function<void()>& body);

// Sets the order of threads and blocks; 0: by index.
void set_schedule(std::uint64_t seed);

void wait_for_block();

// The values that the lanes of this warp pass to the same collective instruction, by lane.
enum class Collective : int { kSync, kShuffle, kMatch };
const std::uint64_t* exchange(Collective instruction, unsigned lanes, std::uint64_t value);

template <class Value>
Value value_of(const std::uint64_t* values, unsigned lane) {
  Value value;
  std::memcpy(&value, values + lane, sizeof value);
  return value;
}

template <class Value>
const std::uint64_t* give(Collective instruction, unsigned lanes, Value value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return exchange(instruction, lanes, bits);
}

inline unsigned lane() { return thread_index().x % 32; }

}  // namespace clipup::cuda::emulation

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define threadIdx (::clipup::cuda::emulation::thread_index())
#define blockIdx (::clipup::cuda::emulation::block_index())
#define blockDim (::clipup::cuda::emulation::block_size())
#define gridDim (::clipup::cuda::emulation::grid_size())

inline void __syncthreads() { clipup::cuda::emulation::wait_for_block(); }
inline void __syncwarp() {
  clipup::cuda::emulation::exchange(clipup::cuda::emulation::Collective::kSync, ~0U, 0);
}

template <class Value>
Value __shfl_sync(unsigned lanes, Value value, int source, int width = 32) {
  namespace emulation = clipup::cuda::emulation;
  const auto* const values = emulation::give(emulation::Collective::kShuffle, lanes, value);
  const unsigned group = emulation::lane() / width * width;
  return emulation::value_of<Value>(values, group + source % width);
}

template <class Value>
Value __shfl_xor_sync(unsigned lanes, Value value, int distance) {
  namespace emulation = clipup::cuda::emulation;
  const auto* const values = emulation::give(emulation::Collective::kShuffle, lanes, value);
  return emulation::value_of<Value>(values, emulation::lane() ^ static_cast<unsigned>(distance));
}

inline unsigned __match_any_sync(unsigned lanes, int value) {
  namespace emulation = clipup::cuda::emulation;
  const auto* const values = emulation::give(emulation::Collective::kMatch, lanes, value);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (emulation::value_of<int>(values, lane) == value) same |= 1U << lane;
  }
  return same;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
