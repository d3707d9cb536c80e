#include "microkernels.h"

namespace clipup {

extern const Kernels kAvx2 = tier("avx2");

}  // namespace clipup
