// The kernels of csrc/cuda as C++, for the native tests.
#include "cuda_emulation.h"

// cuda_emulation.h must come first.
#include "../cuda/dispatch.cu"
#include "../cuda/topk_gating.cu"
#include "../cuda/topk_gating_backward.cu"
