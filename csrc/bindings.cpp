// The Python module clipup_kernels._C. Addresses are integers (0: a null pointer), every call releases the
// GIL, std::invalid_argument becomes ValueError. The functions are documented in moe.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "moe.h"
#ifdef CLIPUP_WITH_CUDA
#include "moe_cuda.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

const auto floats = at<const float>;
const auto ints = at<const std::int32_t>;
const auto flags = at<const std::uint8_t>;
const auto anything = at<const void>;
const auto out_floats = at<float>;
const auto out_ints = at<std::int32_t>;
const auto out_anything = at<void>;

void router_logits(Address x, int dtype, Address mask, Address weight, Size T, Size D, Size E,
                   Address logits) {
  clipup::router_logits(anything(x), clipup::DType{dtype}, flags(mask), floats(weight), T, D, E,
                        out_floats(logits));
}

void router_logits_backward(Address d_logits, Address x, int dtype, Address mask, Address weight, Size T,
                            Size D, Size E, Address d_x, Address d_weight) {
  clipup::router_logits_backward(floats(d_logits), anything(x), clipup::DType{dtype}, flags(mask),
                                 floats(weight), T, D, E, out_anything(d_x), out_floats(d_weight));
}

void topk_gating(Address logits, Address mask, Address selection_bias, Size T, Size E, Size K,
                 bool renormalize, Address gates, Address expert_indices, Address top_prob,
                 Address mean_probs, Address z_loss, Address tokens_per_expert) {
  clipup::topk_gating(floats(logits), flags(mask), floats(selection_bias), T, E, K, renormalize,
                      out_floats(gates), out_ints(expert_indices), out_floats(top_prob),
                      out_floats(mean_probs), out_floats(z_loss), out_ints(tokens_per_expert));
}

void topk_gating_backward(Address logits, Address mask, Address expert_indices, Size T, Size E, Size K,
                          bool renormalize, Address d_gates, Address d_top_prob, Address d_mean_probs,
                          Address d_z_loss, Address d_logits) {
  clipup::topk_gating_backward(floats(logits), flags(mask), ints(expert_indices), T, E, K, renormalize,
                               floats(d_gates), floats(d_top_prob), floats(d_mean_probs), floats(d_z_loss),
                               out_floats(d_logits));
}

void dispatch(Address expert_indices, Address mask, Address priority, Size T, Size K, Size E,
              double capacity_factor, Address offsets, Address choice_of_row, Address row_of_choice) {
  clipup::dispatch(ints(expert_indices), flags(mask), floats(priority), T, K, E, capacity_factor,
                   out_ints(offsets), out_ints(choice_of_row), out_ints(row_of_choice));
}

void permute(Address x, Size row_bytes, Address choice_of_row, Address rows_used, Size R, Size K,
             Address rows) {
  clipup::permute(anything(x), row_bytes, ints(choice_of_row), ints(rows_used), R, K, out_anything(rows));
}

void gather_sum(Address rows, int dtype, Address row_of_choice, Address gates, Size T, Size K, Size D,
                Address y) {
  clipup::gather_sum(anything(rows), clipup::DType{dtype}, ints(row_of_choice), floats(gates), T, K, D,
                     out_anything(y));
}

void combine_backward(Address dy, Address rows, int dtype, Address gates, Address row_of_choice, Size T,
                      Size K, Size D, Address rows_used, Size R, Address d_rows, Address d_gates) {
  clipup::combine_backward(anything(dy), anything(rows), clipup::DType{dtype}, floats(gates),
                           ints(row_of_choice), T, K, D, ints(rows_used), R, out_anything(d_rows),
                           out_floats(d_gates));
}

// Addresses in the order of moe.h's members.
using Addresses = std::array<Address, 9>;

clipup::Experts experts_of(int dtype, int activation, Size E, Size D, Size H, Size in_stride,
                           const Addresses& weights, int packed_type = 0) {
  const auto [in, in_bias, out, out_bias, gate, gate_bias, packed_in, packed_out, packed_gate] = weights;
  return {clipup::DType{dtype},
          clipup::Activation{activation},
          E,
          D,
          H,
          anything(in),
          anything(in_bias),
          anything(out),
          anything(out_bias),
          anything(gate),
          anything(gate_bias),
          anything(packed_in),
          anything(packed_out),
          anything(packed_gate),
          in_stride,
          clipup::PackedType{packed_type}};
}

clipup::Routing routing_of(Size T, Size K, const std::array<Address, 4>& routing) {
  const auto [gates, offsets, choice_of_row, row_of_choice] = routing;
  return {T, K, floats(gates), ints(offsets), ints(choice_of_row), ints(row_of_choice)};
}

