// The vector vocabulary of the ISA this translation unit is compiled for (HEXAD_ISA_HEADER, set by CMake),
// and what is built on it alone.
#pragma once

#include HEXAD_ISA_HEADER

namespace hexad::HEXAD_NAMESPACE {
namespace {

// Whether some dots are to begin or end with the activations' sums by pairs of columns.
constexpr bool kPairSums = Dots<6, 4, 32>::kPairs;

// e^x to about 2 units in the last place for x ≤ 88; exactly 0 at −110 and below, −∞ included.
// Cody–Waite reduction to [−ln2/2, ln2/2] and a degree-6 minimax polynomial (Cephes expf, Moshier 1989).
inline F32 exp(F32 x) {
  x = max(x, splat(-110.0f));
  F32 n = round(mul(x, splat(1.44269504088896341f)));
  F32 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F32 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, splat(1.0f)));
  return scale_by_power(p, n);
}

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
