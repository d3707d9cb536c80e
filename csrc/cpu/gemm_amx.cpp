#include "simd_avx512.h"
// After the instruction set (simd.h).
#include "microkernels.h"

namespace clipup {

extern const Kernels kAmx = tier("amx");

}  // namespace clipup
