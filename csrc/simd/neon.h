// The vector vocabulary on ARMv8.2 with NEON's dot products: 16 float or int32 lanes, or 16 quads of bytes, in
// four registers of 128 bits.
#pragma once

#include <arm_neon.h>

#include <cstdint>

// Before a loop over tile slots or quads: its vectors are to stay in registers.
#define HEXAD_UNROLL _Pragma("GCC unroll 16")

namespace hexad::HEXAD_NAMESPACE {
namespace {

struct F32 {
  float32x4_t a, b, c, d;
};
struct I32 {
  int32x4_t a, b, c, d;
};
struct Quads {
  uint8x16_t a, b, c, d;
};
using Mask = uint16_t;

inline F32 splat(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
inline F32 load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
inline void store(float* p, F32 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
inline Mask first_lanes(int64_t n) { return n >= 16 ? Mask{0xFFFF} : static_cast<Mask>((1u << n) - 1); }
// NEON has no masked loads and stores: whole vectors go at once, the rest lane by lane.
inline F32 load(const float* p, Mask m) {
  if (m == 0xFFFF) return load(p);
  float lanes[16] = {};
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) lanes[i] = p[i];
  return load(lanes);
}
inline void store(float* p, F32 x, Mask m) {
  if (m == 0xFFFF) return store(p, x);
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) p[i] = lanes[i];
}
// Lanes of all ones and all zeros to bits, `bit` being that of the first lane, and back.
inline uint32x4_t bits_from(uint32_t bit) { return uint32x4_t{bit, bit << 1, bit << 2, bit << 3}; }
inline Mask at_least(F32 a, F32 b) {
  const uint32x4_t low = vorrq_u32(vandq_u32(vcgeq_f32(a.a, b.a), bits_from(1)),
                                   vandq_u32(vcgeq_f32(a.b, b.b), bits_from(1 << 4)));
  const uint32x4_t high = vorrq_u32(vandq_u32(vcgeq_f32(a.c, b.c), bits_from(1 << 8)),
                                    vandq_u32(vcgeq_f32(a.d, b.d), bits_from(1 << 12)));
  return static_cast<Mask>(vaddvq_u32(vorrq_u32(low, high)));
}
inline F32 select(Mask m, F32 yes, F32 no) {
  const uint32x4_t bits = vdupq_n_u32(m);
  return {vbslq_f32(vtstq_u32(bits, bits_from(1)), yes.a, no.a),
          vbslq_f32(vtstq_u32(bits, bits_from(1 << 4)), yes.b, no.b),
          vbslq_f32(vtstq_u32(bits, bits_from(1 << 8)), yes.c, no.c),
          vbslq_f32(vtstq_u32(bits, bits_from(1 << 12)), yes.d, no.d)};
}

inline F32 add(F32 a, F32 b) {
  return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b), vaddq_f32(a.c, b.c), vaddq_f32(a.d, b.d)};
}
inline F32 sub(F32 a, F32 b) {
  return {vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b), vsubq_f32(a.c, b.c), vsubq_f32(a.d, b.d)};
}
inline F32 mul(F32 a, F32 b) {
  return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b), vmulq_f32(a.c, b.c), vmulq_f32(a.d, b.d)};
}
inline F32 div(F32 a, F32 b) {
  return {vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b), vdivq_f32(a.c, b.c), vdivq_f32(a.d, b.d)};
}
// a > b ? a : b: fmax would return NaN where a is NaN.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F32 max(F32 a, F32 b) {
  return {larger(a.a, b.a), larger(a.b, b.b), larger(a.c, b.c), larger(a.d, b.d)};
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b), vfmaq_f32(c.c, a.c, b.c),
          vfmaq_f32(c.d, a.d, b.d)};
}
// c − a · b, rounded once
inline F32 fnma(F32 a, F32 b, F32 c) {
  return {vfmsq_f32(c.a, a.a, b.a), vfmsq_f32(c.b, a.b, b.b), vfmsq_f32(c.c, a.c, b.c),
          vfmsq_f32(c.d, a.d, b.d)};
}
inline F32 abs(F32 a) { return {vabsq_f32(a.a), vabsq_f32(a.b), vabsq_f32(a.c), vabsq_f32(a.d)}; }
inline float sum(F32 a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.a, a.c), vaddq_f32(a.b, a.d))); }
inline float max_of(F32 a) {
  const float32x4_t four = larger(larger(a.a, a.c), larger(a.b, a.d)),
                    two = larger(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger(two, vextq_f32(two, two, 1)), 0);
}
inline bool any_nan(F32 a, F32 b) {
  const auto numbers = [](float32x4_t x, float32x4_t y) {
    return vandq_u32(vceqq_f32(x, x), vceqq_f32(y, y));
  };
  return vminvq_u32(vandq_u32(vandq_u32(numbers(a.a, b.a), numbers(a.b, b.b)),
                              vandq_u32(numbers(a.c, b.c), numbers(a.d, b.d)))) == 0;
}
inline F32 round(F32 a) { return {vrndnq_f32(a.a), vrndnq_f32(a.b), vrndnq_f32(a.c), vrndnq_f32(a.d)}; }
// x · 2^n for integral n ≤ 127, 0 below the normal range: there the conversion saturates.
inline F32 scale_by_power(F32 x, F32 n) {
  const auto power = [](float32x4_t n) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vcvtq_u32_f32(vaddq_f32(n, vdupq_n_f32(127.0f))), 23));
  };
  return mul(x, {power(n.a), power(n.b), power(n.c), power(n.d)});
}

