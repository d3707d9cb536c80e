#include "simd_avx2.h"
// After the instruction set (simd.h).
#include "microkernels.h"

namespace clipup {

extern const Kernels kAvx2 = tier("avx2");

}  // namespace clipup
