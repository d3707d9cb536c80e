// Emulates AMX for the native tests, so that they run kernels of tile instructions on a CPU that has none, and check
// what these read: sanitizers do not see a tile load.
#pragma once

namespace clipup::tests {

// From here on, a handler of SIGILL executes ldtilecfg, tilerelease, tilezero, tileloadd, tileloaddt1, tilestored, the
// int8 products tdpb{ss,su,us,uu}d and tdpbf16ps, with tiles of each thread's own. Whatever else raises the signal ends
// the process as before; so do operands and configurations that a CPU refuses. Returns false, and installs nothing,
// where this is not x86-64 Linux.
//
// A CPU that has tiles raises SIGILL only until the kernel has permitted them (arch_prctl).
bool emulate_tiles();

}  // namespace clipup::tests
