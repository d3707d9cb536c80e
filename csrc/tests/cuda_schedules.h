// Runs emulated CUDA stages under several orders of their threads, with poisoned workspaces.
#pragma once

#include <cstring>
#include <vector>

#include "cuda_emulation.h"
#include "tests.h"

namespace clipup::tests {

template <class Value>
bool same_bits(const std::vector<Value>& a, const std::vector<Value>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
}

// The result of run(), which has to be the `same` under every order of threads and blocks.
template <class Run, class Same>
auto under_every_schedule(const Run& run, const Same& same) {
  cuda::emulation::set_schedule(0);
  auto result = run();
  for (int i = 0; i < (quick() ? 1 : 2); ++i) {
    cuda::emulation::set_schedule(1 + random_engine()());
    EXPECT(same(result, run()));
  }
  return result;
}

// A workspace of exactly `bytes` bytes, full of NaN and of -1.
inline std::vector<std::int32_t> poisoned_workspace(std::int64_t bytes) {
  EXPECT(bytes % 4 == 0);
  return std::vector<std::int32_t>(bytes / 4, -1);
}

}  // namespace clipup::tests
