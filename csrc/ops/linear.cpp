// The linear loop, written once over codecs; compiled once per ISA.

#include "ops/linear.h"

#include "formats/panels.h"
#include "ops/table.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

// A codec reads one group of a panel: `scale` and `minimum` of rows 16·half …, and the eight columns of quads
// in any order (integer sums do not care). kZeroShift: the zero point is 8 << kZeroShift; −1 means none.

template <class PackedGroup>
struct Nibbles {
  using Group = PackedGroup;
  static constexpr int kColumns = kGroup;
  static F32 scale(const Group& g, int half) { return load_f16(g.d + 16 * half); }
  template <class F>
  static void quads(const Group& g, F f) {
    HEXAD_UNROLL
    for (int c = 0; c < 4; ++c) {
      Quads first = load_quads(g.quads[c][0]), second = load_quads(g.quads[c][16]);
      f(c, low_nibbles(first), low_nibbles(second));
      f(c + 4, high_nibbles(first), high_nibbles(second));
    }
  }
  static F32 code(const Group& g, int k, int half) {
    Quads q = load_quads(g.quads[k % 16 / 4][16 * half]);
    return to_float(byte_of(k < 16 ? low_nibbles(q) : high_nibbles(q), k % 4));
  }
};

struct W4 : Nibbles<W4Group> {
  static constexpr int kZeroShift = 0;
  static constexpr bool kHasMinimum = false;
  static F32 minimum(const Group&, int) { return splat(0); }
  // Column `k` of the group as floats, given the group's scale and minimum.
  static F32 weight(const Group& g, int k, int half, F32 scale, F32) {
    return mul(scale, sub(code(g, k, half), splat(8)));
  }
};

struct W4M : Nibbles<W4MGroup> {
  static constexpr int kZeroShift = -1;
  static constexpr bool kHasMinimum = true;
  static F32 minimum(const Group& g, int half) { return load_f16(g.m + 16 * half); }
  static F32 weight(const Group& g, int k, int half, F32 scale, F32 minimum) {
    return add(mul(scale, code(g, k, half)), minimum);
  }
};

struct W8 {
  using Group = W8Group;
  static constexpr int kColumns = kGroup;
  static constexpr int kZeroShift = 4;
  static constexpr bool kHasMinimum = false;
  static F32 scale(const Group& g, int half) { return load_f16(g.d + 16 * half); }
  static F32 minimum(const Group&, int) { return splat(0); }
  template <class F>
  static void quads(const Group& g, F f) {
    HEXAD_UNROLL
    for (int c = 0; c < 8; ++c) f(c, load_quads(g.quads[c][0]), load_quads(g.quads[c][16]));
  }
  static F32 weight(const Group& g, int k, int half, F32 scale, F32) {
    I32 code = byte_of(load_quads(g.quads[k / 4][16 * half]), k % 4);
    return mul(scale, sub(to_float(code), splat(128)));
  }
};

// A strip of a panel unpacked to bytes and float scales, for many tiles to share: the same numbers, ready to
// use.
struct StripGroup {
  float d[kPanelRows];
  float m[kPanelRows];
  uint8_t quads[8][kPanelRows][4];
};
static_assert(sizeof(StripGroup) * (kStripColumns / kGroup) == kStripBytes);

template <class Packed>
struct Strip {
  using Group = StripGroup;
  static constexpr int kZeroShift = Packed::kZeroShift;
  static constexpr bool kHasMinimum = Packed::kHasMinimum;
  static F32 scale(const Group& g, int half) { return load(g.d + 16 * half); }
  static F32 minimum(const Group& g, int half) { return load(g.m + 16 * half); }
  template <class F>
  static void quads(const Group& g, F f) {
    HEXAD_UNROLL
    for (int c = 0; c < 8; ++c) f(c, load_quads(g.quads[c][0]), load_quads(g.quads[c][16]));
  }
  static void unpack(const typename Packed::Group* from, int64_t groups, Group* to) {
    for (int64_t i = 0; i < groups; ++i) {
      for (int half = 0; half < 2; ++half) {
        store(to[i].d + 16 * half, Packed::scale(from[i], half));
        if (kHasMinimum) store(to[i].m + 16 * half, Packed::minimum(from[i], half));
      }
      Packed::quads(from[i], [&](int c, const Quads& first, const Quads& second) {
        store_quads(to[i].quads[c][0], first);
        store_quads(to[i].quads[c][16], second);
      });
    }
  }
};

