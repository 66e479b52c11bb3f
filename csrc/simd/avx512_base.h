// What the vector vocabularies of AVX-512 (F, BW, VL, DQ) share: 16 float or int32 lanes, or 16 quads of bytes, per
// vector; all but the dot products.
#pragma once

#include <immintrin.h>

#include <cstdint>

// Before a loop over tile slots or quads: its vectors are to stay in registers.
#define HEXAD_UNROLL _Pragma("GCC unroll 16")

namespace hexad::HEXAD_NAMESPACE {
namespace {

using F32 = __m512;
using I32 = __m512i;
using Quads = __m512i;
using Mask = __mmask16;

inline F32 splat(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline Mask first_lanes(int64_t n) { return n >= 16 ? Mask{0xFFFF} : static_cast<Mask>((1u << n) - 1); }
inline F32 load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, F32 x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }
inline Mask at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline F32 select(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }

inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// c − a · b, rounded once
inline F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline float sum(F32 a) { return _mm512_reduce_add_ps(a); }
inline float max_of(F32 a) { return _mm512_reduce_max_ps(a); }
inline F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x · 2^n for integral n.
inline F32 scale_by_power(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }

inline F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline uint16_t to_f16(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

// Sixteen doubles.
struct F64 {
  __m512d low, high;
};
inline F64 splat_wide(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline F64 widen(F32 x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
inline F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
inline F64 sub(F64 a, F64 b) { return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)}; }
inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)}; }
inline F64 fma(F64 a, F64 b, F64 c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}
inline double sum(F64 a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high)); }

inline I32 splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
// Sixteen bytes, or the four bits from bit `from` on of each.
inline I32 load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I32 load_bytes(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I32 load_nibbles(const uint8_t* p, int from) {
  return from == 4 ? _mm512_srli_epi32(load_bytes(p), 4)
                   : _mm512_and_si512(load_bytes(p), _mm512_set1_epi32(15));
}
inline I32 shift_left(I32 x, int bits) { return _mm512_slli_epi32(x, static_cast<unsigned>(bits)); }
inline I32 shift_right(I32 x, int bits) { return _mm512_srai_epi32(x, static_cast<unsigned>(bits)); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
// Lanes as pairs of int16: a₀b₀ + a₁b₁.
inline I32 pair_dot(I32 a, I32 b) { return _mm512_madd_epi16(a, b); }
inline int32_t sum(I32 x) { return _mm512_reduce_add_epi32(x); }
inline void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x); }
inline I32 to_int(F32 x) { return _mm512_cvtps_epi32(x); }
inline void store_bytes(int8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

inline Quads load_quads(const void* p) { return _mm512_loadu_si512(p); }
inline void store_quads(void* p, Quads x) { _mm512_storeu_si512(p, x); }
inline bool any_nan(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
inline Quads splat_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
inline Quads either(Quads a, Quads b) { return _mm512_or_si512(a, b); }
inline Quads low_nibbles(Quads x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Quads high_nibbles(Quads x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// The bits of `mask` of each byte, taken `from` bits higher (−n: n lower), alone or beside those of `low`.
inline Quads moved(Quads x, int from) {
  return from > 0   ? _mm512_srli_epi32(x, static_cast<unsigned>(from))
         : from < 0 ? _mm512_slli_epi32(x, static_cast<unsigned>(-from))
                    : x;
}
inline Quads bits(Quads x, int from, int mask) {
  return _mm512_and_si512(moved(x, from), _mm512_set1_epi8(static_cast<char>(mask)));
}
inline Quads with_bits(Quads low, Quads x, int from, int mask) {
  // low | (x & mask)
  return _mm512_ternarylogic_epi32(low, moved(x, from), _mm512_set1_epi8(static_cast<char>(mask)), 0xF8);
}
// Byte `index` of each quad, zero-extended.
inline I32 byte_of(Quads x, int index) {
  return _mm512_and_si512(_mm512_srli_epi32(x, static_cast<unsigned>(8 * index)), _mm512_set1_epi32(255));
}

// Register tiles of float products: batch rows, and halves of a panel for so many of them.
constexpr int kTileSlots = 6;
constexpr int tile_halves(int) { return 2; }
// Vectors of a wider product.
constexpr int tile_vectors(int) { return 4; }
// Tiles of dots from which unpacking a panel once pays: codes are taken apart beside the multiplications for nothing.
constexpr int kStripTiles = 12;
// Whether a load takes a whole cache line.
constexpr bool kLoadsLines = true;

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
