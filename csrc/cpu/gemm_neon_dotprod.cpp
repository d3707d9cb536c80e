#include "microkernels.h"

namespace clipup {

extern const Kernels kNeonDotprod = tier("neon_dotprod");

}  // namespace clipup
