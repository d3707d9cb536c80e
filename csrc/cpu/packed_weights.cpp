// Packing weights once, in the order in which the forward products read them.
#include "../checks.h"
#include "expert_rows.h"

namespace clipup {
namespace {

void check_sizes(DType dtype, std::int64_t E, std::int64_t O, std::int64_t I) {
  check_dtype(dtype);
  check_size("E", E, 0);
  check_size("O", O, 0);
  check_size("I", I, 0);
}

}  // namespace

std::int64_t packed_weight_bytes(DType dtype, std::int64_t E, std::int64_t O, std::int64_t I) {
  check_sizes(dtype, E, O, I);
  const Kernels& ks = kernels();
  const std::int64_t words = ceil_div(I, ks.of(dtype).per_word) * round_up(O, ks.panel);
  return E * words * static_cast<std::int64_t>(sizeof(Word));
}

void pack_weight(DType dtype, const void* weight, std::int64_t E, std::int64_t O, std::int64_t I,
                 void* packed) {
  check_sizes(dtype, E, O, I);
  check_pointer("weight", weight, E * O * I);
  check_pointer("packed", packed, E * O * I);
  const Kernels& ks = kernels();
  const std::int64_t words = ceil_div(I, ks.of(dtype).per_word);
  const std::int64_t panels = ceil_div(O, ks.panel);
  parallel_tasks(E * panels, [&](std::int64_t task, std::int64_t) {
    const Right right{element(weight, dtype, task / panels * O * I), true, O, I, nullptr};
    Word* const b_panel = static_cast<Word*>(packed) + task * words * ks.panel;
    pack_right(right, dtype, ks, task % panels, 1, 0, words, b_panel);
  });
}

PackedLayout packed_layout(DType dtype) {
  check_dtype(dtype);
  const Kernels& ks = kernels();
  return {ks.panel, ks.of(dtype).per_word};
}

}  // namespace clipup
