// The kernels of csrc/cuda as C++, for the native tests.
#include "cuda_emulation.h"

// What stands in for the CUDA runtime comes first.
#include "../cuda/combine.cu"
#include "../cuda/dispatch.cu"
#include "../cuda/routing.cu"
#include "../cuda/routing_backward.cu"