void expert_mlp_forward(int dtype, int activation, Size T, Size K, Size E, Size D, Size H, Size in_stride,
                        const std::array<Address, 4>& routing, const Addresses& weights, Address x, Address y,
                        Address z, int packed_type) {
  clipup::expert_mlp_forward(experts_of(dtype, activation, E, D, H, in_stride, weights, packed_type),
                             routing_of(T, K, routing), anything(x), out_anything(y), out_anything(z));
}

void sparse_mlp_forward(int dtype, int activation, Size T, Size K, Size E, Size D, Size H,
                        Address router_weight, Address selection_bias, bool renormalize,
                        double capacity_factor, bool by_priority, float gate_scale, const Addresses& weights,
                        Address mask, Address x, Address y, Address floats_, Address ints_, int packed_type) {
  clipup::sparse_mlp_forward(experts_of(dtype, activation, E, D, H, 0, weights, packed_type),
                             {floats(router_weight), floats(selection_bias), K, renormalize, capacity_factor,
                              by_priority, gate_scale},
                             flags(mask), T, anything(x), out_anything(y), out_floats(floats_),
                             out_ints(ints_));
}

void expert_mlp_backward(int dtype, int activation, Size T, Size K, Size E, Size D, Size H, Size in_stride,
                         const std::array<Address, 4>& routing, const Addresses& weights, Address dy,
                         Address x, Address z, const std::array<Address, 8>& gradients) {
  const auto [d_x, d_gates, d_in, d_in_bias, d_out, d_out_bias, d_gate, d_gate_bias] = gradients;
  clipup::expert_mlp_backward(
      experts_of(dtype, activation, E, D, H, in_stride, weights), routing_of(T, K, routing), anything(dy),
      anything(x), anything(z),
      {out_anything(d_x), out_floats(d_gates), out_anything(d_in), out_anything(d_in_bias),
       out_anything(d_out), out_anything(d_out_bias), out_anything(d_gate), out_anything(d_gate_bias)});
}

void grouped_linear(int dtype, Address rows, Address weight, Address bias, Address offsets, Size R, Size E,
                    Size O, Size I, Address out, Address packed, int packed_type) {
  clipup::grouped_linear(clipup::DType{dtype}, anything(rows), anything(weight), anything(bias),
                         ints(offsets), R, E, O, I, out_anything(out), anything(packed),
                         clipup::PackedType{packed_type});
}

void grouped_linear_backward(int dtype, Address d_out, Address rows, Address weight, Address offsets, Size R,
                             Size E, Size O, Size I, Address d_rows, Address d_weight, Address d_bias) {
  clipup::grouped_linear_backward(clipup::DType{dtype}, anything(d_out), anything(rows), anything(weight),
                                  ints(offsets), R, E, O, I, out_anything(d_rows), out_anything(d_weight),
                                  out_anything(d_bias));
}

void self_attention(int dtype, Address qkv, Address mask, Size mask_batch_stride, Size mask_head_stride,
                    Size B, Size L, Size heads, Size d, Address out, int type) {
  clipup::self_attention(clipup::DType{dtype}, anything(qkv), floats(mask), mask_batch_stride,
                         mask_head_stride, B, L, heads, d, out_anything(out), clipup::PackedType{type});
}

Size packed_weight_bytes(int dtype, Size E, Size O, Size I, int packed_type) {
  return clipup::packed_weight_bytes(clipup::DType{dtype}, E, O, I, clipup::PackedType{packed_type});
}

void pack_weight(int dtype, Address weight, Size E, Size O, Size I, Address packed, int packed_type,
                 Address input_scale, Address input_offset) {
  clipup::pack_weight(clipup::DType{dtype}, anything(weight), E, O, I, out_anything(packed),
                      clipup::PackedType{packed_type}, floats(input_scale), floats(input_offset));
}

py::tuple packed_layout(int dtype, int packed_type) {
  const clipup::PackedLayout layout =
      clipup::packed_layout(clipup::DType{dtype}, clipup::PackedType{packed_type});
  return py::make_tuple(layout.panel, layout.per_word);
}

