#include "microkernels.h"

namespace clipup {

extern const Kernels kPortable = tier("portable");

}  // namespace clipup
