#include "memory.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace clipup {
namespace {

constexpr std::size_t kKeptBytes = std::size_t{2} << 30U;
constexpr std::size_t kHugePage = std::size_t{2} << 20U;

struct Pool {
  std::mutex mutex;
  std::multimap<std::size_t, void*> free;  // by size
  std::map<void*, std::size_t> used;
  std::size_t free_bytes = 0;
};

// Never destroyed: a thread may still run while the process ends.
Pool& pool = *new Pool;

// Locked across a fork: in the child, a lock that another thread holds would never be released.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { pool.mutex.lock(); }, [] { pool.mutex.unlock(); }, [] { pool.mutex.unlock(); });

void* fresh(std::size_t bytes) {
  // Large matrices touch a new page every few rows; huge pages save address translations.
  void* block = nullptr;
  if (posix_memalign(&block, bytes >= kHugePage ? kHugePage : 64, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return block;
}

}  // namespace

void expect_whole_write([[maybe_unused]] void* block, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<std::uintptr_t>(block) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<std::uintptr_t>(block) + bytes) / kHugePage * kHugePage;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  if (block != nullptr && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* acquire_memory(std::size_t bytes, bool lasting) {
  bytes = (std::max<std::size_t>(bytes, 1) + 4095) / 4096 * 4096;
  const std::lock_guard<std::mutex> lock(pool.mutex);
  const auto found = pool.free.lower_bound(bytes);
  void* block = nullptr;
  if (found != pool.free.end() && found->first <= bytes + (lasting ? bytes / 8 : bytes)) {
    bytes = found->first;
    block = found->second;
    pool.free.erase(found);
    pool.free_bytes -= bytes;
    pool.used.emplace(block, bytes);
  } else {
    block = fresh(bytes);
    pool.used.emplace(block, bytes);
  }
#ifdef CLIPUP_POISON
  std::memset(block, 0xFF, bytes);  // NaN in every storage type, so that reading unwritten memory shows
#endif
  return block;
}

void return_memory(void* block) {
  const std::lock_guard<std::mutex> lock(pool.mutex);
  const auto found = pool.used.find(block);
  const std::size_t bytes = found->second;
  pool.used.erase(found);
  pool.free.emplace(bytes, block);
  pool.free_bytes += bytes;
  // The largest goes first; last the one that was just in use.
  while (pool.free_bytes > kKeptBytes) {
    auto victim = std::prev(pool.free.end());
    if (victim->second == block && victim != pool.free.begin()) --victim;
    std::free(victim->second);
    pool.free_bytes -= victim->first;
    pool.free.erase(victim);
  }
}

std::int64_t kept_memory() {
  const std::lock_guard<std::mutex> lock(pool.mutex);
  return static_cast<std::int64_t>(pool.free_bytes);
}

std::int64_t used_memory() {
  const std::lock_guard<std::mutex> lock(pool.mutex);
  std::int64_t bytes = 0;
  for (const auto& block : pool.used) bytes += static_cast<std::int64_t>(block.second);
  return bytes;
}

void release_memory() {
  const std::lock_guard<std::mutex> lock(pool.mutex);
  for (const auto& [bytes, block] : pool.free) std::free(block);
  pool.free.clear();
  pool.free_bytes = 0;
}

}  // namespace clipup
