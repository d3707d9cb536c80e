// The kernels of csrc/cuda as C++, for the native tests.
#include "../cuda/combine.cu"
#include "../cuda/dispatch.cu"
#include "../cuda/routing.cu"
#include "cuda_emulation.h"
