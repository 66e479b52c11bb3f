// Linear: out[row][r] = Σ_k weight[r][k] · x[row][k] for one panel of 32 weight rows and a run of tiles.
//
// Activations come in tiles of `width` (1 … kMaxTile) batch rows, interleaved so that one pointer walks K:
//   quantised: per group of 32 columns
//       int8  q[8][width][4]   quads of columns: q[c][slot] holds columns 4c … 4c+3
//       float d[width]         scale
//       float s[width]         d · Σq
//       int32 n[width]         −4 · Σq
//       int16 h[width][2]      −Σq over the first and over the last 16 columns
//       int16 p[2][width][2]   −4 · Σq over the first and over the last 16 columns, each over the first two columns
//                              of all quads and over the last two; only for kernels with pair_sums
//     After the K/32 groups: int32 count, int32 index[capacity], and `count` more groups of the same form, for the
//     groups in which some row is an outlier (below); index is ascending. Other rows' slots there are zero.
//   dense: float x[k][width]
// Slots past the batch's last row are zero; their results are not to be read.
//
// Arithmetic, which no tile width, panel or thread count changes (the exactness promise):
//   quantised: per group i = Σ q_w · q_x as an exact int32 (with the zero point of the layout subtracted),
//       f ← fma(float(i), d_w · d, f), and for layouts with a minimum f ← fma(m_w, s, f); groups in K order. Layouts
//       with a scale for each 16 columns do it once per 16. Where d_w and m_w are products of an fp16 and an integer
//       (K-quants), float32 holds them exactly. With both a scale and a minimum per 16 columns (factors; W2K), the
//       integers come first: f ← fma(fma(m, float(Σ m_16 · Σq), d_w · float(Σ d_16 · i_16)), d, f), sums over both.
//       A row's outlier groups, those with d² > 4 · mean(d²) over the row (the first (K/32 − 1) / 4 of them; by
//       rounding there could be one more), are then multiplied once more, in K order, with what rounding left of
//       their activations, quantised in turn. They are 3 to 7 % of a row's groups and carry most of the rounding error:
//       a handful of hidden features is much larger than the rest (Dettmers et al. 2022, arXiv:2208.07339). To a
//       row that is no outlier there, its slot of zeros adds exactly nothing.
//   dense: f ← fma(w, x, f) with w the layout's dequantised float; columns in K order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace hexad {

struct LinearArgs {
  const void* panel;    // 32 weight rows in the kernel's layout
  int64_t columns;      // K
  const void* tiles;    // activation tiles, contiguous
  int64_t tile_stride;  // bytes from one tile to the next
  int tile_count;
  int width;
  float* out;     // [tile_count · width][32], overwritten
  void* scratch;  // kStripBytes, 64-byte aligned; unused by kernels that need none
};

// Columns that the blocks of a tile go through together. As many with a float scale and minimum per 16 of them fill a
// strip, half of L1: unpacked when many tiles share a panel, it has more columns where scales are fewer.
constexpr int kStripColumns = 512;
constexpr size_t kStripBytes =
    kStripColumns / kGroup * (4 * kPanelRows * sizeof(float) + kGroup * kPanelRows);

// Bytes of one (tile, group) of quantised activations.
static constexpr int64_t activation_group_bytes(int64_t width, bool pair_sums) {
  return width * (kGroup + 16 + (pair_sums ? 8 : 0));
}

// A group is an outlier where d² exceeds this many times the row's mean, so fewer than one in as many can be.
constexpr int kOutlier = 4;

// Most outlier groups a tile can have.
static constexpr int64_t outlier_capacity(int64_t groups, int64_t width) {
  const int64_t most = width * ((groups - 1) / kOutlier);
  return most < groups ? most : groups;
}

// Where a quantised tile's outlier groups begin, and the bytes of a whole tile.
static constexpr int64_t outlier_offset(int64_t groups, int64_t width, bool pair_sums) {
  return groups * activation_group_bytes(width, pair_sums) + 4 * (1 + outlier_capacity(groups, width));
}
static constexpr int64_t quantised_tile_bytes(int64_t columns, int64_t width, bool pair_sums) {
  const int64_t groups = columns / kGroup;
  const int64_t end = outlier_offset(groups, width, pair_sums) +
                      outlier_capacity(groups, width) * activation_group_bytes(width, pair_sums);
  return (end + 63) / 64 * 64;
}

}  // namespace hexad
