#include "tile_emulation.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace clipup::tests {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows, row_bytes;  // as configured; 0: not usable
  alignas(64) unsigned char bytes[kRows][kRowBytes];
};

// A new thread's tiles are not configured. Bytes past the configured rows and columns are always zero: configure()
// zeroes all, and nothing writes those.
thread_local Tile tiles[kTiles];
thread_local unsigned char configuration[64];
constexpr unsigned char kNoTiles[sizeof configuration] = {};

// Palette, start row, 14 bytes of zeros, bytes a row of 16 tiles in two bytes each, their rows in one byte each.
bool configure(const unsigned char* wanted) {
  std::memcpy(configuration, wanted, sizeof configuration);
  std::memset(tiles, 0, sizeof tiles);
  if (configuration[0] == 0) return true;
  bool valid = configuration[0] == 1;
  for (int i = 1; i < 16; ++i) valid = valid && configuration[i] == 0;
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = configuration[16 + 2 * i] | configuration[17 + 2 * i] << 8;
    const int rows = configuration[48 + i];
    if (i < kTiles) tiles[i].rows = rows, tiles[i].row_bytes = row_bytes;
    valid = valid && row_bytes <= kRowBytes && rows <= kRows && (rows == 0) == (row_bytes == 0) &&
            (i < kTiles || rows == 0);
  }
  return valid;
}

// A CPU that has tiles executes ldtilecfg and tilerelease without the kernel's permission too. Then the configuration
// is in the registers that the signal saved, in XSAVE's standard layout. Tiles are zeroed only if it has changed.
bool take_configuration_of_cpu(const ucontext_t& context) {
  constexpr unsigned kTileConfiguration = 17;
  const auto* const saved = reinterpret_cast<const unsigned char*>(context.uc_mcontext.fpregs);
  const auto is_in = [saved](int components) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, saved + components, sizeof bits);
    return (bits >> kTileConfiguration & 1U) != 0;
  };
  constexpr int kSavable = 472, kInUse = 512;
  if (!is_in(kSavable)) return true;
  unsigned size = 0, offset = 0, c = 0, d = 0;
  __get_cpuid_count(0xD, kTileConfiguration, &size, &offset, &c, &d);
  const unsigned char* const current = is_in(kInUse) ? saved + offset : kNoTiles;
  return std::memcmp(current, configuration, sizeof configuration) == 0 || configure(current);
}

struct Instruction {
  int code;                     // opcode, and before it the prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, rm, vvvv;            // operands in registers
  bool has_address, has_index;  // has_index: as in all but ldtilecfg
  std::intptr_t address, stride, end;
};

// VEX of three bytes in map 0F38, with 128 bits and W0: C4 RXBmmmmm WvvvvLpp opcode ModRM [SIB] [displacement].
bool decode(const greg_t* registers, Instruction& to) {
  static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const auto* next = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
  if (next[0] != 0xC4 || (next[1] & 0x9F) != 0x82 || (next[2] & 0x84) != 0) return false;
  const int high_index = (next[1] & 0x40) != 0 ? 0 : 8;
  const int high_base = (next[1] & 0x20) != 0 ? 0 : 8;
  to.vvvv = ~next[2] >> 3 & 15;
  to.code = (next[2] & 3) << 8 | next[3];
  const int mod = next[4] >> 6;
  to.reg = next[4] >> 3 & 7;
  to.rm = next[4] & 7;
  next += 5;
  to.has_address = mod != 3;
  to.has_index = to.has_address && to.rm == 4;
  to.address = to.stride = 0;
  if (to.has_address) {
    int base = to.rm;
    if (to.has_index) {
      const int index = (*next >> 3 & 7) + high_index;
      if (index != 4) to.stride = registers[kOrder[index]] * (1 << (*next >> 6));
      base = *next++ & 7;
    }
    const bool no_base = mod == 0 && base == 5;
    std::int32_t displacement = 0;
    if (mod == 1) displacement = static_cast<std::int8_t>(*next++);
    if (mod == 2 || no_base) {
      std::memcpy(&displacement, next, sizeof displacement);
      next += sizeof displacement;
    }
    to.address = displacement;
    if (!no_base) to.address += registers[kOrder[base + high_base]];
    if (no_base && !to.has_index) to.address += reinterpret_cast<std::intptr_t>(next);
  }
  to.end = reinterpret_cast<std::intptr_t>(next);
  return true;
}

// Four words of a row.
__m128i load(const unsigned char* words) { return _mm_load_si128(reinterpret_cast<const __m128i*>(words)); }

__m128i repeat(const unsigned char* word) {
  int value = 0;
  std::memcpy(&value, word, sizeof value);
  return _mm_set1_epi32(value);
}

// Stores what is in the configured columns.
void store(Tile& tile, int row, int byte, __m128i words) {
  std::memcpy(tile.bytes[row] + byte, &words, std::min(tile.row_bytes - byte, 16));
}

