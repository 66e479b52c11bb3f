// The vector vocabulary in portable C++ (the vector extension GCC and Clang share), 16 lanes per vector: the
// path for machines without a header of their own, and the meaning of each word.
#pragma once

#include <cstdint>

// Loops over tile slots and quads stay loops: sixteen emulated lanes have no registers to win.
#define HEXAD_UNROLL _Pragma("GCC unroll 1")

namespace hexad::HEXAD_NAMESPACE {
namespace {

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
using Quads = U32;  // four bytes in each lane, the first lowest
using Mask = uint16_t;

inline F32 splat(float x) { return F32{} + x; }
inline F32 load(const float* p) {
  F32 r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
inline void store(float* p, F32 x) { __builtin_memcpy(p, &x, 64); }
inline Mask first_lanes(int64_t n) { return n >= 16 ? Mask{0xFFFF} : static_cast<Mask>((1u << n) - 1); }
inline F32 load(const float* p, Mask m) {
  F32 r{};
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) r[i] = p[i];
  return r;
}
inline void store(float* p, F32 x, Mask m) {
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) p[i] = x[i];
}
inline Mask at_least(F32 a, F32 b) {
  I32 yes = a >= b;
  int bits = 0;
  for (int i = 0; i < 16; ++i) bits |= (yes[i] & 1) << i;
  return static_cast<Mask>(bits);
}
inline F32 select(Mask m, F32 yes, F32 no) {
  for (int i = 0; i < 16; ++i)
    if (!(m >> i & 1)) yes[i] = no[i];
  return yes;
}

inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
// Two roundings: without FMA hardware a fused one would be a library call per lane.
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 fnma(F32 a, F32 b, F32 c) { return c - a * b; }
inline F32 abs(F32 a) { return a < 0 ? -a : a; }
inline bool any_nan(F32 a, F32 b) {
  I32 nan = (a != a) | (b != b);
  int32_t any = 0;
  for (int i = 0; i < 16; ++i) any |= nan[i];
  return any != 0;
}
inline float sum(F32 a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}
inline float max_of(F32 a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
  return a[0];
}
// To the nearest integer, ties to even; exact for |a| < 2^22, which is all the callers need.
inline F32 round(F32 a) {
  const F32 magic = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves no fraction bits
  F32 shifted = a + magic;
  asm("" : "+m"(shifted));  // keeps the compiler from cancelling the two
  return shifted - magic;
}
// x · 2^n for integral n, 0 below the normal range.
inline F32 scale_by_power(F32 x, F32 n) {
  I32 exponent = (__builtin_convertvector(n, I32) + 127) << 23;
  F32 power;
  __builtin_memcpy(&power, &exponent, 64);
  return n < -126.0f ? F32{} : x * power;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FFu;
  uint32_t bits;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline F32 load_f16(const uint16_t* p) {
  F32 r;
  for (int i = 0; i < 16; ++i) r[i] = half_to_float(p[i]);
  return r;
}
inline F32 load_bf16(const uint16_t* p) {
  U32 r;
  for (int i = 0; i < 16; ++i) r[i] = static_cast<uint32_t>(p[i]) << 16;
  return F32(r);
}
inline uint16_t to_f16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u)  // 65536 and more, infinity, NaN
    return static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u));
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded by the addition
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value += 0.5f;
    __builtin_memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude + 0xFFFu + odd - 0x38000000u) >> 13));
}

typedef double F64 __attribute__((vector_size(128)));
inline F64 splat_wide(double x) { return F64{} + x; }
inline F64 widen(F32 x) { return __builtin_convertvector(x, F64); }
inline F64 add(F64 a, F64 b) { return a + b; }
inline F64 sub(F64 a, F64 b) { return a - b; }
inline F64 mul(F64 a, F64 b) { return a * b; }
inline F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
inline double sum(F64 a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}

