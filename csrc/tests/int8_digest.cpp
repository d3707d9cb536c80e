// One hash of the bits that int8 products lead to, for comparing instruction tiers. All numbers come from one
// seed.
#include <cstdio>

#include "layers.h"

namespace clipup::tests {
namespace {

std::uint64_t hash = 0xCBF29CE484222325U;  // FNV-1a

void add_to_hash(const Array& array) {
  const auto* const bytes = static_cast<const unsigned char*>(array.data());
  const std::int64_t size = array.size() * (array.dtype() == DType::kFloat32 ? 4 : 2);
  for (std::int64_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001B3U;
}

Array normal_array(DType dtype, std::int64_t size) {
  Array array(dtype, size);
  array.fill_normal(1.0F);
  return array;
}

void add_layer(DType dtype, Activation activation, bool gated) {
  LayerShape shape;
  shape.dtype = dtype;
  shape.activation = activation;
  shape.gated = gated;
  shape.T = 1 + integer(70);
  shape.D = 1 + integer(300);
  shape.H = 1 + integer(300);
  shape.E = 1 + integer(4);
  shape.K = 1 + integer(2);
  add_to_hash(Layer(shape).int8_forward());
}

void add_linear(DType dtype) {
  const std::int64_t R = 1 + integer(70), E = 1 + integer(3), O = 1 + integer(200), I = 1 + integer(400);
  const Array rows = normal_array(dtype, R * I), weight = normal_array(dtype, E * O * I),
              bias = normal_array(dtype, E * O);
  std::vector<float> input_scale(E * I);
  for (float& scale : input_scale) scale = 0.5F + uniform();
  std::vector<float> input_offset(E * I);
  for (float& offset : input_offset) offset = normal();
  Array packed(DType::kFloat32, packed_weight_bytes(dtype, E, O, I, PackedType::kInt8) / 4),
      out(dtype, R * O);
  pack_weight(dtype, weight.data(), E, O, I, packed.data(), PackedType::kInt8, input_scale.data(),
              input_offset.data());
  grouped_linear(dtype, rows.data(), nullptr, bias.data(), random_offsets(E, R).data(), R, E, O, I,
                 out.data(), packed.data(), PackedType::kInt8);
  add_to_hash(out);
}

void add_attention(DType dtype, bool masked) {
  const std::int64_t B = 2, heads = 2, L = 1 + integer(70), d = 1 + integer(100);
  const Array qkv = normal_array(dtype, B * L * 3 * heads * d);
  std::vector<float> mask(L * L);
  for (float& value : mask) value = uniform() < 0.3F ? -INFINITY : normal();
  Array out(dtype, B * L * heads * d);
  self_attention(dtype, qkv.data(), masked ? mask.data() : nullptr, 0, 0, B, L, heads, d, out.data(),
                 PackedType::kInt8);
  add_to_hash(out);
}

}  // namespace

void print_int8_digest() {
  start_case(1);
  for (int i = 0; i < 20; ++i) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (int activation = 0; activation < kActivations; ++activation) {
        add_layer(dtype, Activation{activation}, i % 2 == 1);
      }
      add_linear(dtype);
      add_attention(dtype, i % 2 == 1);
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}

}  // namespace clipup::tests
