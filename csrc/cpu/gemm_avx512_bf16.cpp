#include "simd_avx512.h"
// After the instruction set (simd.h).
#include "microkernels.h"

namespace clipup {

extern const Kernels kAvx512Bf16 = tier("avx512_bf16");

}  // namespace clipup
