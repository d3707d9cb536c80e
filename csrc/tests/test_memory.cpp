// The pool of working memory: aligned, given out once, kept within its limit, from several threads at a time.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "../moe.h"
#include "tests.h"

namespace clipup::tests {
namespace {

struct Held {
  unsigned char* block;
  std::size_t bytes;
  unsigned char mark;
};

bool holds_its_mark(const Held& held) {
  return std::all_of(held.block, held.block + held.bytes, [&](unsigned char c) { return c == held.mark; });
}

// Blocks of random sizes, written whole, checked and given back in random order. Returns whether all was
// well.
bool churn(unsigned seed, int steps) {
  std::mt19937 engine(seed);
  std::vector<Held> held;
  bool well = true;
  for (int step = 0; step < steps; ++step) {
    if (held.size() < 8 && engine() % 2 == 0) {
      const std::size_t bytes =
          engine() % 16 == 0 ? (std::size_t{2} << 20U) + engine() % 4096 : engine() % 20000;
      Held next{static_cast<unsigned char*>(acquire_memory(bytes)), bytes,
                static_cast<unsigned char>(engine() % 255)};
      well = well && next.block != nullptr && reinterpret_cast<std::uintptr_t>(next.block) % 64 == 0;
      std::memset(next.block, next.mark, bytes);
      held.push_back(next);
    } else if (!held.empty()) {
      const std::size_t which = engine() % held.size();
      well = well && holds_its_mark(held[which]);
      return_memory(held[which].block);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
    }
  }
  for (const Held& last : held) {
    well = well && holds_its_mark(last);
    return_memory(last.block);
  }
  return well;
}

// Forks while other threads take and return blocks; a child that cannot take one is ended by its alarm.
void expect_memory_in_forked_children() {
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 3; ++i) {
    threads.emplace_back([&over] {
      while (!over) return_memory(acquire_memory(4096));
    });
  }
  bool well = true;
  for (int forks = 0; well && forks < (quick() ? 30 : 300); ++forks) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(5);
      return_memory(acquire_memory(4096));
      _exit(0);
    }
    int status = -1;
    well = child > 0 && waitpid(child, &status, 0) == child && status == 0;
  }
  over = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT(well);
}

}  // namespace

void test_memory() {
  describe("memory");
  release_memory();
  EXPECT(kept_memory() == 0);
  const std::int64_t used = used_memory();
  void* const block = acquire_memory(100000);
  EXPECT(kept_memory() == 0 && used_memory() >= used + 100000 && used_memory() < used + 200000);
  return_memory(block);
  EXPECT(used_memory() == used);
  const std::int64_t kept = kept_memory();
  EXPECT(kept >= 100000 && kept < 200000);
  void* const again = acquire_memory(90000);
  EXPECT(again == block && kept_memory() == 0);
  void* const other = acquire_memory(90000);
  EXPECT(other != again);
  return_memory(again);
  return_memory(other);
  const std::size_t megabyte = std::size_t{1} << 20U;
  void* const large = acquire_memory(5 * megabyte / 2);
  EXPECT(used_memory() - used == static_cast<std::int64_t>(5 * megabyte / 2));
  return_memory(large);
  void* const lasting = acquire_memory(2 * megabyte, true);
  EXPECT(lasting != large && used_memory() - used == static_cast<std::int64_t>(2 * megabyte));
  return_memory(lasting);
#ifndef CLIPUP_POISON
  void* const stale = acquire_memory(1536 * megabyte);
  void* const current = acquire_memory(1024 * megabyte);
  return_memory(stale);
  return_memory(current);
  EXPECT(kept_memory() < static_cast<std::int64_t>(1100 * megabyte) &&
         acquire_memory(1024 * megabyte) == current);
  return_memory(current);
#endif
  void* const none[] = {acquire_memory(0), acquire_memory(0)};
  EXPECT(none[0] != nullptr && none[1] != nullptr && none[0] != none[1]);
  for (void* const empty : none) return_memory(empty);
  release_memory();
  EXPECT(kept_memory() == 0);

  bool well[4] = {};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&well, i] { well[i] = churn(i, quick() ? 200 : 2000); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const bool fine : well) EXPECT(fine);
  EXPECT(kept_memory() > 0 && kept_memory() <= std::int64_t{2} << 30U);
  expect_memory_in_forked_children();
  release_memory();
  EXPECT(kept_memory() == 0);
}

}  // namespace clipup::tests
