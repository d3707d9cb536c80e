// The emulation of tile instructions: products and moves against plain loops, and what has to end the process.
#include <immintrin.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstring>
#include <thread>

#include "tests.h"

// The address sanitizer's runtime, where there is one.
extern "C" int __asan_address_is_poisoned(const volatile void* address) __attribute__((weak));

namespace clipup::tests {
namespace {

#define TILES __attribute__((target("amx-tile,amx-int8,amx-bf16"), noinline))
// gcc's tile loads do not say which memory they read: what was stored there has to be stored before.
#define FINISH_STORES() __asm__ volatile("" ::: "memory")

using Words = std::vector<std::uint32_t>;

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, zeros[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  constexpr void set(int tile, std::int64_t tile_rows, std::int64_t tile_row_bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<std::uint16_t>(tile_row_bytes);
  }
};

// c[M,N] += a[M,K] . b[K,N] in words of four int8 or two bfloat16; every matrix on the heap, to its last word.
struct Product {
  enum Kind { kSS, kSU, kUS, kUU, kBFloat16 };

  TILES void run(Kind kind) {
    Configuration configuration;
    configuration.set(0, M, 4 * N);
    configuration.set(6, M, 4 * K);
    configuration.set(7, K, 4 * N);
    FINISH_STORES();
    _tile_loadconfig(&configuration);
    _tile_loadd(0, c.data(), 4 * N);
    _tile_loadd(6, a.data(), 4 * K);
    _tile_stream_loadd(7, b.data(), 4 * N);
    switch (kind) {
      case kSS:
        _tile_dpbssd(0, 6, 7);
        break;
      case kSU:
        _tile_dpbsud(0, 6, 7);
        break;
      case kUS:
        _tile_dpbusd(0, 6, 7);
        break;
      case kUU:
        _tile_dpbuud(0, 6, 7);
        break;
      case kBFloat16:
        _tile_dpbf16ps(0, 6, 7);
        break;
    }
    _tile_stored(0, c.data(), 4 * N);
    _tile_release();
  }

