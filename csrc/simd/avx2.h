// The vector vocabulary on AVX2 with FMA and F16C: 16 float or int32 lanes, or 16 quads of bytes, in two registers
// of 256 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

// Before a loop over tile slots or quads: its vectors are to stay in registers.
#define HEXAD_UNROLL _Pragma("GCC unroll 16")

namespace hexad::HEXAD_NAMESPACE {
namespace {

struct F32 {
  __m256 low, high;
};
struct I32 {
  __m256i low, high;
};
struct Quads {
  __m256i low, high;
};
using Mask = uint16_t;

inline F32 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline Mask first_lanes(int64_t n) { return n >= 16 ? Mask{0xFFFF} : static_cast<Mask>((1u << n) - 1); }
// Eight of a mask's bits, from bit `first` on, as lanes of all ones and all zeros.
inline __m256i lanes_of(Mask m, int first) {
  const __m256i bits = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), first);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(m), bits), bits);
}
// Whole vectors take the short way: a masked store costs a dozen others on some CPUs.
inline F32 load(const float* p, Mask m) {
  if (m == 0xFFFF) return load(p);
  return {_mm256_maskload_ps(p, lanes_of(m, 0)), _mm256_maskload_ps(p + 8, lanes_of(m, 8))};
}
inline void store(float* p, F32 x, Mask m) {
  if (m == 0xFFFF) return store(p, x);
  _mm256_maskstore_ps(p, lanes_of(m, 0), x.low);
  _mm256_maskstore_ps(p + 8, lanes_of(m, 8), x.high);
}
inline Mask at_least(F32 a, F32 b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ));
  return static_cast<Mask>(low | _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ)) << 8);
}
inline F32 select(Mask m, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(lanes_of(m, 0))),
          _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(lanes_of(m, 8)))};
}

inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// c − a · b, rounded once
inline F32 fnma(F32 a, F32 b, F32 c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline bool any_nan(F32 a, F32 b) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.low, b.low, _CMP_UNORD_Q),
                                         _mm256_cmp_ps(a.high, b.high, _CMP_UNORD_Q))) != 0;
}
inline float sum(F32 a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_of(F32 a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline F32 round(F32 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
// x · 2^n for integral n ≤ 127, 0 below the normal range.
inline F32 scale_by_power(F32 x, F32 n) {
  const auto power = [](__m256 v) {
    const __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(v, _mm256_set1_ps(-127.0f)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  return mul(x, {power(n.low), power(n.high)});
}

inline F32 load_f16(const uint16_t* p) {
  const auto* eights = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(eights)), _mm256_cvtph_ps(_mm_loadu_si128(eights + 1))};
}
inline F32 load_bf16(const uint16_t* p) {
  const auto* eights = reinterpret_cast<const __m128i*>(p);
  const auto eight = [](const __m128i* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16));
  };
  return {eight(eights), eight(eights + 1)};
}
inline uint16_t to_f16(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

// Sixteen doubles.
struct F64 {
  __m256d v[4];
};
inline F64 splat_wide(double x) {
  const __m256d v = _mm256_set1_pd(x);
  return {{v, v, v, v}};
}
inline F64 widen(F32 x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.low)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1))}};
}
inline F64 add(F64 a, F64 b) {
  HEXAD_UNROLL
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 sub(F64 a, F64 b) {
  HEXAD_UNROLL
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_sub_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 mul(F64 a, F64 b) {
  HEXAD_UNROLL
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 fma(F64 a, F64 b, F64 c) {
  HEXAD_UNROLL
  for (int i = 0; i < 4; ++i) c.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline double sum(F64 a) {
  const __m256d four = _mm256_add_pd(_mm256_add_pd(a.v[0], a.v[2]), _mm256_add_pd(a.v[1], a.v[3]));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

inline I32 splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
// Sixteen bytes, or the four bits from bit `from` on of each.
inline I32 load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline I32 load_bytes(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline I32 load_nibbles(const uint8_t* p, int from) {
  const I32 x = load_bytes(p);
  if (from == 4) return {_mm256_srli_epi32(x.low, 4), _mm256_srli_epi32(x.high, 4)};
  const __m256i mask = _mm256_set1_epi32(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline I32 shift_left(I32 x, int bits) {
  return {_mm256_slli_epi32(x.low, bits), _mm256_slli_epi32(x.high, bits)};
}
inline I32 shift_right(I32 x, int bits) {
  return {_mm256_srai_epi32(x.low, bits), _mm256_srai_epi32(x.high, bits)};
}
inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
// Lanes as pairs of int16: a₀b₀ + a₁b₁.
inline I32 pair_dot(const I32& a, I32 b) {
  return {_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)};
}
// Of a group in parts: an integer scale, in both halves of each lane as it multiplies a run of 16-bit pairs, and sums
// of the dots it has multiplied.
using Part = I32;
inline F32 part_sum(Part x) { return to_float(x); }
inline Part as_part(I32 x) {
  return {_mm256_blend_epi16(x.low, _mm256_slli_epi32(x.low, 16), 0xAA),
          _mm256_blend_epi16(x.high, _mm256_slli_epi32(x.high, 16), 0xAA)};
}
inline int32_t sum(I32 x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}
inline void store(int32_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.high);
}
inline I32 to_int(F32 x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
// Of integers within ±127, or they would saturate.
inline void store_bytes(int8_t* p, I32 x) {
  const __m256i words = _mm256_packs_epi32(x.low, x.high);  // lanes 0 … 3 of both, then 4 … 7 of both
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words),
                                                    _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
}

inline Quads load_quads(const void* p) {
  const auto* eights = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(eights), _mm256_loadu_si256(eights + 1)};
}
inline void store_quads(void* p, Quads x) {
  auto* eights = static_cast<__m256i*>(p);
  _mm256_storeu_si256(eights, x.low);
  _mm256_storeu_si256(eights + 1, x.high);
}
inline Quads splat_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return {_mm256_set1_epi32(quad), _mm256_set1_epi32(quad)};
}
inline Quads either(Quads a, Quads b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline Quads low_nibbles(Quads x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline Quads high_nibbles(Quads x) {
  return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)});
}
// The bits of `mask` of each byte, taken `from` bits higher (−n: n lower), alone or beside those of `low`.
inline Quads bits(Quads x, int from, int mask) {
  const __m256i kept = _mm256_set1_epi8(static_cast<char>(mask));
  const auto moved = [&](__m256i v) {
    return from > 0 ? _mm256_srli_epi32(v, from) : from < 0 ? _mm256_slli_epi32(v, -from) : v;
  };
  return {_mm256_and_si256(moved(x.low), kept), _mm256_and_si256(moved(x.high), kept)};
}
inline Quads with_bits(Quads low, Quads x, int from, int mask) { return either(low, bits(x, from, mask)); }
// Byte `index` of each quad, zero-extended.
inline I32 byte_of(Quads x, int index) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(x.low, 8 * index), mask),
          _mm256_and_si256(_mm256_srli_epi32(x.high, 8 * index), mask)};
}

// Byte codes as products of signed bytes take them: less 128, and the magnitude of that.
struct SignedQuads {
  Quads value, magnitude;
  SignedQuads() = default;
  SignedQuads(Quads codes) {
    const __m256i middle = _mm256_set1_epi8(-128);
    value = {_mm256_xor_si256(codes.low, middle), _mm256_xor_si256(codes.high, middle)};
    magnitude = {_mm256_abs_epi8(value.low), _mm256_abs_epi8(value.high)};
  }
};

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// kCount dots of quads of kBits-bit codes with activations within ±127, one after another, exact; `from` is added to
// their sum.
//
// vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits and saturates. Of codes below 2^kBits a
// whole run of such pairs stays below 2^15; it is then widened at once. Byte codes are taken as signed, since 255 ·
// 127 · 2 would not fit: |w| ≤ 128 times ±x does. Where all kCount pairs stay below 2^15 only once kZero, the middle of
// the codes, is off (kPairs; parts of a group in any case), their sum wraps around until then, and `from` is what start()
// makes of the activations' sums by pairs. Parts without zero point (kScaled) are multiplied by a scale as they widen.
//
// Register tiles are to have at most kSlots batch rows: three of one half leave room for weights and activations, and
// for most of the float sums.
template <int kBits, int kCount, int kZero = 0>
struct Dots {
  using Weights = std::conditional_t<kBits == 8, SignedQuads, Quads>;
  static constexpr int kSlots = 3;
  static constexpr int kFit = 32767 / (2 * 127 * (kBits == 8 ? 128 : (1 << kBits) - 1));
  static constexpr bool kPairs =
      (kFit < kCount || kCount < 8) && kZero == 1 << (kBits - 1) && 2 * 127 * kZero * kCount < 1 << 15;
  static constexpr int kRun = kPairs ? kCount : kFit;
  static constexpr bool kScaled = kCount < 8 && kZero == 0 && kFit >= kCount;
  __m256i run[2], total[2];

