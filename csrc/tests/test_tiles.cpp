// Tile instructions against plain loops, on a CPU that has them or emulated; and what ends an emulated
// process.
#include <immintrin.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

#include "../cpu/element.h"
#include "tests.h"
#include "tile_emulation.h"

// The address sanitizer's runtime, where there is one.
extern "C" int __asan_address_is_poisoned(const volatile void* address) __attribute__((weak));

namespace clipup::tests {
namespace {

#define TILES __attribute__((target("amx-tile,amx-int8,amx-bf16"), noinline))

// Rows of a tile, in memory of exactly their size.
using Words = std::vector<std::uint32_t>;
constexpr std::int64_t kRows = 16, kRowWords = 16, kRowBytes = 64;

// Tiles 0 and 1 get `rows` rows, tile 2 gets 16. gcc's tile loads do not say which memory they read: what
// they shall load has to be stored before.
TILES void configure(std::int64_t rows) {
  TileConfiguration configuration;
  configuration.palette = 1;
  for (int tile = 0; tile < 3; ++tile) {
    configuration.row_bytes[tile] = kRowBytes;
    configuration.rows[tile] = static_cast<std::uint8_t>(tile < 2 ? rows : kRows);
  }
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&configuration);
}

TILES void load(const Words& words) { _tile_loadd(0, words.data(), kRowBytes); }
TILES void store(Words& words) { _tile_stored(0, words.data(), kRowBytes); }
TILES void release() { _tile_release(); }

TILES void multiply(bool bfloat16, const Words& left, const Words& right) {
  _tile_loadd(1, left.data(), kRowBytes);
  _tile_stream_loadd(2, right.data(), kRowBytes);
  if (bfloat16) {
    _tile_dpbf16ps(0, 1, 2);
  } else {
    _tile_dpbssd(0, 1, 2);
  }
}

// sums[M,16] += left[M,16] . right[16,16] in words of four int8 or two bfloat16.
bool product_equals_loops(bool bfloat16) {
  const std::int64_t M = uniform() < 0.3F ? kRows : 1 + integer(kRows);
  Words left(M * kRowWords), right(kRows * kRowWords), sums(M * kRowWords), product(M * kRowWords);
  constexpr float kScales[] = {1.0F, 0x1p-62F, 0x1p-126F};  // subnormal numbers and products count as zero
  for (Words* const words : {&left, &right, &sums}) {
    const auto number = [scale = kScales[integer(3)]] { return float_bits(normal() * scale); };
    for (std::uint32_t& word : *words) {
      word = bfloat16 ? number() : random_engine()();
      if (bfloat16 && words != &sums) word = (word & 0xFFFF0000U) | number() >> 16;
    }
  }
  configure(M);
  load(sums);
  multiply(bfloat16, left, right);
  store(product);
  release();

  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  for (std::int64_t i = 0; i < M * kRowWords; ++i) {
    float even = 0.0F, odd = 0.0F;
    for (std::int64_t k = 0; k < kRows; ++k) {
      const std::uint32_t a = left[i / kRowWords * kRowWords + k], b = right[k * kRowWords + i % kRowWords];
      even = std::fma(bits_float(a << 16), bits_float(b << 16), even);
      odd = std::fma(bits_float(a & 0xFFFF0000U), bits_float(b & 0xFFFF0000U), odd);
      for (int shift = 0; shift < 32 && !bfloat16; shift += 8) {
        sums[i] += static_cast<std::uint32_t>(static_cast<std::int8_t>(a >> shift) *
                                              static_cast<std::int8_t>(b >> shift));
      }
    }
    if (bfloat16) sums[i] = float_bits(bits_float(sums[i]) + (even + odd));
  }
  _mm_setcsr(mode);
  return product == sums;
}

bool threads_have_own_tiles() {
  const Words words(kRowWords, 77);
  Words kept(kRowWords);
  configure(1);
  load(words);
  bool is_right = false;
  std::thread([&is_right] { is_right = product_equals_loops(false); }).join();
  store(kept);
  release();
  return is_right && kept == words;
}

// The status of a child without output, as waitpid() gives it.
template <class Function>
int status_of_child(const Function& function) {
  const pid_t child = fork();
  if (child == 0) {
    ::close(STDOUT_FILENO);
    ::close(STDERR_FILENO);
    function();
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

int status_of_load(std::size_t size) {
  const Words words(size);
  return status_of_child([&words] { configure(kRows), load(words); });
}

}  // namespace

void test_tiles(bool emulated) {
  describe("tiles");
  for (int i = 0; i < 60; ++i) EXPECT(product_equals_loops(i % 2 == 0));
  EXPECT(threads_have_own_tiles());
  if (!emulated) return;
  EXPECT(status_of_load(kRows * kRowWords) == 0);
  if (__asan_address_is_poisoned != nullptr) EXPECT(status_of_load(kRows * kRowWords - 1) != 0);
  const int status = status_of_child([] { __asm__ volatile("ud2"); });
  EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGILL);
}

}  // namespace clipup::tests
