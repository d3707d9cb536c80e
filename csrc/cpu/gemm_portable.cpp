#ifdef __ARM_NEON
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif
// After the instruction set (simd.h).
#include "microkernels.h"

namespace clipup {

extern const Kernels kPortable = tier("portable");

}  // namespace clipup
