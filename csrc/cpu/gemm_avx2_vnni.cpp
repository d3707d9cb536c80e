#include "simd_avx2.h"
// After the instruction set (simd.h).
#include "microkernels.h"

namespace clipup {

extern const Kernels kAvx2Vnni = tier("avx2_vnni");

}  // namespace clipup
