// The linear loop, written once over codecs; compiled once per ISA.

#include "ops/linear.h"

#include "ops/codecs.h"
#include "ops/table.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

constexpr int64_t kStripGroups = kStripColumns / kGroup;

// How far ahead of its use a panel is asked for, in bytes. Hardware stops looking ahead at the end of each page of
// 4 KiB, which a panel is past after a few groups. Quantised panels are asked into L2: more misses can be under way
// there than in L1.
constexpr int64_t kAhead = 8192;

// Bytes from one prefetch to the next. Where hardware follows the loads well, only the first line of each aligned pair
// is asked for: it fetches the second, and does not need L1's few miss buffers for it, through which every prefetch
// goes (docs/kernels.md has the figures).
template <class Codec>
constexpr int64_t kAskedEvery =
    Codec::kBits == 8 || (kLoadsLines && Codec::kGroups > 1 && Codec::kBits >= 4) ? 128 : 64;

// Of a tile of W rows.
template <int W>
constexpr int64_t kGroupBytes = activation_group_bytes(W, kPairSums);

// H halves of a panel × T of a tile's W rows, over `count` groups of activations at `x`. These belong to the
// panel's groups 0, 1, … or, if `index` is given, index[0], index[1], …; `out` is [T][32]. `resume` goes on from
// what it holds.
template <class Codec, int W, int H, int T>
inline __attribute__((always_inline)) void quantised_block(const typename Codec::Block* panel, int first_half,
                                                           const int32_t* index, int64_t count, const char* x,
                                                           int first_slot, bool resume, float* out) {
  constexpr int kParts = Codec::kParts, kQuads = 8 / kParts, kZero = kZeroOf<Codec>;
  F32 sums[H][T];
  HEXAD_UNROLL
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h)
      sums[h][t] = resume ? load(out + t * kPanelRows + 16 * (first_half + h)) : splat(0);
  decltype(Codec::head(*panel, 0)) heads[H];
  for (int64_t i = 0; i < count; ++i, x += kGroupBytes<W>) {
    const int64_t group = Codec::kPacked && index ? index[i] : i;
    const typename Codec::Block& block = panel[group / Codec::kGroups];
    const int g = static_cast<int>(group % Codec::kGroups);
    if (g == 0 || index)
      for (int h = 0; h < H; ++h) heads[h] = Codec::head(block, first_half + h);
    if (Codec::kPacked && index == nullptr) {
      constexpr int64_t kBytes = sizeof(typename Codec::Block) / Codec::kGroups;
      constexpr uintptr_t kEvery = kAskedEvery<Codec>;
      const uintptr_t ahead =
          reinterpret_cast<uintptr_t>(panel) + static_cast<uintptr_t>(i * kBytes + kAhead);
      const char* first = reinterpret_cast<const char*>((ahead + kEvery - 1) & ~(kEvery - 1));
      HEXAD_UNROLL
      for (int64_t at = 0; at < kBytes; at += kEvery) __builtin_prefetch(first + at, 0, 2);
    }
    const int8_t* q = reinterpret_cast<const int8_t*>(x) + 4 * first_slot;
    const float* d = reinterpret_cast<const float*>(x + W * kGroup) + first_slot;
    const float* s = d + W;
    const int32_t* n = reinterpret_cast<const int32_t*>(s + W);
    const int32_t *halves = n + W, *pairs = n + 2 * W;  // of two int16 each
    Part parts[H][T];
    HEXAD_UNROLL
    for (int part = 0; part < kParts; ++part) {
      // Registers are for sums: what the parts have in common is read twice.
      if (part > 0) asm volatile("" ::: "memory");
      const auto start = [&](int t) {
        constexpr int kZeroBits = __builtin_ctz(kZero | 1024);
        if constexpr (DotsOf<Codec>::kPairs) return DotsOf<Codec>::start(pairs + part * W + t, W);
        if constexpr (kZero == 0) return splat_int(0);
        if constexpr (kParts == 1) return shift_left(splat_int(n[t]), kZeroBits - 2);
        // The lower or the upper 16 bits × zero point.
        const I32 both = splat_int(halves[t]);
        return part == 0 ? shift_right(shift_left(both, 16), 16 - kZeroBits)
                         : shift_left(shift_right(both, 16), kZeroBits);
      };
      DotsOf<Codec> dots[H][T];
      HEXAD_UNROLL
      for (int t = 0; t < T; ++t) {
        const I32 from = start(t);
        for (int h = 0; h < H; ++h) dots[h][t].begin(from);
      }
      HEXAD_UNROLL
      for (int j = 0; j < kQuads; ++j) {
        const int c = Codec::order(part * kQuads + j);
        typename DotsOf<Codec>::Weights weights[H];
        for (int h = 0; h < H; ++h) weights[h] = Codec::quad(block, g, c, first_half + h);
        HEXAD_UNROLL
        for (int t = 0; t < T; ++t) {
          const auto quad = splat_quad(q + (c * W + t) * 4);
          for (int h = 0; h < H; ++h) dots[h][t].add(j, weights[h], quad);
        }
      }
      F32 scale[H], minimum[H];
      for (int h = 0; h < H; ++h) scale[h] = Codec::scale(heads[h], block, g, part, first_half + h);
      if constexpr (!Codec::kFactors) {
        HEXAD_UNROLL
        for (int t = 0; t < T; ++t) {
          const F32 dx = splat(d[t]);
          const I32 from = start(t);
          for (int h = 0; h < H; ++h)
            sums[h][t] = fma(to_float(dots[h][t].end(from)), mul(scale[h], dx), sums[h][t]);
        }
        if constexpr (!Codec::kHasMinimum) continue;
        for (int h = 0; h < H; ++h) minimum[h] = Codec::minimum(heads[h], block, g, part, first_half + h);
        HEXAD_UNROLL
        for (int t = 0; t < T; ++t) {
          const F32 sx = splat(s[t]);
          for (int h = 0; h < H; ++h) sums[h][t] = fma(minimum[h], sx, sums[h][t]);
        }
      } else if (part == 0) {
        HEXAD_UNROLL
        for (int t = 0; t < T; ++t)
          for (int h = 0; h < H; ++h)
            parts[h][t] = dots[h][t].scaled(Codec::factor(block, g, 0, first_half + h));
      } else {
        for (int h = 0; h < H; ++h) minimum[h] = Codec::minimum(heads[h], block, g, 0, first_half + h);
        HEXAD_UNROLL
        for (int t = 0; t < T; ++t) {
          const F32 dx = splat(d[t]);
          const I32 less = splat_int(halves[t]);
          for (int h = 0; h < H; ++h) {
            const Part both = dots[h][t].scaled(Codec::factor(block, g, 1, first_half + h), parts[h][t]);
            const I32 by = pair_dot(Codec::minimum_factors(block, g, first_half + h), less);
            const F32 sum = fnma(minimum[h], to_float(by), mul(scale[h], part_sum(both)));
            sums[h][t] = fma(sum, dx, sums[h][t]);
          }
        }
      }
    }
  }
  HEXAD_UNROLL
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h) store(out + t * kPanelRows + 16 * (first_half + h), sums[h][t]);
}

