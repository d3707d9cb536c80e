// The stages of csrc/cuda as a library whose launches go to a function of its caller, which executes the
// kernels' PTX (tests/support/ptx/cuda_driver.py). The linker redirects two functions of the CUDA runtime:
// --wrap.
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <utility>

#include "../cuda/dispatch.cu"
#include "../cuda/topk_gating.cu"
#include "../cuda/topk_gating_backward.cu"

namespace {

// Runs a kernel on the addresses of its arguments; false if that fails.
using Run = bool (*)(const char* kernel, unsigned blocks, unsigned threads, void** arguments);
Run run_kernel = nullptr;

std::map<const void*, const char*>& kernel_names() {
  static std::map<const void*, const char*> by_host_function;
  return by_host_function;
}

// Calls a stage with arguments of 8 bytes each.
template <auto kStage>
struct Call;
template <class Result, class... Parameters, Result (*kStage)(Parameters...)>
struct Call<kStage> {
  template <class Value>
  static Value value_of(std::int64_t argument) {
    Value value;
    std::memcpy(&value, &argument, sizeof value);  // the lowest bytes
    return value;
  }
  template <std::size_t... I>
  static std::int64_t with(const std::int64_t* arguments, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
      return kStage(value_of<Parameters>(arguments[I])...), 0;
    } else {
      return kStage(value_of<Parameters>(arguments[I])...);
    }
  }
  static std::int64_t run(const std::int64_t* arguments) {
    return with(arguments, std::index_sequence_for<Parameters...>());
  }
};

// By their names in the Python module (csrc/bindings.cpp).
const std::map<std::string, std::int64_t (*)(const std::int64_t*)> kStages = {
    {"cuda_dispatch", Call<clipup::cuda::dispatch>::run},
    {"cuda_dispatch_workspace_bytes", Call<clipup::cuda::dispatch_workspace_bytes>::run},
    {"cuda_topk_gating", Call<clipup::cuda::topk_gating>::run},
    {"cuda_topk_gating_workspace_bytes", Call<clipup::cuda::topk_gating_workspace_bytes>::run},
    {"cuda_topk_gating_backward", Call<clipup::cuda::topk_gating_backward>::run},
    {"cuda_topk_gating_backward_workspace_bytes",
     Call<clipup::cuda::topk_gating_backward_workspace_bytes>::run},
};

}  // namespace

extern "C" {

// Calls a stage. Returns its result, and in `error` the message of the exception that it throws, or "".
std::int64_t call(const char* stage, const std::int64_t* arguments, Run run, char (&error)[256]) {
  run_kernel = run;
  error[0] = '\0';
  try {
    return kStages.at(stage)(arguments);
  } catch (const std::exception& thrown) {
    return std::strncpy(error, thrown.what(), sizeof error - 1), -1;
  }
}

void __wrap___cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*,
                                   uint3*, dim3*, dim3*, int*) {
  kernel_names()[host_function] = name;
}

cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  const char* const name = kernel_names().at(kernel);
  return run_kernel(name, config->gridDim.x, config->blockDim.x, arguments) ? cudaSuccess : cudaErrorUnknown;
}

}  // extern "C"
