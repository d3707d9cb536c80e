// The instruction tier in use: the fastest that CPU and operating system support, or the one that
// CLIPUP_CPU_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#ifdef CLIPUP_X86_TIERS
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(CLIPUP_ARM_TIERS) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(CLIPUP_ARM_TIERS)
#include <sys/auxv.h>
#endif

namespace clipup {

// Defined in gemm_<tier>.cpp.
extern const Kernels kPortable;
#ifdef CLIPUP_X86_TIERS
extern const Kernels kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16;
#ifdef CLIPUP_AVX2_VNNI_TIER
extern const Kernels kAvx2Vnni;
#endif
#ifdef CLIPUP_AMX_TIER
extern const Kernels kAmx;
#endif
#elif defined(CLIPUP_ARM_TIERS)
extern const Kernels kNeonDotprod;
#endif

bool tiles_are_emulated = false;  // set by the native tests alone

namespace {

struct Tier {
  const Kernels* kernels;
  bool supported;
  bool slow = false;  // used if it is named
};

#ifdef CLIPUP_X86_TIERS
// Bits of cpuid's leaf 7, register edx.
constexpr unsigned kBFloat16Tiles = 1U << 22U, kTiles = 1U << 24U, kInt8Tiles = 1U << 25U;

// Whether the CPU has these tile instructions, and Linux (from 5.16 on) lets this process use them: it saves
// the tile registers only for processes that ask.
bool may_use_tiles([[maybe_unused]] unsigned wanted) {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & wanted) == wanted &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Not every compiler's __builtin_cpu_supports knows f16c.
bool has_float16_conversions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kF16c = 1U << 29U;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kF16c) != 0;
}

#ifdef CLIPUP_AVX2_VNNI_TIER
// Nor avxvnni.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvxVnni = 1U << 4U;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvxVnni) != 0;
}
#endif
#elif defined(CLIPUP_ARM_TIERS)
bool has_dot_products() {
#ifdef __APPLE__
  int has = 0;
  std::size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
}
#endif

// Fastest first. Intel's processors multiply pairs of bfloat16 no faster than floats (a Xeon of 2023 at 0.66
// of their rate), AMD's twice as fast. __builtin_cpu_supports reads cpuid and checks that the operating
// system saves the registers.
const Tier* tiers(std::size_t& count) {
#ifdef CLIPUP_X86_TIERS
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_float16_conversions();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq");
  static const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  static const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  static const Tier all[] = {
#ifdef CLIPUP_AMX_TIER
      {&kAmx, bf16 && __builtin_cpu_supports("avx512vbmi") &&
                  (tiles_are_emulated || may_use_tiles(kTiles | kInt8Tiles | kBFloat16Tiles))},
#endif
      {&kAvx512Bf16, bf16, __builtin_cpu_is("intel") != 0},
      {&kAvx512Vnni, vnni},
      {&kAvx512, avx512},
#ifdef CLIPUP_AVX2_VNNI_TIER
      {&kAvx2Vnni, avx2 && has_avx_vnni()},
#endif
      {&kAvx2, avx2},
      {&kPortable, true}};
#elif defined(CLIPUP_ARM_TIERS)
  static const Tier all[] = {{&kNeonDotprod, has_dot_products()}, {&kPortable, true}};
#else
  static const Tier all[] = {{&kPortable, true}};
#endif
  count = sizeof all / sizeof all[0];
  return all;
}

const Kernels& choose() {
  std::size_t count = 0;
  const Tier* const all = tiers(count);
  const char* const wanted = std::getenv("CLIPUP_CPU_ISA");
  std::string names;
  for (std::size_t i = 0; i < count; ++i) {
    if (!all[i].supported) continue;
    const bool free = wanted == nullptr || *wanted == '\0';
    if (free ? !all[i].slow : std::string(wanted) == all[i].kernels->name) return *all[i].kernels;
    names += (names.empty() ? "" : ", ") + std::string(all[i].kernels->name);
  }
  throw std::invalid_argument("CLIPUP_CPU_ISA: expected one that this CPU has (" + names + "), got " +
                              wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* instruction_tier() { return kernels().name; }

void after_tasks() {
  if (kernels().after_tasks != nullptr) kernels().after_tasks();
}

bool has_matrix_tiles() {
#ifdef CLIPUP_X86_TIERS
  return may_use_tiles(kTiles | kBFloat16Tiles);
#else
  return false;
#endif
}

}  // namespace clipup