inline F32 load_f16(const uint16_t* p) {
  const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(p)), high = vreinterpretq_f16_u16(vld1q_u16(p + 8));
  return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
          vcvt_high_f32_f16(high)};
}
inline F32 load_bf16(const uint16_t* p) {
  const uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8), zero = vdupq_n_u16(0);
  return {vreinterpretq_f32_u16(vzip1q_u16(zero, low)), vreinterpretq_f32_u16(vzip2q_u16(zero, low)),
          vreinterpretq_f32_u16(vzip1q_u16(zero, high)), vreinterpretq_f32_u16(vzip2q_u16(zero, high))};
}
inline uint16_t to_f16(float x) {
  return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

// Sixteen doubles.
struct F64 {
  float64x2_t v[8];
};
template <class F>
inline F64 each_pair(F f) {
  return {{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)}};
}
inline F64 splat_wide(double x) {
  return each_pair([&](int) { return vdupq_n_f64(x); });
}
inline F64 widen(F32 x) {
  return {{vcvt_f64_f32(vget_low_f32(x.a)), vcvt_high_f64_f32(x.a), vcvt_f64_f32(vget_low_f32(x.b)),
           vcvt_high_f64_f32(x.b), vcvt_f64_f32(vget_low_f32(x.c)), vcvt_high_f64_f32(x.c),
           vcvt_f64_f32(vget_low_f32(x.d)), vcvt_high_f64_f32(x.d)}};
}
inline F64 add(F64 a, F64 b) {
  return each_pair([&](int i) { return vaddq_f64(a.v[i], b.v[i]); });
}
inline F64 sub(F64 a, F64 b) {
  return each_pair([&](int i) { return vsubq_f64(a.v[i], b.v[i]); });
}
inline F64 mul(F64 a, F64 b) {
  return each_pair([&](int i) { return vmulq_f64(a.v[i], b.v[i]); });
}
inline F64 fma(F64 a, F64 b, F64 c) {
  return each_pair([&](int i) { return vfmaq_f64(c.v[i], a.v[i], b.v[i]); });
}
inline double sum(F64 a) {
  const float64x2_t low = vaddq_f64(vaddq_f64(a.v[0], a.v[1]), vaddq_f64(a.v[2], a.v[3]));
  const float64x2_t high = vaddq_f64(vaddq_f64(a.v[4], a.v[5]), vaddq_f64(a.v[6], a.v[7]));
  return vaddvq_f64(vaddq_f64(low, high));
}