inline I32 splat_int(int32_t x) { return I32{} + x; }
inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
// Sixteen bytes, or the four bits from bit `from` on of each.
inline I32 load_bytes(const uint8_t* p) {
  I32 r;
  for (int i = 0; i < 16; ++i) r[i] = p[i];
  return r;
}
inline I32 load_bytes(const int8_t* p) {
  I32 r;
  for (int i = 0; i < 16; ++i) r[i] = p[i];
  return r;
}
inline I32 load_nibbles(const uint8_t* p, int from) { return load_bytes(p) >> from & 15; }
inline I32 shift_left(I32 x, int bits) { return x << bits; }
inline I32 shift_right(I32 x, int bits) { return x >> bits; }
inline I32 add(I32 a, I32 b) { return a + b; }
// Lanes as pairs of int16: a₀b₀ + a₁b₁.
inline I32 pair_dot(I32 a, I32 b) { return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
inline int32_t sum(I32 x) {
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += x[i];
  return total;
}
inline void store(int32_t* p, I32 x) { __builtin_memcpy(p, &x, 64); }
// To the nearest integer, ties to even, for |x| < 2^22.
inline I32 to_int(F32 x) { return __builtin_convertvector(round(x), I32); }
inline void store_bytes(int8_t* p, I32 x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x[i]);
}
inline Quads load_quads(const void* p) {
  Quads r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
inline void store_quads(void* p, Quads x) { __builtin_memcpy(p, &x, 64); }
inline Quads splat_quad(const int8_t* p) {
  uint32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return Quads{} + quad;
}
inline Quads either(Quads a, Quads b) { return a | b; }
inline Quads low_nibbles(Quads x) { return x & 0x0F0F0F0Fu; }
inline Quads high_nibbles(Quads x) { return x >> 4 & 0x0F0F0F0Fu; }
// The bits of `mask` of each byte, taken `from` bits higher (−n: n lower), alone or beside those of `low`.
inline Quads bits(Quads x, int from, int mask) {
  return (from < 0 ? x << -from : x >> from) & 0x01010101u * static_cast<uint32_t>(mask);
}
inline Quads with_bits(Quads low, Quads x, int from, int mask) { return low | bits(x, from, mask); }
// Byte `index` of each quad, zero-extended.
inline I32 byte_of(Quads x, int index) { return I32(x >> static_cast<uint32_t>(8 * index) & 255u); }

// Of a group in parts: an integer scale, and sums of the dots it has multiplied: float32 holds them exactly.
using Part = F32;
inline Part as_part(I32 x) { return to_float(x); }
inline F32 part_sum(Part x) { return x; }

// acc + Σ over each quad of unsigned weight bytes × signed activation bytes, exact.
inline I32 dot(I32 acc, Quads weights, Quads activations) {
  for (int b = 0; b < 4; ++b) acc += byte_of(weights, b) * (I32(activations << (24 - 8 * b)) >> 24);
  return acc;
}

// kCount dots of quads of kBits-bit codes with activations within ±127, one after another, exact. `from` is what their
// sum begins with, given at both ends so that it can be added first or last; `j` counts up from 0. Register tiles are to
// have at most kSlots batch rows.
template <int kBits, int kCount, int kZero = 0>
struct Dots {
  using Weights = Quads;
  static constexpr bool kPairs = false;
  static constexpr int kSlots = 6;
  I32 sum;
  void begin(I32 from) { sum = from; }
  void add(int, Quads weights, Quads activations) { sum = dot(sum, weights, activations); }
  I32 end(I32) const { return sum; }
  Part scaled(const Part& scale) const { return mul(to_float(sum), scale); }
  Part scaled(const Part& scale, const Part& before) const { return fma(to_float(sum), scale, before); }
};
// The zero point of byte codes as Dots<8> leaves it in the sum.
constexpr int kByteZero = 128;

// Register tiles of float products: batch rows, and halves of a panel for so many of them.
constexpr int kTileSlots = 6;
constexpr int tile_halves(int) { return 2; }
// Vectors of a wider product.
constexpr int tile_vectors(int slots) { return tile_halves(slots); }
// Tiles of dots from which unpacking a panel once pays.
constexpr int kStripTiles = 4;
// Whether a load takes a whole cache line.
constexpr bool kLoadsLines = false;

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
