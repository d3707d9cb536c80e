#include "microkernels.h"

namespace clipup {

extern const Kernels kAvx512 = tier("avx512");

}  // namespace clipup