inline I32 splat_int(int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {v, v, v, v};
}
inline F32 to_float(I32 x) {
  return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b), vcvtq_f32_s32(x.c), vcvtq_f32_s32(x.d)};
}
// Sixteen bytes, or the four bits from bit `from` on of each.
inline I32 widen(uint8x16_t x) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
          vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))};
}
inline I32 load_bytes(const uint8_t* p) { return widen(vld1q_u8(p)); }
inline I32 load_bytes(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
          vmovl_high_s16(high)};
}
inline I32 load_nibbles(const uint8_t* p, int from) {
  const uint8x16_t x = vld1q_u8(p);
  return widen(from == 4 ? vshrq_n_u8(x, 4) : vandq_u8(x, vdupq_n_u8(15)));
}
inline I32 shift_left(I32 x, int bits) { return {x.a << bits, x.b << bits, x.c << bits, x.d << bits}; }
inline I32 shift_right(I32 x, int bits) { return {x.a >> bits, x.b >> bits, x.c >> bits, x.d >> bits}; }
inline I32 add(I32 a, I32 b) {
  return {vaddq_s32(a.a, b.a), vaddq_s32(a.b, b.b), vaddq_s32(a.c, b.c), vaddq_s32(a.d, b.d)};
}
// Lanes as pairs of int16: a₀b₀ + a₁b₁.
inline I32 pair_dot(I32 a, I32 b) {
  const auto dots = [](int32x4_t x, int32x4_t y) {
    return vmlaq_s32(vmulq_s32(x << 16 >> 16, y << 16 >> 16), x >> 16, y >> 16);
  };
  return {dots(a.a, b.a), dots(a.b, b.b), dots(a.c, b.c), dots(a.d, b.d)};
}
inline int32_t sum(I32 x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.c), vaddq_s32(x.b, x.d))); }
inline void store(int32_t* p, I32 x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
inline I32 to_int(F32 x) {
  return {vcvtnq_s32_f32(x.a), vcvtnq_s32_f32(x.b), vcvtnq_s32_f32(x.c), vcvtnq_s32_f32(x.d)};
}
inline void store_bytes(int8_t* p, I32 x) {
  const auto halves = [](int32x4_t low, int32x4_t high) {
    return vreinterpretq_s8_s16(vuzp1q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high)));
  };
  vst1q_s8(p, vuzp1q_s8(halves(x.a, x.b), halves(x.c, x.d)));
}

inline Quads load_quads(const void* p) {
  const uint8_t* from = static_cast<const uint8_t*>(p);
  return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
}
inline void store_quads(void* p, Quads x) {
  uint8_t* to = static_cast<uint8_t*>(p);
  vst1q_u8(to, x.a);
  vst1q_u8(to + 16, x.b);
  vst1q_u8(to + 32, x.c);
  vst1q_u8(to + 48, x.d);
}
// One quad for all lanes: dot products take it from the first lane of a register.
struct Quad {
  int8x8_t x;
};
inline Quad splat_quad(const int8_t* p) {
  uint32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return {vcreate_s8(quad)};
}
inline Quads either(Quads a, Quads b) {
  return {vorrq_u8(a.a, b.a), vorrq_u8(a.b, b.b), vorrq_u8(a.c, b.c), vorrq_u8(a.d, b.d)};
}
inline Quads low_nibbles(Quads x) {
  const uint8x16_t low = vdupq_n_u8(15);
  return {vandq_u8(x.a, low), vandq_u8(x.b, low), vandq_u8(x.c, low), vandq_u8(x.d, low)};
}
inline Quads high_nibbles(Quads x) {
  return {vshrq_n_u8(x.a, 4), vshrq_n_u8(x.b, 4), vshrq_n_u8(x.c, 4), vshrq_n_u8(x.d, 4)};
}
// The bits of `mask` of each byte, taken `from` bits higher (−n: n lower), alone or beside those of `low`.
inline uint8x16_t moved(uint8x16_t x, int from) {
  return from > 0 ? x >> static_cast<uint8_t>(from) : x << static_cast<uint8_t>(-from);
}
inline Quads bits(Quads x, int from, int mask) {
  const uint8x16_t kept = vdupq_n_u8(static_cast<uint8_t>(mask));
  return {vandq_u8(moved(x.a, from), kept), vandq_u8(moved(x.b, from), kept),
          vandq_u8(moved(x.c, from), kept), vandq_u8(moved(x.d, from), kept)};
}
inline Quads with_bits(Quads low, Quads x, int from, int mask) {
  const uint8x16_t kept = vdupq_n_u8(static_cast<uint8_t>(mask));
  return {vbslq_u8(kept, moved(x.a, from), low.a), vbslq_u8(kept, moved(x.b, from), low.b),
          vbslq_u8(kept, moved(x.c, from), low.c), vbslq_u8(kept, moved(x.d, from), low.d)};
}
// Byte `index` of each quad, zero-extended.
inline I32 byte_of(Quads x, int index) {
  const auto byte = [&](uint8x16_t v) {
    return vreinterpretq_s32_u32(vreinterpretq_u32_u8(v) >> static_cast<uint32_t>(8 * index) & 255u);
  };
  return {byte(x.a), byte(x.b), byte(x.c), byte(x.d)};
}

