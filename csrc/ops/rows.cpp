// Row ops; compiled once per ISA. Contracts in ops/rows.h.

#include "ops/rows.h"

#include "ops/linear.h"
#include "ops/table.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

void norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  F32 squares = splat(0);
  for (int64_t i = 0; i < n; i += 16) {
    F32 v = load(x + i, first_lanes(n - i));
    squares = fma(v, v, squares);
  }
  const float mean = sum(squares) / static_cast<float>(n);
  const F32 factor = splat(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < n; i += 16) {
    Mask m = first_lanes(n - i);
    store(out + i, mul(mul(load(x + i, m), factor), load(weight + i, m)), m);
  }
}

// Quantises 32 values into slot `slot` of an activation group; returns their scale.
float quantise_group(F32 first, F32 second, int slot, int width, char* group) {
  float d = max_of(max(abs(first), abs(second))) / 127.0f;
  // No weights can make a NaN or an infinity right again: the group's scale says so. Below 1e-36, 1/d overflows.
  const bool finite = !any_nan(first, second) && d <= 1e37f;
  if (!finite) first = second = splat(0);
  if (!(d >= 1e-36f)) d = 0;
  const F32 inverse = splat(finite && d > 0 ? 1.0f / d : 0.0f);
  if (!finite) d = __builtin_nanf("");
  const I32 q[2] = {to_int(mul(first, inverse)), to_int(mul(second, inverse))};
  const int32_t first_total = sum(q[0]), total = first_total + sum(q[1]);
  int8_t bytes[kGroup];
  store_bytes(bytes, q[0]);
  store_bytes(bytes + 16, q[1]);
  for (int c = 0; c < 8; ++c) __builtin_memcpy(group + (c * width + slot) * 4, bytes + 4 * c, 4);
  float* scales = reinterpret_cast<float*>(group + width * kGroup);
  scales[slot] = d;
  scales[width + slot] = d * static_cast<float>(total);
  int32_t* totals = reinterpret_cast<int32_t*>(scales + 2 * width);
  totals[slot] = -4 * total;
  totals[width + slot] = -4 * first_total;
  if (kPairSums) {
    constexpr float kFirst[16] = {1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0};
    int16_t* pairs = reinterpret_cast<int16_t*>(totals + 2 * width) + 2 * slot;
    for (int half = 0; half < 2; ++half, pairs += 2 * width) {
      const int both = half == 0 ? first_total : total - first_total;
      const int pair = static_cast<int>(sum(mul(to_float(q[half]), load(kFirst))));  // integers, exact
      pairs[0] = static_cast<int16_t>(-4 * pair);
      pairs[1] = static_cast<int16_t>(-4 * (both - pair));
    }
  }
  return d;
}

void quantise(const float* x, int64_t n, int slot, int width, void* tile, uint8_t* outliers) {
  char* group = static_cast<char*>(tile);
  float squares = 0;
  for (int64_t i = 0; i < n; i += kGroup, group += activation_group_bytes(width, kPairSums)) {
    const float d = quantise_group(load(x + i), load(x + i + 16), slot, width, group);
    squares += d * d;
  }
  const int64_t groups = n / kGroup;
  const float limit = static_cast<float>(kOutlier) * (squares / static_cast<float>(groups));
  const float* d = reinterpret_cast<const float*>(static_cast<char*>(tile) + width * kGroup) + slot;
  // Rounding of squares and mean could let one more pass than the capacity has room for.
  int64_t room = (groups - 1) / kOutlier;
  for (int64_t g = 0; g < groups && room > 0; ++g, d += activation_group_bytes(width, kPairSums) / 4) {
    if (!(*d * *d > limit)) continue;
    outliers[g] |= static_cast<uint8_t>(1 << slot);
    --room;
  }
}

void quantise_rest(const float* x, int slot, int width, const void* group, void* rest) {
  const char* from = static_cast<const char*>(group);
  float q[kGroup];
  for (int c = 0; c < 8; ++c) {
    int8_t quad[4];
    __builtin_memcpy(quad, from + (c * width + slot) * 4, 4);
    for (int b = 0; b < 4; ++b) q[4 * c + b] = quad[b];
  }
  const F32 d = splat(reinterpret_cast<const float*>(from + width * kGroup)[slot]);
  quantise_group(sub(load(x), mul(d, load(q))), sub(load(x + 16), mul(d, load(q + 16))), slot, width,
                 static_cast<char*>(rest));
}

void interleave(const float* x, int64_t n, int slot, int width, float* tile) {
  for (int64_t i = 0; i < n; ++i) tile[i * width + slot] = x[i];
}

void rotate(float* head, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    Mask m = first_lanes(half - i);
    F32 a = load(head + i, m), b = load(head + half + i, m);
    F32 c = load(cosine + i, m), s = load(sine + i, m);
    store(head + i, sub(mul(a, c), mul(b, s)), m);
    store(head + half + i, add(mul(b, c), mul(a, s)), m);
  }
}

void gated_silu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    Mask m = first_lanes(n - i);
    F32 g = load(gate + i, m);
    // e^−g is capped where the sigmoid is already below the smallest float's reach.
    F32 sigmoid = div(splat(1.0f), add(splat(1.0f), exp(sub(splat(0), max(g, splat(-87.0f))))));
    store(out + i, mul(mul(g, sigmoid), load(up + i, m)), m);
  }
}

void add_rows(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    Mask m = first_lanes(n - i);
    store(out + i, add(load(a + i, m), load(b + i, m)), m);
  }
}

int64_t read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  Quads total[4] = {load_quads(p), load_quads(p + 64), load_quads(p + 128), load_quads(p + 192)};
  for (int64_t i = 256; i < bytes; i += 256)
    for (int j = 0; j < 4; ++j) total[j] = either(total[j], load_quads(p + i + 64 * j));
  return sum(byte_of(either(either(total[0], total[1]), either(total[2], total[3])), 0));
}

int64_t dot_rate(int64_t iterations, int64_t* sink) {
  using Chain = Dots<4, 8>;
  constexpr int kChains = Chain::kSlots * tile_halves(Chain::kSlots);
  const int8_t bytes[64] = {1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12, 13, -14, 15, -16};
  const Quads codes = low_nibbles(load_quads(bytes));
  I32 acc[kChains];
  HEXAD_UNROLL
  for (int c = 0; c < kChains; ++c) acc[c] = splat_int(0);
  for (int64_t i = 0; i < iterations; ++i) {
    const int8_t* at = bytes;
    asm volatile("" : "+r"(at) : : "memory");  // other bytes, for all that the compiler knows
    Chain dots[kChains];
    HEXAD_UNROLL
    for (int c = 0; c < kChains; ++c) dots[c].begin(acc[c]);
    HEXAD_UNROLL
    for (int j = 0; j < 8; ++j) {
      HEXAD_UNROLL
      for (int c = 0; c < kChains; ++c) dots[c].add(j, codes, splat_quad(at + c));
    }
    HEXAD_UNROLL
    for (int c = 0; c < kChains; ++c) acc[c] = dots[c].end(acc[c]);
  }
  HEXAD_UNROLL
  for (int c = 0; c < kChains; ++c) *sink += sum(acc[c]);
  return iterations * kChains * 8 * 64;
}

}  // namespace

void fill_rows(Kernels& table) {
  table.norm = norm;
  table.quantise = quantise;
  table.quantise_rest = quantise_rest;
  table.interleave = interleave;
  table.rotate = rotate;
  table.gated_silu = gated_silu;
  table.add = add_rows;
  table.read = read;
  table.dot_rate = dot_rate;
}

}  // namespace hexad::HEXAD_NAMESPACE
