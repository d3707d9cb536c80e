#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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
Pool& pool() {
  static auto* const instance = new Pool;
  return *instance;
}

void* fresh(std::size_t bytes) {
  // Large matrices touch a new page every few rows; huge pages save address translations.
  void* block = std::aligned_alloc(bytes >= kHugePage ? kHugePage : 64, bytes);
  if (block == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
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

void* acquire_memory(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePage ? kHugePage : 4096;
  bytes = (bytes + unit - 1) / unit * unit;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.free.lower_bound(bytes);
  void* block = nullptr;
  if (found != p.free.end() && found->first <= 2 * bytes) {
    bytes = found->first;
    block = found->second;
    p.free.erase(found);
    p.free_bytes -= bytes;
    p.used.emplace(block, bytes);
  } else {
    block = fresh(bytes);
    p.used.emplace(block, bytes);
  }
#ifdef CLIPUP_POISON
  std::memset(block, 0xFF, bytes);  // NaN in every storage type, so that reading unwritten memory shows
#endif
  return block;
}

void return_memory(void* block) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.used.find(block);
  const std::size_t bytes = found->second;
  p.used.erase(found);
  if (p.free_bytes + bytes > kKeptBytes) {
    std::free(block);
    return;
  }
  p.free.emplace(bytes, block);
  p.free_bytes += bytes;
}

std::int64_t kept_memory() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return static_cast<std::int64_t>(p.free_bytes);
}

std::int64_t used_memory() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  std::int64_t bytes = 0;
  for (const auto& block : p.used) bytes += static_cast<std::int64_t>(block.second);
  return bytes;
}

void release_memory() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  for (const auto& [bytes, block] : p.free) std::free(block);
  p.free.clear();
  p.free_bytes = 0;
}

}  // namespace clipup