  std::int64_t M = 16, N = 16, K = 16;
  Words a = Words(M * K), b = Words(K * N), c = Words(M * N);
};

float as_float(std::uint32_t bits) {
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint32_t as_bits(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One element of the product, in the order of tdpbf16ps.
std::uint32_t plain_element(const Product& product, Product::Kind kind, std::int64_t m, std::int64_t n) {
  const bool left_signed = kind == Product::kSS || kind == Product::kSU;
  const bool right_signed = kind == Product::kSS || kind == Product::kUS;
  const auto byte = [](std::uint32_t word, int i, bool is_signed) {
    const auto unsigned_byte = static_cast<std::uint8_t>(word >> 8 * i);
    return is_signed ? static_cast<std::int8_t>(unsigned_byte) : std::int64_t{unsigned_byte};
  };
  std::uint32_t sum = product.c[m * product.N + n];
  float even = 0.0F, odd = 0.0F;
  for (std::int64_t k = 0; k < product.K; ++k) {
    const std::uint32_t a = product.a[m * product.K + k], b = product.b[k * product.N + n];
    if (kind == Product::kBFloat16) {
      even = std::fma(as_float(a << 16), as_float(b << 16), even);
      odd = std::fma(as_float(a & 0xFFFF0000U), as_float(b & 0xFFFF0000U), odd);
      continue;
    }
    for (int i = 0; i < 4; ++i) {
      sum += static_cast<std::uint32_t>(byte(a, i, left_signed) * byte(b, i, right_signed));
    }
  }
  return kind == Product::kBFloat16 ? as_bits(as_float(sum) + (even + odd)) : sum;
}

Product random_product(Product::Kind kind) {
  const auto size = [] { return uniform() < 0.3F ? 16 : 1 + integer(16); };
  Product product{size(), size(), size()};
  for (Words* const words : {&product.a, &product.b, &product.c}) {
    const bool is_sum = words == &product.c;
    for (std::uint32_t& word : *words) {
      word = random_engine()();
      if (kind != Product::kBFloat16) continue;
      word = as_bits(normal());
      if (!is_sum) word = (word & 0xFFFF0000U) | as_bits(normal()) >> 16;
    }
  }
  return product;
}

bool equals_plain(Product product, Product::Kind kind) {
  Words expected(product.c.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    expected[i] = plain_element(product, kind, static_cast<std::int64_t>(i) / product.N,
                                static_cast<std::int64_t>(i) % product.N);
  }
  product.run(kind);
  return product.c == expected;
}

// Numbers below 2^-126 are zero: of a, and sums.
void expect_flushed_subnormals() {
  const auto product_of = [](std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    Product product{1, 1, 1};
    product.a[0] = a, product.b[0] = b, product.c[0] = c;
    product.run(Product::kBFloat16);
    return product.c[0];
  };
  const std::uint32_t one = 0x3F80, subnormal = 0x40, smallest = 0x80, tiny = as_bits(0x1p-70F) >> 16;
  EXPECT(product_of(smallest, one, 0) == as_bits(0x1p-126F));
  EXPECT(product_of(subnormal, one, 0) == 0);
  EXPECT(product_of(tiny, tiny, 0) == 0);
  EXPECT(product_of(0, 0, subnormal << 16) == 0);
}

constexpr Configuration uniform_configuration(std::int64_t rows, std::int64_t row_bytes) {
  Configuration configuration;
  for (int tile = 0; tile < 8; ++tile) configuration.set(tile, rows, row_bytes);
  return configuration;
}

constexpr std::int64_t kMovedRows = 3, kMovedRowBytes = 20;
constexpr Configuration kMoved = uniform_configuration(kMovedRows, kMovedRowBytes);

using MovedTile = std::array<unsigned char, kMovedRows * kMovedRowBytes>;

// Loads by all forms of addresses that a compiler may choose, zeroes one tile, and stores.
TILES void move(const unsigned char* from, MovedTile* to) {
  FINISH_STORES();
  _tile_loadconfig(&kMoved);
  __asm__ volatile(
      "mov %0, %%rax\n\t"
      "mov %0, %%r13\n\t"
      "mov $-24, %%rbx\n\t"
      "mov $10, %%r12\n\t"
      "tileloadd (%%rax,%%r12,2), %%tmm1\n\t"
      "tileloadd -64(%%r13,%%rbx,1), %%tmm2\n\t"
      "tileloadd 1000(%%rax,%%r12,4), %%tmm3\n\t"
      "tileloadd -1000(%%r13), %%tmm4\n\t"
      "tileloadd (%%r13,%%r12,8), %%tmm5\n\t"
      :
      : "r"(from)
      : "rax", "rbx", "r12", "r13", "memory");
  _tile_zero(5);
  _tile_stored(1, to + 0, kMovedRowBytes);
  _tile_stored(2, to + 1, kMovedRowBytes);
  _tile_stored(3, to + 2, kMovedRowBytes);
  _tile_stored(4, to + 3, kMovedRowBytes);
  _tile_stored(5, to + 4, kMovedRowBytes);
  _tile_release();
}

void expect_moves() {
  std::vector<unsigned char> from(2200);
  for (unsigned char& byte : from) byte = static_cast<unsigned char>(random_engine()());
  constexpr std::int64_t kStart = 1050;
  constexpr std::int64_t kForms[][2] = {{0, 20}, {-64, -24}, {1000, 40}, {-1000, 0}};  // offset and stride
  MovedTile to[6];
  for (MovedTile& tile : to) tile.fill(99);
  move(from.data() + kStart, to);
  for (int form = 0; form < 4; ++form) {
    for (std::int64_t row = 0; row < kMovedRows; ++row) {
      EXPECT(std::memcmp(to[form].data() + row * kMovedRowBytes,
                         from.data() + kStart + kForms[form][0] + row * kForms[form][1],
                         kMovedRowBytes) == 0);
    }
  }
  MovedTile zeros = {}, untouched;
  untouched.fill(99);
  EXPECT(to[4] == zeros && to[5] == untouched);
}

TILES void configure(const Configuration& configuration) {
  FINISH_STORES();
  _tile_loadconfig(&configuration);
}
TILES void load(const Words& words) {
  FINISH_STORES();
  _tile_loadd(1, words.data(), 64);
}
TILES Words stored(std::size_t words) {
  Words to(words);
  _tile_stored(1, to.data(), 64);
  return to;
}
TILES void multiply() { _tile_dpbssd(0, 1, 2); }
TILES void release() { _tile_release(); }

void expect_own_tiles_of_threads() {
  const Words words(16, 77);
  configure(uniform_configuration(1, 64));
  load(words);
  bool fine = false;
  std::thread([&fine] { fine = equals_plain(random_product(Product::kUS), Product::kUS); }).join();
  EXPECT(fine && stored(16) == words);
  configure(uniform_configuration(2, 64));
  EXPECT(stored(32) == Words(32));
  release();
}

// Runs in a child without output. Returns its status as waitpid() gives it.
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
  EXPECT(child > 0 && waitpid(child, &status, 0) == child);
  return status;
}

template <class Function>
bool is_refused(const Function& function) {
  const int status = status_of_child(function);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGILL;
}

void expect_refusals() {
  const auto load_of = [](std::int64_t rows, std::size_t words) {
    return [rows, words] {
      configure(uniform_configuration(rows, 4 * rows));
      load(Words(words));
    };
  };
  const auto multiply_of = [](std::int64_t rows) {
    return [rows] {
      configure(uniform_configuration(rows, 64));
      multiply();
    };
  };
  EXPECT(is_refused([] { __asm__ volatile("ud2"); }));
  EXPECT(is_refused(multiply));
  EXPECT(is_refused(load_of(0, 256)));
  EXPECT(status_of_child(multiply_of(16)) == 0);
  EXPECT(is_refused(multiply_of(8)));  // 16 words a row of the left operand, 8 rows of the right one
  EXPECT(status_of_child(load_of(16, 256)) == 0);
  if (__asan_address_is_poisoned != nullptr) EXPECT(status_of_child(load_of(16, 255)) != 0);
}

}  // namespace

void test_tile_emulation() {
  const struct {
    const char* name;
    Product::Kind kind;
  } products[] = {{"tdpbssd", Product::kSS},
                  {"tdpbsud", Product::kSU},
                  {"tdpbusd", Product::kUS},
                  {"tdpbuud", Product::kUU},
                  {"tdpbf16ps", Product::kBFloat16}};
  for (const auto& [name, kind] : products) {
    describe(name);
    for (int i = 0; i < 30; ++i) EXPECT(equals_plain(random_product(kind), kind));
  }
  expect_flushed_subnormals();

  describe("tile loads and stores");
  expect_moves();
  expect_own_tiles_of_threads();

  describe("what tiles refuse");
  expect_refusals();
}

}  // namespace clipup::tests
