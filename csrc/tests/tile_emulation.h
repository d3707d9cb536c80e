// Emulates AMX for the native tests, so that they run kernels of tile instructions on a CPU that has none,
// and check what these read: sanitizers do not see a tile load.
#pragma once

#include <cstdint>

namespace clipup::tests {

// From here on, a handler of SIGILL executes ldtilecfg, tilerelease, tilezero, tileloadd, tileloaddt1,
// tilestored, tdpbssd and tdpbf16ps, with each thread's own tiles of 64 bytes a row. Any other instruction
// and configuration ends the process by SIGILL. Returns false, and installs nothing, where this is not x86-64
// Linux with AVX-512. A CPU that has tiles raises SIGILL until the kernel has permitted them (arch_prctl).
bool emulate_tiles();

// What ldtilecfg reads.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

}  // namespace clipup::tests
