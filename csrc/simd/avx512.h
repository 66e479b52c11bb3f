// The vector vocabulary on AVX-512 (F, BW, VL, DQ) without VNNI.
#pragma once

#include "simd/avx512_base.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

// Of a group in parts: an integer scale, in both halves of each lane as it multiplies a run of 16-bit pairs, and sums
// of the dots it has multiplied.
using Part = I32;
inline F32 part_sum(Part x) { return to_float(x); }
inline Part as_part(I32 x) { return _mm512_mask_blend_epi16(0xAAAAAAAA, x, _mm512_slli_epi32(x, 16)); }

// kCount dots of quads of kBits-bit codes with activations within ±127, one after another, exact; `from` is added to
// their sum. As in simd/avx2.h: products are added in runs of 16-bit pairs that cannot overflow, or may until the zero
// point is off, and byte codes are taken as signed. Register tiles are to have at most kSlots batch rows: where a run
// of several pairs is followed by another, a dot takes two registers.
template <int kBits, int kCount, int kZero = 0>
struct Dots {
  using Weights = Quads;
  static constexpr int kFit = 32767 / (2 * 127 * (kBits == 8 ? 128 : (1 << kBits) - 1));
  static constexpr bool kPairs =
      (kFit < kCount || kCount < 8) && kZero == 1 << (kBits - 1) && 2 * 127 * kZero * kCount < 1 << 15;
  static constexpr int kRun = kPairs ? kCount : kFit;
  static constexpr bool kScaled = kCount < 8 && kZero == 0 && kFit >= kCount;
  static constexpr int kSlots = kRun == 1 || kRun >= kCount ? 6 : 3;
  __m512i run, total;

  static I32 start(const int32_t* pairs, int width) {
    __m512i sum = _mm512_set1_epi32(*pairs);
    if (kCount == 8) sum = _mm512_add_epi16(sum, _mm512_set1_epi32(pairs[width]));
    return _mm512_slli_epi16(sum, kBits - 3);
  }
  void begin(I32) {}
  void add(int j, Quads w, Quads x) {
    if constexpr (kBits == 8) {
      w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
      x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
      w = _mm512_abs_epi8(w);
    }
    __m512i pairs = _mm512_maddubs_epi16(w, x);
    if (j % kRun > 0) {
      // Inline assembly because GCC 12 would form all products first, spill them and add them as a tree.
      __m512i sum = run;
      asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+v"(sum), "=&v"(pairs) : "v"(x), "v"(w));
      pairs = sum;
    }
    run = pairs;
    if (kScaled || kPairs || (j % kRun < kRun - 1 && j < kCount - 1)) return;
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i quads = _mm512_madd_epi16(pairs, ones);
    if (j >= kRun) {
      __m512i sum = total;
      asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(quads) : "vm"(ones), "v"(pairs));
      quads = sum;
    }
    total = quads;
  }
  I32 end(I32 from) const {
    if (kPairs) return _mm512_madd_epi16(_mm512_add_epi16(run, from), _mm512_set1_epi16(1));
    return _mm512_add_epi32(total, from);
  }
  Part scaled(const Part& scale) const { return _mm512_madd_epi16(run, scale); }
  Part scaled(const Part& scale, const Part& before) const { return _mm512_add_epi32(scaled(scale), before); }
};
// The zero point of byte codes as Dots<8> leaves it in the sum.
constexpr int kByteZero = 0;

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
