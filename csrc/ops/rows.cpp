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

// The scales of 16 groups whose largest magnitudes are given (∞ where a number is none), and what to multiply a
// group with for its codes: 0 where they are 0. No weights can make a NaN or an infinity right again: the group's
// scale says so. Below 1e-36, 1/d overflows.
void group_scales(const float* largest, float* scales, float* inverses) {
  F32 d = div(load(largest), splat(127.0f));
  const Mask finite = at_least(splat(1e37f), d), positive = at_least(d, splat(1e-36f));
  store(inverses, select(finite & positive, div(splat(1.0f), d), splat(0)));
  store(scales, select(finite, select(positive, d, splat(0)), splat(__builtin_nanf(""))));
}

float largest_of(F32 first, F32 second) {
  return any_nan(first, second) ? __builtin_inff() : max_of(max(abs(first), abs(second)));
}

// Writes q and d of one group into slot `slot`.
inline void store_group(F32 first, F32 second, float inverse, float scale, int slot, int width, char* group) {
  int8_t codes[kGroup] = {};
  if (inverse != 0) {
    store_bytes(codes, to_int(mul(first, splat(inverse))));
    store_bytes(codes + 16, to_int(mul(second, splat(inverse))));
  }
  for (int c = 0; c < 8; ++c) __builtin_memcpy(group + (c * width + slot) * 4, codes + 4 * c, 4);
  __builtin_memcpy(group + width * kGroup + 4 * slot, &scale, 4);
}

void quantise(const float* x, int64_t n, int slot, int width, void* tile, uint8_t* outliers) {
  const int64_t groups = n / kGroup, group_bytes = activation_group_bytes(width, kPairSums);
  char* group = static_cast<char*>(tile);
  float squares = 0;
  for (int64_t first = 0; first < groups; first += 16) {
    const int count = static_cast<int>(groups - first < 16 ? groups - first : 16);
    const float* from = x + first * kGroup;
    float largest[16] = {}, scales[16], inverses[16];
    for (int g = 0; g < count; ++g)
      largest[g] = largest_of(load(from + g * kGroup), load(from + g * kGroup + 16));
    group_scales(largest, scales, inverses);
    for (int g = 0; g < count; ++g, from += kGroup, group += group_bytes) {
      store_group(load(from), load(from + 16), inverses[g], scales[g], slot, width, group);
      squares += scales[g] * scales[g];
    }
  }
  const float limit = static_cast<float>(kOutlier) * (squares / static_cast<float>(groups));
  const float* d = reinterpret_cast<const float*>(static_cast<char*>(tile) + width * kGroup) + slot;
  // Rounding of squares and mean could let one more pass than the capacity has room for.
  int64_t room = (groups - 1) / kOutlier;
  for (int64_t g = 0; g < groups && room > 0; ++g, d += group_bytes / 4) {
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
  const F32 first = sub(load(x), mul(d, load(q))), second = sub(load(x + 16), mul(d, load(q + 16)));
  float largest[16] = {largest_of(first, second)}, scales[16], inverses[16];
  group_scales(largest, scales, inverses);
  store_group(first, second, inverses[0], scales[0], slot, width, static_cast<char*>(rest));
}

template <int W>
void total(int64_t groups, void* tile) {
  constexpr int kRow = 4 * W, kVectors = (kRow + 15) / 16;
  char* group = static_cast<char*>(tile);
  for (int64_t g = 0; g < groups; ++g, group += activation_group_bytes(W, kPairSums)) {
    int8_t q[8 * kRow + 16] = {};  // vectors may end past the last
    __builtin_memcpy(q, group, 8 * kRow);
    // Over the quads of either half, for each slot and column of a quad.
    int32_t sums[2][16 * kVectors];
    for (int half = 0; half < 2; ++half)
      for (int v = 0; v < kVectors; ++v) {
        const int8_t* from = q + half * 4 * kRow + 16 * v;
        store(sums[half] + 16 * v, add(add(load_bytes(from), load_bytes(from + kRow)),
                                       add(load_bytes(from + 2 * kRow), load_bytes(from + 3 * kRow))));
      }
    float* d = reinterpret_cast<float*>(group + 8 * kRow);
    int32_t* n = reinterpret_cast<int32_t*>(d + 2 * W);
    for (int slot = 0; slot < W; ++slot) {
      const int32_t *first = sums[0] + 4 * slot, *last = sums[1] + 4 * slot;
      const int32_t pairs[2][2] = {{first[0] + first[1], first[2] + first[3]},
                                   {last[0] + last[1], last[2] + last[3]}};
      const int32_t begin = pairs[0][0] + pairs[0][1], all = begin + pairs[1][0] + pairs[1][1];
      d[W + slot] = d[slot] * static_cast<float>(all);
      n[slot] = -4 * all;
      int16_t* halves = reinterpret_cast<int16_t*>(n + W) + 2 * slot;
      halves[0] = static_cast<int16_t>(-begin);
      halves[1] = static_cast<int16_t>(begin - all);
      if (kPairSums) {
        int16_t* p = reinterpret_cast<int16_t*>(n + 2 * W) + 2 * slot;
        for (int half = 0; half < 2; ++half)
          for (int pair = 0; pair < 2; ++pair)
            p[2 * W * half + pair] = static_cast<int16_t>(-4 * pairs[half][pair]);
      }
    }
  }
}

void total_by_width(int64_t groups, int width, void* tile) {
  constexpr void (*kTotal[])(int64_t, void*) = {total<1>, total<2>, total<3>, total<4>, total<5>, total<6>};
  kTotal[width - 1](groups, tile);
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

void add_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t n,
              float* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; ++row, a += a_stride, b += b_stride, out += out_stride)
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
  table.total = total_by_width;
  table.interleave = interleave;
  table.rotate = rotate;
  table.gated_silu = gated_silu;
  table.add = add_rows;
  table.read = read;
  table.dot_rate = dot_rate;
}

}  // namespace hexad::HEXAD_NAMESPACE
