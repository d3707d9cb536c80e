#include "microkernels.h"

namespace clipup {

extern const Kernels kAvx512Vnni = tier("avx512_vnni");

}  // namespace clipup
