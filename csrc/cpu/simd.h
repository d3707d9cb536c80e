// Vectors of floats, as wide as the instructions of the tier. gemm_<tier>.cpp first includes the file of its
// instruction set, simd_<set>.h, which defines:
//
//   kLanes; F32x, U32x, U16x, U8x   the width of vectors; vectors of kLanes elements
//   kTileRows, kColumnTile          rows of a tile of sums in registers; columns of a column A panel
//   kFewFloatTiles, kFewHalfTiles   tiles of rows for which a plain weight is packed in small steps, by the
//                                   size of its elements (TypedKernels::few_rows)
//   kInt8Offset                     added to each int8 of a left operand, where the instruction multiplies
//                                   unsigned by signed; Int8Sums subtracts its products
//   stream_as, streams_done         stores that bypass the caches, so that a line that is written whole is
//                                   not read first, to aligned addresses; orders them before later stores
//   widened, lower_halves,          conversions between widths, which GCC 12 splits in pieces, down to one
//   lowest_bytes                    integer register for every byte, if it is left to find the instruction
//   multiply_add                    a * b + sum, fused where the tier can: a compiler that may fuse could
//                                   decide differently for the same sum in two loops
//   interleave_low, _high           the lower (upper) halves of two vectors, element by element in turn
//   unpack_low, _high, _pairs       the same within every 16 bytes, by words and by pairs of words
//   low_half, high_half             of a vector, where kColumnTile < kLanes
//   load_quads                      16 bytes of every fourth of kLanes rows that lie `stride` bytes apart
//   float16_to_float and back       IEEE binary16, as in element.h: rounds to nearest, ties to even, beyond
//                                   65504 to infinity
//
// The templates below work on any vectors. An instruction set with better instructions defines functions of
// the same names, which overload resolution prefers to templates.
#pragma once

#include "vectors.h"

namespace clipup {
namespace {

using I32x = std::int32_t __attribute__((vector_size(kLanes * 4)));

inline F32x splat(float value) { return F32x{} + value; }
inline U32x bits(F32x value) { return reinterpret_cast<U32x>(value); }
inline F32x from_bits(U32x value) { return reinterpret_cast<F32x>(value); }

// sum + the products of the four int8 of a and every four of b; sums are integers.
template <class V>
inline V add_quads(V sum, std::uint32_t a, U32x b) {
  const I32x left = reinterpret_cast<I32x>(U32x{} + a), right = reinterpret_cast<I32x>(b);
  I32x products = (left >> 24) * (right >> 24);
  for (int byte = 0; byte < 3; ++byte) {
    const int up = 24 - 8 * byte;
    products += ((left << up) >> 24) * ((right << up) >> 24);
  }
  return reinterpret_cast<V>(reinterpret_cast<I32x>(sum) + products);
}

// 1 / value for finite values of usual size, to a unit in the last place; the coarse one to 1e-4.
template <class V>
inline V inverse(V value) {
  return 1.0F / value;
}
template <class V>
inline V coarse_inverse(V value) {
  return 1.0F / value;
}

// x is an integer plus a fraction of at most 1/2. The integer is returned as times_power_of_two takes it, for
// the value times 2^integer: 0 for x below -126.
template <class V>
inline V integer_part(V x, V& fraction) {
  const F32x kMagic = splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const F32x shifted = x + kMagic;
  fraction = x - (shifted - kMagic);
  return shifted;
}
template <class V>
inline V times_power_of_two(V value, V shifted, V x) {
  const F32x scaled = from_bits(bits(value) + (bits(shifted) << 23));
  return x < -126.0F ? F32x{} : scaled;
}

// The largest element; none is NaN.
template <class V>
inline auto largest_of(V value) {
  auto largest = value[0];
  for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
}

// Each half added to the other, until one is left.
template <class V>
inline float sum_of(V value) {
  float lanes[kLanes];
  store_as(lanes, value);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// Rounded to nearest, ties to even; a NaN stays one.
template <class V>
inline U16x float_to_bfloat16(V value) {
  const U32x b = bits(value);
  const U32x rounded = b + 0x7FFFU + ((b >> 16) & 1U);
  const U32x quiet = b | 0x400000U;
  return lower_halves(((b & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded) >> 16);
}
inline F32x bfloat16_to_float(U16x value) { return from_bits(widened(value) << 16); }

// A square of words, transposed: interleaving row i with row i + half, log2(rows) times.
inline void transpose(U32x (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    U32x next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Four words each of kLanes rows that lie `stride` bytes apart, transposed: columns[k] holds word k of every
// row. Rows are combined in 16-byte pieces while loading, which leaves two steps of shuffles.
inline void load_columns(const void* rows, std::int64_t stride, U32x (&columns)[4]) {
  const auto* const first = static_cast<const char*>(rows);
  U32x quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) quads[i] = load_quads(first + i * stride, stride);
  const U32x low = unpack_low(quads[0], quads[1]), low_next = unpack_low(quads[2], quads[3]);
  const U32x high = unpack_high(quads[0], quads[1]), high_next = unpack_high(quads[2], quads[3]);
  columns[0] = unpack_low_pairs(low, low_next);
  columns[1] = unpack_high_pairs(low, low_next);
  columns[2] = unpack_low_pairs(high, high_next);
  columns[3] = unpack_high_pairs(high, high_next);
}

}  // namespace
}  // namespace clipup