// The next block's rows where `rows` are left: as few blocks as `most` rows each allow, and as equal.
constexpr int block_rows(int rows, int most) {
  const int blocks = (rows + most - 1) / most;
  return (rows + blocks - 1) / blocks;
}

// A panel × slots kFirst … of a tile, in blocks as large as the registers allow.
template <class Codec, int W, int kFirst = 0>
inline void quantised_blocks(const typename Codec::Block* panel, const int32_t* index, int64_t count,
                             const char* x, bool resume, float* out) {
  constexpr int kSlots = block_rows(W - kFirst, DotsOf<Codec>::kSlots), kHalves = tile_halves(kSlots);
  float* to = out + kFirst * kPanelRows;
  // No loop: a half known at compile time leaves nothing of addresses to be computed.
  quantised_block<Codec, W, kHalves, kSlots>(panel, 0, index, count, x, kFirst, resume, to);
  if constexpr (kHalves == 1)
    quantised_block<Codec, W, kHalves, kSlots>(panel, 1, index, count, x, kFirst, resume, to);
  if constexpr (kFirst + kSlots < W)
    quantised_blocks<Codec, W, kFirst + kSlots>(panel, index, count, x, resume, out);
}

// Whether a block takes in all of a tile of `rows` and both halves of a panel, at most `most` rows fitting. Several
// blocks go together through as many columns as a strip has, so that a panel comes from memory once and in order.
constexpr bool one_block(int rows, int most) { return rows <= most && tile_halves(rows) == 2; }

