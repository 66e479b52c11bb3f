// Linear: out[row][r] = Σ_k weight[r][k] · x[row][k] for one panel of 32 weight rows and a run of tiles.
//
// Activations come in tiles of `width` (1 … kMaxTile) batch rows, interleaved so that one pointer walks K:
//   quantised: per group of 32 columns
//       int8  q[8][width][4]   quads of columns: q[c][slot] holds columns 4c … 4c+3
//       float d[width]         scale
//       float s[width]         d · Σq
//       int32 n[width]         −8 · Σq
//   dense: float x[k][width]
// Slots past the batch's last row are zero; their results are not to be read.
//
// Arithmetic, which no tile width, panel or thread count changes (the exactness promise):
//   quantised: per group i = Σ q_w · q_x as an exact int32 (with the zero point of the layout subtracted),
//       f ← fma(float(i), d_w · d, f), and for layouts with a minimum f ← fma(m_w, s, f); groups in K order.
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

// Columns that are unpacked at a time when many tiles share a panel: keeps the unpacked strip within half of
// L1.
constexpr int kStripColumns = 512;
constexpr size_t kStripBytes =
    kStripColumns / kGroup * (2 * kPanelRows * sizeof(float) + kGroup * kPanelRows);

// Bytes of one (tile, group) of quantised activations.
constexpr int64_t activation_group_bytes(int width) {
  return int64_t{width} * (kGroup + 12);
}

}  // namespace hexad
