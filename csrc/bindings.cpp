// The Python module clipup_kernels._C: the functions of moe.h and moe_cuda.h, with their arguments in their
// order. An address or an enumerator is an integer (0: a null pointer), a struct the tuple of its members.
// These calls release the GIL, std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "moe.h"
#ifdef CLIPUP_WITH_CUDA
#include "moe_cuda.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

// What Python passes for a parameter.
template <class T>
using Passed = std::conditional_t<
    std::is_pointer_v<T>, std::uintptr_t,
    std::conditional_t<std::is_enum_v<T>, int, std::conditional_t<std::is_class_v<T>, py::tuple, T>>>;

// An item of a tuple, which becomes the member that it initializes.
struct Item {
  PyObject* object;
  template <class T>
  operator T() const;
};

// How many members an aggregate has: the most items that initialize it.
template <class Struct, std::size_t... I>
constexpr auto takes(std::index_sequence<I...>) -> decltype(Struct{(void(I), Item{})...}, bool{}) {
  return true;
}
template <class Struct>
constexpr bool takes(...) {
  return false;
}
template <class Struct, std::size_t kMost = 32>
constexpr std::size_t member_count() {
  if constexpr (takes<Struct>(std::make_index_sequence<kMost>())) {
    return kMost;
  } else {
    return member_count<Struct, kMost - 1>();
  }
}

template <class Struct, std::size_t... I>
Struct struct_of(const py::tuple& members, std::index_sequence<I...>) {
  if (members.size() != sizeof...(I)) throw py::type_error("expected a tuple of all members of a struct");
  return {Item{PyTuple_GET_ITEM(members.ptr(), I)}...};
}

template <class T>
T native(const Passed<T>& value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);  // NOLINT(performance-no-int-to-ptr)
  } else if constexpr (std::is_class_v<T>) {
    return struct_of<T>(value, std::make_index_sequence<member_count<T>()>());
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
Item::operator T() const {
  return native<T>(py::cast<Passed<T>>(py::handle(object)));
}

template <auto kFunction>
struct Call;
template <class Result, class... Parameters, Result (*kFunction)(Parameters...)>
struct Call<kFunction> {
  static Result run(const Passed<std::decay_t<Parameters>>&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> converted{native<std::decay_t<Parameters>>(arguments)...};
    const py::gil_scoped_release release;
    return std::apply(kFunction, converted);
  }
};

py::tuple packed_layout(int dtype, int packed_type) {
  const auto [panel, per_word] = clipup::packed_layout(clipup::DType{dtype}, clipup::PackedType{packed_type});
  return py::make_tuple(panel, per_word);
}

// A block of the pool, for packed weights and for outputs that are allocated at every step: fresh memory
// costs page faults. The block returns to the pool when the object, whose buffer torch.frombuffer() wraps, is
// destroyed.
class Block {
 public:
  Block(std::int64_t bytes, bool lasting) : bytes_(bytes), memory_(clipup::acquire_memory(bytes, lasting)) {}
  ~Block() { clipup::return_memory(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  py::buffer_info buffer() const { return {static_cast<unsigned char*>(memory_), bytes_}; }

 private:
  std::int64_t bytes_;
  void* memory_;
};

#ifdef CLIPUP_WITH_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

py::dict build_info() {
  return py::dict("version"_a = CLIPUP_VERSION, "compiler"_a = CLIPUP_COMPILER, "openmp"_a = kOpenMP,
                  "cuda"_a = kCuda, "cuda_archs"_a = py::str(CLIPUP_CUDA_ARCHS).attr("split")());
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native ops of clipup_kernels; see csrc/moe.h.";
  m.def("router_logits", &Call<clipup::router_logits>::run);
  m.def("router_logits_backward", &Call<clipup::router_logits_backward>::run);
  m.def("topk_gating", &Call<clipup::topk_gating>::run);
  m.def("topk_gating_backward", &Call<clipup::topk_gating_backward>::run);
  m.def("dispatch", &Call<clipup::dispatch>::run);
  m.def("permute", &Call<clipup::permute>::run);
  m.def("gather_sum", &Call<clipup::gather_sum>::run);
  m.def("combine_backward", &Call<clipup::combine_backward>::run);
  m.def("expert_mlp_forward", &Call<clipup::expert_mlp_forward>::run);
  m.def("sparse_mlp_forward", &Call<clipup::sparse_mlp_forward>::run);
  m.def("expert_mlp_backward", &Call<clipup::expert_mlp_backward>::run);
  m.def("grouped_linear", &Call<clipup::grouped_linear>::run);
  m.def("grouped_linear_backward", &Call<clipup::grouped_linear_backward>::run);
  m.def("self_attention", &Call<clipup::self_attention>::run);
  m.def("packed_weight_bytes", &Call<clipup::packed_weight_bytes>::run);
  m.def("pack_weight", &Call<clipup::pack_weight>::run);
  m.def("packed_layout", &packed_layout);
  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def(py::init<std::int64_t, bool>(), "bytes"_a, "lasting"_a = false)
      .def_buffer(&Block::buffer);
  m.def("instruction_tier", &clipup::instruction_tier);
  m.def("has_matrix_tiles", &clipup::has_matrix_tiles);
  m.def("kept_memory", &clipup::kept_memory);
  m.def("used_memory", &clipup::used_memory);
  m.def("release_memory", &clipup::release_memory);
#ifdef CLIPUP_WITH_CUDA
  m.def("cuda_topk_gating_workspace_bytes", &Call<clipup::cuda::topk_gating_workspace_bytes>::run);
  m.def("cuda_topk_gating", &Call<clipup::cuda::topk_gating>::run);
  m.def("cuda_topk_gating_backward_workspace_bytes",
        &Call<clipup::cuda::topk_gating_backward_workspace_bytes>::run);
  m.def("cuda_topk_gating_backward", &Call<clipup::cuda::topk_gating_backward>::run);
  m.def("cuda_dispatch_workspace_bytes", &Call<clipup::cuda::dispatch_workspace_bytes>::run);
  m.def("cuda_dispatch", &Call<clipup::cuda::dispatch>::run);
#endif
  m.def("build_info", &build_info);
  py::tuple activations(clipup::kActivations);
  for (int i = 0; i < clipup::kActivations; ++i) activations[i] = clipup::kActivationNames[i];
  m.attr("ACTIVATIONS") = activations;
}