// One panel × one tile of `W` rows over `count` groups of activations at `x`, which belong to the panel's
// groups 0, 1, … or, if `index` is given, index[0], index[1], …; `out` is [W][32]. `resume` goes on from what
// it holds.
template <class Codec, int W>
inline void quantised_tile(const typename Codec::Group* panel, const int32_t* index, int64_t count,
                           const char* x, bool resume, float* out) {
  F32 sums[2][W];
  HEXAD_UNROLL
  for (int t = 0; t < W; ++t) {
    sums[0][t] = resume ? load(out + t * kPanelRows) : splat(0);
    sums[1][t] = resume ? load(out + t * kPanelRows + 16) : splat(0);
  }
  for (int64_t i = 0; i < count; ++i, x += activation_group_bytes(W)) {
    const typename Codec::Group* group = panel + (index ? index[i] : i);
    const int8_t* q = reinterpret_cast<const int8_t*>(x);
    const float* d = reinterpret_cast<const float*>(x + W * kGroup);
    const float* s = d + W;
    const int32_t* n = reinterpret_cast<const int32_t*>(s + W);
    I32 acc[2][W];
    HEXAD_UNROLL
    for (int t = 0; t < W; ++t) {
      acc[0][t] = Codec::kZeroShift < 0 ? splat_int(0) : shift_left(splat_int(n[t]), Codec::kZeroShift);
      acc[1][t] = acc[0][t];
    }
    Codec::quads(*group, [&](int c, const Quads& first, const Quads& second) __attribute__((always_inline)) {
      HEXAD_UNROLL
      for (int t = 0; t < W; ++t) {
        Quads quad = splat_quad(q + (c * W + t) * 4);
        acc[0][t] = dot(acc[0][t], first, quad);
        acc[1][t] = dot(acc[1][t], second, quad);
      }
    });
    F32 scale[2] = {Codec::scale(*group, 0), Codec::scale(*group, 1)};
    HEXAD_UNROLL
    for (int t = 0; t < W; ++t) {
      F32 dx = splat(d[t]);
      sums[0][t] = fma(to_float(acc[0][t]), mul(scale[0], dx), sums[0][t]);
      sums[1][t] = fma(to_float(acc[1][t]), mul(scale[1], dx), sums[1][t]);
    }
    if constexpr (Codec::kHasMinimum) {
      F32 minimum[2] = {Codec::minimum(*group, 0), Codec::minimum(*group, 1)};
      HEXAD_UNROLL
      for (int t = 0; t < W; ++t) {
        F32 sx = splat(s[t]);
        sums[0][t] = fma(minimum[0], sx, sums[0][t]);
        sums[1][t] = fma(minimum[1], sx, sums[1][t]);
      }
    }
  }
  HEXAD_UNROLL
  for (int t = 0; t < W; ++t) {
    store(out + t * kPanelRows, sums[0][t]);
    store(out + t * kPanelRows + 16, sums[1][t]);
  }
}

// Tiles from which unpacking the panel once pays.
constexpr int kStripTiles = 4;

// Fetches the i-th of n parts of the next strip (or panel) while a tile is multiplied: unpacking it would wait
// for memory otherwise, and the multiplications leave memory idle. Past the end it does nothing.
inline void prefetch_part(const void* next, int64_t bytes, int i, int n) {
  const char* p = static_cast<const char*>(next);
  const int64_t lines = (bytes + 63) / 64;
  for (int64_t line = lines * i / n; line < lines * (i + 1) / n; ++line)
    __builtin_prefetch(p + 64 * line, 0, 2);
}

template <class Packed, int W>
void quantised(const LinearArgs& a) {
  const auto* panel = static_cast<const typename Packed::Group*>(a.panel);
  const char* tiles = static_cast<const char*>(a.tiles);
  const int64_t groups = a.columns / kGroup;
  const auto out = [&](int i) { return a.out + int64_t{i} * W * kPanelRows; };
  if (a.tile_count < kStripTiles) {
    for (int i = 0; i < a.tile_count; ++i)
      quantised_tile<Packed, W>(panel, nullptr, groups, tiles + i * a.tile_stride, false, out(i));
  } else {
    constexpr int64_t kStripGroups = kStripColumns / kGroup;
    StripGroup* strip = static_cast<StripGroup*>(a.scratch);
    for (int64_t first = 0; first < groups; first += kStripGroups) {
      const int64_t count = groups - first < kStripGroups ? groups - first : kStripGroups;
      Strip<Packed>::unpack(panel + first, count, strip);
      for (int i = 0; i < a.tile_count; ++i) {
        prefetch_part(panel + first + count, count * sizeof(typename Packed::Group), i, a.tile_count);
        quantised_tile<Strip<Packed>, W>(strip, nullptr, count,
                                         tiles + i * a.tile_stride + first * activation_group_bytes(W),
                                         first > 0, out(i));
      }
    }
  }
  for (int i = 0; i < a.tile_count; ++i) {
    const char* tile = tiles + i * a.tile_stride;
    const int32_t* outliers = reinterpret_cast<const int32_t*>(tile + groups * activation_group_bytes(W));
    if (*outliers > 0)
      quantised_tile<Packed, W>(panel, outliers + 1, *outliers, tile + outlier_offset(groups, W), true,
                                out(i));
  }
}

