#include "microkernels.h"

namespace clipup {

extern const Kernels kAmx = tier("amx");

}  // namespace clipup