// One panel × one tile.
template <class Codec, int W>
inline void quantised_tile(const typename Codec::Block* panel, const int32_t* index, int64_t count,
                           const char* x, bool resume, float* out) {
  if constexpr (one_block(W, DotsOf<Codec>::kSlots)) {
    quantised_blocks<Codec, W>(panel, index, count, x, resume, out);
  } else {
    for (int64_t first = 0; first < count; first += kStripGroups, x += kStripGroups * kGroupBytes<W>) {
      const int64_t n = count - first < kStripGroups ? count - first : kStripGroups;
      quantised_blocks<Codec, W>(index ? panel : panel + first / Codec::kGroups,
                                 index ? index + first : nullptr, n, x, resume || first > 0, out);
    }
  }
}

// Fetches the i-th of n parts of the next strip (or panel) while a tile is multiplied: unpacking it would wait
// for memory otherwise, and the multiplications leave memory idle. Past the end it does nothing.
inline void prefetch_part(const void* next, int64_t bytes, int i, int n) {
  const char* p = static_cast<const char*>(next);
  const int64_t lines = (bytes + 63) / 64;
  for (int64_t line = lines * i / n; line < lines * (i + 1) / n; ++line)
    __builtin_prefetch(p + 64 * line, 0, 2);
}

// One panel × one tile of dense activations x [columns][W]; `out` is [W][32].
template <class Codec, int W, int H, int T>
inline __attribute__((always_inline)) void dense_block(const typename Codec::Block* column, int first_half,
                                                       int64_t columns, const float* x, bool resume,
                                                       float* out) {
  F32 sums[H][T];
  HEXAD_UNROLL
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h)
      sums[h][t] = resume ? load(out + t * kPanelRows + 16 * (first_half + h)) : splat(0);
  for (int64_t k = 0; k < columns; ++k, ++column, x += W) {
    F32 weights[H];
    __builtin_prefetch(reinterpret_cast<const char*>(column) + kAhead);
    for (int h = 0; h < H; ++h) weights[h] = Codec::weight(*column, first_half + h);
    HEXAD_UNROLL
    for (int t = 0; t < T; ++t) {
      const F32 value = splat(x[t]);
      for (int h = 0; h < H; ++h) sums[h][t] = fma(weights[h], value, sums[h][t]);
    }
  }
  HEXAD_UNROLL
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h) store(out + t * kPanelRows + 16 * (first_half + h), sums[h][t]);
}

template <class Codec, int W, int kFirst = 0>
inline void dense_blocks(const typename Codec::Block* panel, int64_t columns, const float* x, bool resume,
                         float* out) {
  constexpr int kSlots = block_rows(W - kFirst, kTileSlots), kHalves = tile_halves(kSlots);
  for (int half = 0; half < 2; half += kHalves)
    dense_block<Codec, W, kHalves, kSlots>(panel, half, columns, x + kFirst, resume,
                                           out + kFirst * kPanelRows);
  if constexpr (kFirst + kSlots < W) dense_blocks<Codec, W, kFirst + kSlots>(panel, columns, x, resume, out);
}

template <class Codec, int W>
inline void dense_tile(const typename Codec::Block* panel, int64_t columns, const float* x, bool resume,
                       float* out) {
  if constexpr (one_block(W, kTileSlots)) {
    dense_blocks<Codec, W>(panel, columns, x, resume, out);
  } else {
    for (int64_t first = 0; first < columns; first += kStripColumns) {
      const int64_t n = columns - first < kStripColumns ? columns - first : kStripColumns;
      dense_blocks<Codec, W>(panel + first, n, x + first * W, resume || first > 0, out);
    }
  }
}

