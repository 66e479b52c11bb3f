// The vector vocabulary on AVX-512 with VNNI.
#pragma once

#include "simd/avx512_base.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

using Part = F32;
inline Part as_part(I32 x) { return to_float(x); }
inline F32 part_sum(Part x) { return x; }

// acc + Σ over each quad of unsigned weight bytes × signed activation bytes, exact. Inline assembly because
// GCC 12 copies and spills the accumulators of the intrinsic.
inline I32 dot(I32 acc, Quads weights, Quads activations) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(activations));
  return acc;
}

// kCount dots of quads of kBits-bit codes, one after another; `from` is what their sum begins with. Register tiles are
// to have at most kSlots batch rows.
template <int kBits, int kCount, int kZero = 0>
struct Dots {
  using Weights = Quads;
  static constexpr bool kPairs = false;
  static constexpr int kSlots = kTileSlots;
  I32 sum;
  void begin(I32 from) { sum = from; }
  void add(int, Quads weights, Quads activations) { sum = dot(sum, weights, activations); }
  I32 end(I32) const { return sum; }
  Part scaled(const Part& scale) const { return mul(to_float(sum), scale); }
  Part scaled(const Part& scale, const Part& before) const { return fma(to_float(sum), scale, before); }
};
// The zero point of byte codes as Dots<8> leaves it in the sum.
constexpr int kByteZero = 128;

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