  static I32 start(const int32_t* pairs, int width) {
    __m256i sum = _mm256_set1_epi32(*pairs);
    if (kCount == 8) sum = _mm256_add_epi16(sum, _mm256_set1_epi32(pairs[width]));
    sum = _mm256_slli_epi16(sum, kBits - 3);
    return {sum, sum};
  }
  void begin(I32 from) {
    if (!kPairs) return;  // the others take `from` at the end, when a register is free
    run[0] = from.low;
    run[1] = from.high;
  }
  void add(int j, Quads weights, Quads activations) {
    add(j, 0, weights.low, activations.low);
    add(j, 1, weights.high, activations.high);
  }
  void add(int j, const SignedQuads& weights, Quads activations) {
    add(j, 0, weights.magnitude.low, _mm256_sign_epi8(activations.low, weights.value.low));
    add(j, 1, weights.magnitude.high, _mm256_sign_epi8(activations.high, weights.value.high));
  }
  I32 end(I32 from) const { return {end(0, from.low), end(1, from.high)}; }
  Part scaled(const Part& scale) const {
    return {_mm256_madd_epi16(run[0], scale.low), _mm256_madd_epi16(run[1], scale.high)};
  }
  Part scaled(const Part& scale, const Part& before) const {
    return hexad::HEXAD_NAMESPACE::add(scaled(scale), before);
  }

 private:
  void add(int j, int i, __m256i w, __m256i x) {
    __m256i pairs;
    if (j % kRun == 0 && !kPairs) {
      pairs = _mm256_maddubs_epi16(w, x);
    } else {
      // Inline assembly because GCC 12 would form all products first, spill them and add them as a tree.
      __m256i sum = run[i];
      asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(x), "x"(w));
      pairs = sum;
    }
    run[i] = pairs;
    if (kScaled || kPairs || (j % kRun < kRun - 1 && j < kCount - 1)) return;
    __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    if (j >= kRun) {
      __m256i sum = total[i];
      asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
          : "+x"(sum), "=&x"(quads)
          : "xm"(_mm256_set1_epi16(1)), "x"(pairs));
      quads = sum;
    }
    total[i] = quads;
  }
  __m256i end(int i, __m256i from) const {
    if (kPairs) {
      __m256i quads;  // ones from memory: all registers hold sums, or what they are made of
      asm("vpmaddwd %1, %2, %0" : "=x"(quads) : "m"(kOnes), "x"(run[i]));
      return quads;
    }
    return _mm256_add_epi32(total[i], from);
  }
};
// The zero point of byte codes as Dots<8> leaves it in the sum.
constexpr int kByteZero = 0;

// Register tiles of float products: batch rows, and halves of a panel for so many of them; halves also of dots.
constexpr int kTileSlots = 6;
constexpr int tile_halves(int slots) { return slots <= 2 ? 2 : 1; }
// Vectors of a wider product.
constexpr int tile_vectors(int slots) { return tile_halves(slots); }
// Tiles of dots from which unpacking a panel once pays.
constexpr int kStripTiles = 4;
// Whether a load takes a whole cache line.
constexpr bool kLoadsLines = false;

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