// Tiles from which the next panel is fetched in parts: halves and thirds of one are more than can be under way.
constexpr int kFetchTiles = 4;

template <class Packed, int W>
void quantised(const LinearArgs& a) {
  using Block = typename Packed::Block;
  const auto* panel = static_cast<const Block*>(a.panel);
  const char* tiles = static_cast<const char*>(a.tiles);
  const int64_t groups = a.columns / kGroup;
  const auto out = [&](int i) { return a.out + int64_t{i} * W * kPanelRows; };
  if (a.tile_count < kStripTiles) {
    const int64_t blocks = groups / Packed::kGroups;
    for (int i = 0; i < a.tile_count; ++i) {
      if (a.tile_count >= kFetchTiles)
        prefetch_part(panel + blocks, blocks * static_cast<int64_t>(sizeof(Block)), i, a.tile_count);
      quantised_tile<Packed, W>(panel, nullptr, groups, tiles + i * a.tile_stride, false, out(i));
    }
  } else {
    using Unpacked = Strip<Packed>;
    // As few strips as fit, in whole blocks, and as equal: each costs every tile a walk over its sums.
    constexpr int64_t kFit = kStripBytes / sizeof(typename Unpacked::Block) / Packed::kGroups;
    const int64_t blocks = groups / Packed::kGroups, strips = (blocks + kFit - 1) / kFit;
    const int64_t in_strip = (blocks + strips - 1) / strips * Packed::kGroups;
    auto* strip = static_cast<typename Unpacked::Block*>(a.scratch);
    for (int64_t first = 0; first < groups; first += in_strip) {
      const int64_t count = groups - first < in_strip ? groups - first : in_strip;
      Unpacked::unpack(panel, first, count, strip);
      const Block* next = panel + (first + count) / Packed::kGroups;
      for (int i = 0; i < a.tile_count; ++i) {
        prefetch_part(next, count / Packed::kGroups * static_cast<int64_t>(sizeof(Block)), i, a.tile_count);
        quantised_tile<Unpacked, W>(strip, nullptr, count, tiles + i * a.tile_stride + first * kGroupBytes<W>,
                                    first > 0, out(i));
      }
    }
  }
  for (int i = 0; i < a.tile_count; ++i) {
    const char* tile = tiles + i * a.tile_stride;
    const int32_t* outliers = reinterpret_cast<const int32_t*>(tile + groups * kGroupBytes<W>);
    if (*outliers > 0)
      quantised_tile<Packed, W>(panel, outliers + 1, *outliers, tile + outlier_offset(groups, W, kPairSums),
                                true, out(i));
  }
}

// Byte k of a quad's lanes as a number.
inline F32 code(const Quads& quad, int k) { return to_float(byte_of(quad, k)); }

// Calls f(weights of 16 rows) for each column of a group in order: (code − zero) · scale + minimum.
template <class Codec, class F>
inline void each_column(const typename Codec::Block& b, int g, int half, F f) {
  const auto head = Codec::head(b, half);
  for (int c = 0; c < 8; ++c) {
    const int part = c * Codec::kParts / 8;
    F32 scale = Codec::scale(head, b, g, part, half), minimum = Codec::minimum(head, b, g, part, half);
    if constexpr (Codec::kFactors) {
      scale = mul(scale, to_float(Codec::scale_factor(b, g, part, half)));
      minimum = mul(minimum, to_float(Codec::minimum_factor(b, g, part, half)));
    }
    const Quads quad = Codec::quad(b, g, c, half);
    for (int k = 0; k < 4; ++k) {
      F32 w = mul(scale, sub(code(quad, k), splat(Codec::kZero)));
      if (Codec::kHasMinimum) w = add(w, minimum);
      f(4 * c + k, w);
    }
  }
}

