#include "microkernels.h"

namespace clipup {

const Kernels kAvx512 = tier("avx512");

}  // namespace clipup
