#include "microkernels.h"

namespace clipup {

const Kernels kAvx2 = tier("avx2");

}  // namespace clipup
