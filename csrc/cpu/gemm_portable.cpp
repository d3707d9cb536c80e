#include "microkernels.h"

namespace clipup {

const Kernels kPortable = tier("portable");

}  // namespace clipup