// A quantised panel × dense tiles: a group is turned into floats once per tile.
template <class Codec, int W>
struct Dequantised {
  static void run(const LinearArgs& a) {
    const auto* panel = static_cast<const typename Codec::Block*>(a.panel);
    for (int i = 0; i < a.tile_count; ++i) {
      const float* x = reinterpret_cast<const float*>(static_cast<const char*>(a.tiles) + i * a.tile_stride);
      float* out = a.out + int64_t{i} * W * kPanelRows;
      for (int64_t group = 0; group < a.columns / kGroup; ++group, x += W * kGroup) {
        float columns[kGroup][kPanelRows];
        for (int half = 0; half < 2; ++half)
          each_column<Codec>(panel[group / Codec::kGroups], static_cast<int>(group % Codec::kGroups), half,
                             [&](int k, const F32& w) { store(columns[k] + 16 * half, w); });
        dense_tile<F32Dense, W>(reinterpret_cast<const F32Column*>(columns), kGroup, x, group > 0, out);
      }
    }
  }
};

template <class Codec, int W>
struct Dense {
  static void run(const LinearArgs& a) {
    for (int i = 0; i < a.tile_count; ++i)
      dense_tile<Codec, W>(
          static_cast<const typename Codec::Block*>(a.panel), a.columns,
          reinterpret_cast<const float*>(static_cast<const char*>(a.tiles) + i * a.tile_stride), false,
          a.out + int64_t{i} * W * kPanelRows);
  }
};

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

template <class Codec>
void gather(const void* panels, int64_t row, int64_t columns, float* out) {
  const int64_t groups = columns / kGroup;
  const auto* panel =
      static_cast<const typename Codec::Block*>(panels) + row / kPanelRows * (groups / Codec::kGroups);
  float lanes[16];
  for (int64_t group = 0; group < groups; ++group, out += kGroup)
    each_column<Codec>(panel[group / Codec::kGroups], static_cast<int>(group % Codec::kGroups),
                       row % kPanelRows / 16, [&](int k, const F32& w) {
                         store(lanes, w);
                         out[k] = lanes[row % 16];
                       });
}

template <class Codec>
void gather_dense(const void* panels, int64_t row, int64_t columns, float* out) {
  const auto* panel = static_cast<const typename Codec::Block*>(panels) + row / kPanelRows * columns;
  float lanes[16];
  for (int64_t k = 0; k < columns; ++k) {
    store(lanes, Codec::weight(panel[k], row % kPanelRows / 16));
    out[k] = lanes[row % 16];
  }
}

template <class Codec>
void fill_quantised(Kernels& table, Layout layout) {
  table.linear_quantised[static_cast<int>(layout)] = by_width<Quantised, Codec>;
  table.linear_dense[static_cast<int>(layout)] = by_width<Dequantised, Codec>;
  table.gather_row[static_cast<int>(layout)] = gather<Codec>;
}

template <class Codec>
void fill_dense(Kernels& table, Layout layout) {
  table.linear_dense[static_cast<int>(layout)] = by_width<Dense, Codec>;
  table.gather_row[static_cast<int>(layout)] = gather_dense<Codec>;
}

}  // namespace

void fill_linear(Kernels& table) {
  table.pair_sums = kPairSums;
  fill_quantised<W4>(table, Layout::kW4);
  fill_quantised<W4M>(table, Layout::kW4M);
  fill_quantised<W5>(table, Layout::kW5);
  fill_quantised<W5M>(table, Layout::kW5M);
  fill_quantised<W8>(table, Layout::kW8);
  fill_quantised<W2K>(table, Layout::kW2K);
  fill_quantised<W3K>(table, Layout::kW3K);
  fill_quantised<W4K>(table, Layout::kW4K);
  fill_quantised<W5K>(table, Layout::kW5K);
  fill_quantised<W6K>(table, Layout::kW6K);
  fill_dense<F16>(table, Layout::kF16);
  fill_dense<BF16>(table, Layout::kBF16);
  fill_dense<F32Dense>(table, Layout::kF32);
}

}  // namespace hexad::HEXAD_NAMESPACE