// A block of the pool, for packed weights and for outputs that are allocated at every step: fresh memory
// costs page faults. The block returns to the pool when the object, whose buffer torch.frombuffer() wraps, is
// destroyed.
class Block {
 public:
  Block(Size bytes, bool lasting) : bytes_(bytes), memory_(clipup::acquire_memory(bytes, lasting)) {}
  ~Block() { clipup::return_memory(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  py::buffer_info buffer() const { return {static_cast<unsigned char*>(memory_), bytes_}; }

 private:
  Size bytes_;
  void* memory_;
};

#ifdef CLIPUP_WITH_CUDA
void cuda_topk_gating(Address logits, Address mask, Address selection_bias, Size T, Size E, Size K,
                      bool renormalize, Address gates, Address expert_indices, Address top_prob,
                      Address mean_probs, Address z_loss, Address tokens_per_expert, Address workspace,
                      Address stream) {
  clipup::cuda::topk_gating(floats(logits), flags(mask), floats(selection_bias), T, E, K, renormalize,
                            out_floats(gates), out_ints(expert_indices), out_floats(top_prob),
                            out_floats(mean_probs), out_floats(z_loss), out_ints(tokens_per_expert),
                            out_anything(workspace), out_anything(stream));
}

void cuda_topk_gating_backward(Address logits, Address mask, Address expert_indices, Size T, Size E, Size K,
                               bool renormalize, Address d_gates, Address d_top_prob, Address d_mean_probs,
                               Address d_z_loss, Address d_logits, Address workspace, Address stream) {
  clipup::cuda::topk_gating_backward(floats(logits), flags(mask), ints(expert_indices), T, E, K, renormalize,
                                     floats(d_gates), floats(d_top_prob), floats(d_mean_probs),
                                     floats(d_z_loss), out_floats(d_logits), out_anything(workspace),
                                     out_anything(stream));
}

void cuda_dispatch(Address expert_indices, Address mask, Address order, Size T, Size K, Size E,
                   double capacity_factor, Address offsets, Address choice_of_row, Address row_of_choice,
                   Address workspace, Address stream) {
  clipup::cuda::dispatch(ints(expert_indices), flags(mask), at<const std::int64_t>(order), T, K, E,
                         capacity_factor, out_ints(offsets), out_ints(choice_of_row), out_ints(row_of_choice),
                         out_anything(workspace), out_anything(stream));
}

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
  m.doc() = "Native ops of clipup_kernels. Arguments are addresses and sizes; see csrc/moe.h.";
  m.def("router_logits", &router_logits, WithoutGil(), "x"_a, "dtype"_a, "mask"_a, "weight"_a, "T"_a, "D"_a,
        "E"_a, "logits"_a);
  m.def("router_logits_backward", &router_logits_backward, WithoutGil(), "d_logits"_a, "x"_a, "dtype"_a,
        "mask"_a, "weight"_a, "T"_a, "D"_a, "E"_a, "d_x"_a, "d_weight"_a);
  m.def("topk_gating", &topk_gating, WithoutGil(), "logits"_a, "mask"_a, "selection_bias"_a, "T"_a, "E"_a,
        "K"_a, "renormalize"_a, "gates"_a, "expert_indices"_a, "top_prob"_a, "mean_probs"_a, "z_loss"_a,
        "tokens_per_expert"_a);
  m.def("topk_gating_backward", &topk_gating_backward, WithoutGil(), "logits"_a, "mask"_a, "expert_indices"_a,
        "T"_a, "E"_a, "K"_a, "renormalize"_a, "d_gates"_a, "d_top_prob"_a, "d_mean_probs"_a, "d_z_loss"_a,
        "d_logits"_a);
  m.def("dispatch", &dispatch, WithoutGil(), "expert_indices"_a, "mask"_a, "priority"_a, "T"_a, "K"_a, "E"_a,
        "capacity_factor"_a, "offsets"_a, "choice_of_row"_a, "row_of_choice"_a);
  m.def("permute", &permute, WithoutGil(), "x"_a, "row_bytes"_a, "choice_of_row"_a, "rows_used"_a, "R"_a,
        "K"_a, "rows"_a);
  m.def("gather_sum", &gather_sum, WithoutGil(), "rows"_a, "dtype"_a, "row_of_choice"_a, "gates"_a, "T"_a,
        "K"_a, "D"_a, "y"_a);
  m.def("combine_backward", &combine_backward, WithoutGil(), "dy"_a, "rows"_a, "dtype"_a, "gates"_a,
        "row_of_choice"_a, "T"_a, "K"_a, "D"_a, "rows_used"_a, "R"_a, "d_rows"_a, "d_gates"_a);
  m.def("expert_mlp_forward", &expert_mlp_forward, WithoutGil(), "dtype"_a, "activation"_a, "T"_a, "K"_a,
        "E"_a, "D"_a, "H"_a, "in_stride"_a, "routing"_a, "weights"_a, "x"_a, "y"_a, "z"_a,
        "packed_type"_a = 0);
  m.def("sparse_mlp_forward", &sparse_mlp_forward, WithoutGil(), "dtype"_a, "activation"_a, "T"_a, "K"_a,
        "E"_a, "D"_a, "H"_a, "router_weight"_a, "selection_bias"_a, "renormalize"_a, "capacity_factor"_a,
        "by_priority"_a, "gate_scale"_a, "weights"_a, "mask"_a, "x"_a, "y"_a, "floats"_a, "ints"_a,
        "packed_type"_a = 0);
  m.def("expert_mlp_backward", &expert_mlp_backward, WithoutGil(), "dtype"_a, "activation"_a, "T"_a, "K"_a,
        "E"_a, "D"_a, "H"_a, "in_stride"_a, "routing"_a, "weights"_a, "dy"_a, "x"_a, "z"_a, "gradients"_a);
  m.def("grouped_linear", &grouped_linear, WithoutGil(), "dtype"_a, "rows"_a, "weight"_a, "bias"_a,
        "offsets"_a, "R"_a, "E"_a, "O"_a, "I"_a, "out"_a, "packed"_a, "packed_type"_a = 0);
  m.def("grouped_linear_backward", &grouped_linear_backward, WithoutGil(), "dtype"_a, "d_out"_a, "rows"_a,
        "weight"_a, "offsets"_a, "R"_a, "E"_a, "O"_a, "I"_a, "d_rows"_a, "d_weight"_a, "d_bias"_a);
  m.def("self_attention", &self_attention, WithoutGil(), "dtype"_a, "qkv"_a, "mask"_a, "mask_batch_stride"_a,
        "mask_head_stride"_a, "B"_a, "L"_a, "heads"_a, "d"_a, "out"_a, "type"_a = 0);
  m.def("packed_weight_bytes", &packed_weight_bytes, "dtype"_a, "E"_a, "O"_a, "I"_a, "packed_type"_a = 0);
  m.def("pack_weight", &pack_weight, WithoutGil(), "dtype"_a, "weight"_a, "E"_a, "O"_a, "I"_a, "packed"_a,
        "packed_type"_a = 0, "input_scale"_a = 0, "input_offset"_a = 0);
  m.def("packed_layout", &packed_layout, "dtype"_a, "packed_type"_a = 0);
  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def(py::init<Size, bool>(), "bytes"_a, "lasting"_a = false)
      .def_buffer(&Block::buffer);
  m.def("instruction_tier", &clipup::instruction_tier);
  m.def("has_matrix_tiles", &clipup::has_matrix_tiles);
  m.def("kept_memory", &clipup::kept_memory);
  m.def("used_memory", &clipup::used_memory);
  m.def("release_memory", &clipup::release_memory);
#ifdef CLIPUP_WITH_CUDA
  m.def("cuda_topk_gating_workspace_bytes", &clipup::cuda::topk_gating_workspace_bytes, "T"_a, "E"_a, "K"_a);
  m.def("cuda_topk_gating", &cuda_topk_gating, WithoutGil(), "logits"_a, "mask"_a, "selection_bias"_a, "T"_a,
        "E"_a, "K"_a, "renormalize"_a, "gates"_a, "expert_indices"_a, "top_prob"_a, "mean_probs"_a,
        "z_loss"_a, "tokens_per_expert"_a, "workspace"_a, "stream"_a);
  m.def("cuda_topk_gating_backward_workspace_bytes", &clipup::cuda::topk_gating_backward_workspace_bytes);
  m.def("cuda_topk_gating_backward", &cuda_topk_gating_backward, WithoutGil(), "logits"_a, "mask"_a,
        "expert_indices"_a, "T"_a, "E"_a, "K"_a, "renormalize"_a, "d_gates"_a, "d_top_prob"_a,
        "d_mean_probs"_a, "d_z_loss"_a, "d_logits"_a, "workspace"_a, "stream"_a);
  m.def("cuda_dispatch_workspace_bytes", &clipup::cuda::dispatch_workspace_bytes, "T"_a, "K"_a, "E"_a);
  m.def("cuda_dispatch", &cuda_dispatch, WithoutGil(), "expert_indices"_a, "mask"_a, "order"_a, "T"_a, "K"_a,
        "E"_a, "capacity_factor"_a, "offsets"_a, "choice_of_row"_a, "row_of_choice"_a, "workspace"_a,
        "stream"_a);
#endif
  m.def("build_info", &build_info);
  py::tuple activations(clipup::kActivations);
  for (int i = 0; i < clipup::kActivations; ++i) activations[i] = clipup::kActivationNames[i];
  m.attr("ACTIVATIONS") = activations;
}