// c[M,N] += a[M,K] . b[K,N], modulo 2^32; each word of a and b is four int8.
void multiply_int8(bool a_is_signed, bool b_is_signed, const Tile& a, const Tile& b, Tile& c) {
  const auto widen = [](__m128i even_bytes, bool is_signed) {
    const __m128i high = _mm_slli_epi16(even_bytes, 8);
    return is_signed ? _mm_srai_epi16(high, 8) : _mm_srli_epi16(high, 8);
  };
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes; n += 16) {
      __m128i sums = load(c.bytes[m] + n);
      for (int k = 0; k < b.rows; ++k) {
        __m128i left = repeat(a.bytes[m] + 4 * k), right = load(b.bytes[k] + n);
        for (int odd = 0; odd < 2; ++odd) {
          sums = _mm_add_epi32(sums, _mm_madd_epi16(widen(left, a_is_signed), widen(right, b_is_signed)));
          left = _mm_srli_epi16(left, 8);
          right = _mm_srli_epi16(right, 8);
        }
      }
      store(c, m, n, sums);
    }
  }
}

// The same of pairs of bfloat16: fused sums over even and over odd positions, which are added at the end. Subnormal
// numbers are zero, whatever MXCSR says; the kernel restores it after the signal.
__attribute__((target("fma"))) void multiply_bfloat16(const Tile& a, const Tile& b, Tile& c) {
  _mm_setcsr(_mm_getcsr() | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  const __m128i high = _mm_set1_epi32(static_cast<int>(0xFFFF0000U));
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes; n += 16) {
      __m128 even = _mm_setzero_ps(), odd = even;
      for (int k = 0; k < b.rows; ++k) {
        const __m128i left = repeat(a.bytes[m] + 4 * k), right = load(b.bytes[k] + n);
        even = _mm_fmadd_ps(_mm_castsi128_ps(_mm_slli_epi32(left, 16)),
                            _mm_castsi128_ps(_mm_slli_epi32(right, 16)), even);
        odd = _mm_fmadd_ps(_mm_castsi128_ps(_mm_and_si128(left, high)),
                           _mm_castsi128_ps(_mm_and_si128(right, high)), odd);
      }
      const __m128 sums = _mm_castsi128_ps(load(c.bytes[m] + n));
      store(c, m, n, _mm_castps_si128(_mm_add_ps(sums, _mm_add_ps(even, odd))));
    }
  }
}

bool multiply(const Instruction& instruction) {
  if (instruction.has_address || instruction.vvvv >= kTiles) return false;
  Tile& c = tiles[instruction.reg];
  const Tile &a = tiles[instruction.rm], &b = tiles[instruction.vvvv];
  if (&c == &a || &c == &b || &a == &b || c.rows == 0 || a.rows != c.rows || b.row_bytes != c.row_bytes ||
      b.rows * 4 != a.row_bytes || c.row_bytes % 4 != 0) {
    return false;
  }
  if (instruction.code == 0x25C) {
    multiply_bfloat16(a, b, c);
  } else {
    multiply_int8((instruction.code & 0x200) != 0, (instruction.code & 0x100) != 0, a, b, c);
  }
  return true;
}

// Row by row, by calls that the address sanitizer checks.
bool load_or_store(const Instruction& instruction, bool is_load) {
  Tile& tile = tiles[instruction.reg];
  if (!instruction.has_index || tile.rows == 0) return false;
  for (int row = 0; row < tile.rows; ++row) {
    auto* const memory = reinterpret_cast<void*>(instruction.address + row * instruction.stride);
    void* const own = tile.bytes[row];
    std::memcpy(is_load ? own : memory, is_load ? memory : own, tile.row_bytes);
  }
  return true;
}

bool execute(const Instruction& instruction) {
  Tile& tile = tiles[instruction.reg];
  switch (instruction.code) {
    case 0x049: {  // ldtilecfg, tilerelease
      unsigned char wanted[sizeof configuration] = {};
      if (instruction.has_address) {
        std::memcpy(wanted, reinterpret_cast<const void*>(instruction.address), sizeof wanted);
      }
      return configure(wanted);
    }
    case 0x349:  // tilezero
      std::memset(tile.bytes, 0, sizeof tile.bytes);
      return tile.rows > 0;
    case 0x14B:  // tileloaddt1
    case 0x34B:  // tileloadd
    case 0x24B:  // tilestored
      return load_or_store(instruction, instruction.code != 0x24B);
    case 0x05E:  // tdpbuud
    case 0x15E:  // tdpbusd
    case 0x25E:  // tdpbsud
    case 0x35E:  // tdpbssd
    case 0x25C:  // tdpbf16ps
      return multiply(instruction);
    default:
      return false;
  }
}

struct sigaction previous;

void handle(int, siginfo_t*, void* frame) {
  auto& context = *static_cast<ucontext_t*>(frame);
  Instruction instruction;
  if (take_configuration_of_cpu(context) && decode(context.uc_mcontext.gregs, instruction) &&
      execute(instruction)) {
    context.uc_mcontext.gregs[REG_RIP] = instruction.end;
  } else {
    sigaction(SIGILL, &previous, nullptr);  // raised again after return
  }
}

}  // namespace

bool emulate_tiles() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, &previous) == 0;
}

}  // namespace clipup::tests
#else
namespace clipup::tests {
bool emulate_tiles() { return false; }
}  // namespace clipup::tests
#endif