using Part = F32;
inline Part as_part(I32 x) { return to_float(x); }
inline F32 part_sum(Part x) { return x; }

// acc + Σ over each quad of weight bytes × signed activation bytes, exact. Where there is usdot (i8mm), weight
// bytes are unsigned; else they are signed.
inline int32x4_t dot(int32x4_t acc, uint8x16_t weights, Quad activations) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  return vusdotq_lane_s32(acc, weights, activations.x, 0);
#else
  return vdotq_lane_s32(acc, vreinterpretq_s8_u8(weights), activations.x, 0);
#endif
}
inline I32 dot(I32 acc, Quads weights, Quad activations) {
  return {dot(acc.a, weights.a, activations), dot(acc.b, weights.b, activations),
          dot(acc.c, weights.c, activations), dot(acc.d, weights.d, activations)};
}

// The zero point of byte codes as Dots<8> leaves it in the sum: none where bytes are signed, since flipping a
// code's highest bit subtracts 128.
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int kByteZero = 128;
#else
constexpr int kByteZero = 0;
#endif

// kCount dots of quads of kBits-bit codes, one after another; `from` is what their sum begins with. Register tiles
// are to have at most kSlots batch rows: three of one half have 24 of the 32 registers for their sums.
template <int kBits, int kCount, int kZero = 0>
struct Dots {
  using Weights = Quads;
  static constexpr bool kPairs = false;
  static constexpr int kSlots = 3;
  I32 sum;
  void begin(I32 from) { sum = from; }
  void add(int, Quads weights, Quad activations) {
    if constexpr (kBits == 8 && kByteZero == 0) {
      const uint8x16_t top = vdupq_n_u8(128);
      weights = {veorq_u8(weights.a, top), veorq_u8(weights.b, top), veorq_u8(weights.c, top),
                 veorq_u8(weights.d, top)};
    }
    sum = dot(sum, weights, activations);
  }
  I32 end(I32) const { return sum; }
  Part scaled(const Part& scale) const { return mul(to_float(sum), scale); }
  Part scaled(const Part& scale, const Part& before) const { return fma(to_float(sum), scale, before); }
};

// Register tiles of float products: batch rows, and halves of a panel for so many of them; halves also of dots.
constexpr int kTileSlots = 6;
constexpr int tile_halves(int slots) { return slots == 1 ? 2 : 1; }
// Vectors of a wider product.
constexpr int tile_vectors(int slots) { return tile_halves(slots); }
// Tiles of dots from which unpacking a panel once pays.
constexpr int kStripTiles = 4;
// Whether a load takes a whole cache line.
constexpr bool kLoadsLines = false;

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
