#include "simd_neon.h"
// After the instruction set (simd.h).
#include "microkernels.h"

namespace clipup {

extern const Kernels kNeonDotprod = tier("neon_dotprod");

}  // namespace clipup
