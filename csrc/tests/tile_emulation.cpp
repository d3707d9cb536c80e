#include "tile_emulation.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <cstring>

namespace clipup::tests {
namespace {

constexpr int kTiles = 8, kRows = 16;

using Words = std::uint32_t __attribute__((vector_size(64)));
using SignedWords = std::int32_t __attribute__((vector_size(64)));

// A new thread's tiles are not configured.
thread_local TileConfiguration configuration;
thread_local Words tiles[kTiles][kRows];

bool configure(const TileConfiguration& wanted) {
  configuration = wanted;
  std::memset(tiles, 0, sizeof tiles);
  bool valid = wanted.palette <= 1 && wanted.start_row == 0;
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = wanted.rows[tile];
    valid = valid && rows <= (tile < kTiles ? kRows : 0) &&
            wanted.row_bytes[tile] == (rows > 0 ? sizeof(Words) : 0);
  }
  return valid;
}

// A CPU that has tiles executes ldtilecfg and tilerelease without the kernel's permission too. Then the
// configuration is in the registers that the signal saved, in XSAVE's standard layout. Tiles are zeroed only
// if it has changed.
bool take_configuration_of_cpu(const ucontext_t& context) {
  constexpr unsigned kTileConfiguration = 17;
  const auto* const saved = reinterpret_cast<const unsigned char*>(context.uc_mcontext.fpregs);
  std::uint64_t components = 0, components_in_use = 0;
  std::memcpy(&components, saved + 472, sizeof components);
  std::memcpy(&components_in_use, saved + 512, sizeof components_in_use);
  if ((components >> kTileConfiguration & 1U) == 0) return true;
  TileConfiguration current;
  if ((components_in_use >> kTileConfiguration & 1U) != 0) {
    unsigned size = 0, offset = 0, c = 0, d = 0;
    __get_cpuid_count(0xD, kTileConfiguration, &size, &offset, &c, &d);
    std::memcpy(&current, saved + offset, sizeof current);
  }
  return std::memcmp(&current, &configuration, sizeof current) == 0 || configure(current);
}

struct Instruction {
  int code;           // opcode, and before it the prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, rm, vvvv;  // operands in registers
  bool has_address;
  std::intptr_t address, stride, end;  // stride: the index register, scaled
};

// VEX of three bytes in map 0F38, with 128 bits and W0: C4 RXBmmmmm WvvvvLpp opcode ModRM [SIB]
// [displacement].
bool decode(const greg_t* registers, Instruction& to) {
  static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const auto* next = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
  if (next[0] != 0xC4 || (next[1] & 0x9F) != 0x82 || (next[2] & 0x84) != 0) return false;
  const int high_index = (next[1] & 0x40) != 0 ? 0 : 8, high_base = (next[1] & 0x20) != 0 ? 0 : 8;
  const int mod = next[4] >> 6;
  to = {(next[2] & 3) << 8 | next[3], next[4] >> 3 & 7, next[4] & 7, ~next[2] >> 3 & 15, mod != 3, 0, 0, 0};
  next += 5;
  if (to.has_address) {
    int base = to.rm;
    if (base == 4) {
      const int index = (*next >> 3 & 7) + high_index;
      if (index != 4) to.stride = registers[kOrder[index]] * (1 << (*next >> 6));
      base = *next++ & 7;
    }
    if (mod == 0 && base == 5) return false;  // no base register
    to.address = registers[kOrder[base + high_base]];
    if (mod == 1) to.address += static_cast<std::int8_t>(*next++);
    if (mod == 2) {
      std::int32_t displacement = 0;
      std::memcpy(&displacement, next, sizeof displacement);
      to.address += displacement;
      next += sizeof displacement;
    }
  }
  to.end = reinterpret_cast<std::intptr_t>(next);
  return true;
}

// sums[M,16] += left[M,16] . right[16,16] in words of four int8 or two bfloat16. Of bfloat16: fused sums over
// even and over odd positions, added at the end. Subnormal numbers are zero, whatever MXCSR says; the kernel
// restores it after the signal.
__attribute__((target("avx512f"))) void multiply(bool bfloat16, int M, const Words* left, const Words* right,
                                                 Words* sums) {
  _mm_setcsr(_mm_getcsr() | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  for (int m = 0; m < M; ++m) {
    Words sum = sums[m];
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < kRows; ++k) {
      const Words l = Words{} + left[m][k], r = right[k];
      if (bfloat16) {
        even = _mm512_fmadd_ps(reinterpret_cast<__m512>(l << 16), reinterpret_cast<__m512>(r << 16), even);
        odd = _mm512_fmadd_ps(reinterpret_cast<__m512>(l & 0xFFFF0000U),
                              reinterpret_cast<__m512>(r & 0xFFFF0000U), odd);
      } else {
        for (int up = 0; up < 32; up += 8) {
          sum += reinterpret_cast<Words>((reinterpret_cast<SignedWords>(l << up) >> 24) *
                                         (reinterpret_cast<SignedWords>(r << up) >> 24));
        }
      }
    }
    if (bfloat16) sum = reinterpret_cast<Words>(reinterpret_cast<__m512>(sum) + (even + odd));
    sums[m] = sum;
  }
}

bool execute(const Instruction& instruction) {
  const int tile = instruction.reg, left = instruction.rm, right = instruction.vvvv;
  const int rows = configuration.rows[tile];
  switch (instruction.code) {
    case 0x049:  // ldtilecfg, tilerelease
      if (!instruction.has_address) return configure({});
      return configure(*reinterpret_cast<const TileConfiguration*>(instruction.address));
    case 0x349:  // tilezero
      std::memset(tiles[tile], 0, sizeof tiles[tile]);
      return rows > 0;
    case 0x14B:                               // tileloaddt1
    case 0x34B:                               // tileloadd
    case 0x24B:                               // tilestored
      for (int row = 0; row < rows; ++row) {  // by copies that the address sanitizer checks
        auto* const memory = reinterpret_cast<void*>(instruction.address + row * instruction.stride);
        Words* const own = &tiles[tile][row];
        if (instruction.code == 0x24B) std::memcpy(memory, own, sizeof *own);
        if (instruction.code != 0x24B) std::memcpy(own, memory, sizeof *own);
      }
      return rows > 0;
    case 0x35E:  // tdpbssd
    case 0x25C:  // tdpbf16ps
      if (rows == 0 || configuration.rows[left] != rows || configuration.rows[right] != kRows) return false;
      multiply(instruction.code == 0x25C, rows, tiles[left], tiles[right], tiles[tile]);
      return true;
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
  return __builtin_cpu_supports("avx512f") != 0 && sigaction(SIGILL, &action, &previous) == 0;
}

}  // namespace clipup::tests
#else
namespace clipup::tests {
bool emulate_tiles() { return false; }
}  // namespace clipup::tests
#endif