struct F16 {
  using Group = F16Column;
  static constexpr int kColumns = 1;
  static F32 scale(const Group&, int) { return splat(1); }
  static F32 minimum(const Group&, int) { return splat(0); }
  static F32 weight(const Group& g, int, int half, F32, F32) { return load_f16(g.w + 16 * half); }
};
struct F32Dense {
  using Group = F32Column;
  static constexpr int kColumns = 1;
  static F32 scale(const Group&, int) { return splat(1); }
  static F32 minimum(const Group&, int) { return splat(0); }
  static F32 weight(const Group& g, int, int half, F32, F32) { return load(g.w + 16 * half); }
};

template <class Codec, int W>
void dense(const LinearArgs& a) {
  constexpr int kColumns = Codec::kColumns;
  for (int i = 0; i < a.tile_count; ++i) {
    const auto* group = static_cast<const typename Codec::Group*>(a.panel);
    const float* x = reinterpret_cast<const float*>(static_cast<const char*>(a.tiles) + i * a.tile_stride);
    F32 sums[2][W];
    HEXAD_UNROLL
    for (int t = 0; t < W; ++t) sums[0][t] = sums[1][t] = splat(0);
    for (int64_t k = 0; k < a.columns; k += kColumns, ++group) {
      const F32 scale[2] = {Codec::scale(*group, 0), Codec::scale(*group, 1)};
      const F32 minimum[2] = {Codec::minimum(*group, 0), Codec::minimum(*group, 1)};
      for (int j = 0; j < kColumns; ++j, x += W) {
        F32 first = Codec::weight(*group, j, 0, scale[0], minimum[0]);
        F32 second = Codec::weight(*group, j, 1, scale[1], minimum[1]);
        HEXAD_UNROLL
        for (int t = 0; t < W; ++t) {
          F32 value = splat(x[t]);
          sums[0][t] = fma(first, value, sums[0][t]);
          sums[1][t] = fma(second, value, sums[1][t]);
        }
      }
    }
    float* out = a.out + int64_t{i} * W * kPanelRows;
    HEXAD_UNROLL
    for (int t = 0; t < W; ++t) {
      store(out + t * kPanelRows, sums[0][t]);
      store(out + t * kPanelRows + 16, sums[1][t]);
    }
  }
}

template <template <class, int> class Loop, class Codec>
void by_width(const LinearArgs& a) {
  switch (a.width) {
    case 1:
      return Loop<Codec, 1>::run(a);
    case 2:
      return Loop<Codec, 2>::run(a);
    case 3:
      return Loop<Codec, 3>::run(a);
    case 4:
      return Loop<Codec, 4>::run(a);
    case 5:
      return Loop<Codec, 5>::run(a);
    default:
      return Loop<Codec, 6>::run(a);
  }
}
template <class Codec, int W>
struct Quantised {
  static void run(const LinearArgs& a) { quantised<Codec, W>(a); }
};
template <class Codec, int W>
struct Dense {
  static void run(const LinearArgs& a) { dense<Codec, W>(a); }
};

template <class Codec>
void gather(const void* panels, int64_t row, int64_t columns, float* out) {
  constexpr int kColumns = Codec::kColumns;
  const auto* group =
      static_cast<const typename Codec::Group*>(panels) + row / kPanelRows * (columns / kColumns);
  const int half = row % kPanelRows / 16, lane = row % 16;
  float lanes[16];
  for (int64_t k = 0; k < columns; k += kColumns, ++group) {
    const F32 scale = Codec::scale(*group, half), minimum = Codec::minimum(*group, half);
    for (int j = 0; j < kColumns; ++j) {
      store(lanes, Codec::weight(*group, j, half, scale, minimum));
      out[k + j] = lanes[lane];
    }
  }
}

}  // namespace

void fill_linear(Kernels& table) {
  auto at = [](Layout layout) { return static_cast<int>(layout); };
  table.linear_quantised[at(Layout::kW4)] = by_width<Quantised, W4>;
  table.linear_quantised[at(Layout::kW4M)] = by_width<Quantised, W4M>;
  table.linear_quantised[at(Layout::kW8)] = by_width<Quantised, W8>;
  table.linear_dense[at(Layout::kW4)] = by_width<Dense, W4>;
  table.linear_dense[at(Layout::kW4M)] = by_width<Dense, W4M>;
  table.linear_dense[at(Layout::kW8)] = by_width<Dense, W8>;
  table.linear_dense[at(Layout::kF16)] = by_width<Dense, F16>;
  table.linear_dense[at(Layout::kF32)] = by_width<Dense, F32Dense>;
  table.gather_row[at(Layout::kW4)] = gather<W4>;
  table.gather_row[at(Layout::kW4M)] = gather<W4M>;
  table.gather_row[at(Layout::kW8)] = gather<W8>;
  table.gather_row[at(Layout::kF16)] = gather<F16>;
  table.gather_row[at(Layout::kF32)] = gather<F32Dense>;
}

}  // namespace hexad::HEXAD_NAMESPACE
