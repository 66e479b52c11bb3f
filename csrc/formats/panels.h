// The packed layouts: a matrix [rows, columns] as panels of 32 rows; within a panel, groups in K order.
//
// A 4-byte quad is four consecutive columns of one row; 32 quads, one per row, are two 64-byte vectors, so
// that a vector load is an operand of a u8·s8 dot product without any shuffle. Quantised weights are stored
// unsigned.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hexad {

// w = d · (q − 8), 4.5 bits per weight. Byte b of quads[c][r]: low nibble column 4c+b, high nibble column
// 16+4c+b.
struct W4Group {
  uint16_t d[kPanelRows];
  uint8_t quads[4][kPanelRows][4];
};
static_assert(sizeof(W4Group) == 576);

// w = d · q + m, 5 bits per weight. Nibbles as in W4Group.
struct W4MGroup {
  uint16_t d[kPanelRows];
  uint16_t m[kPanelRows];
  uint8_t quads[4][kPanelRows][4];
};
static_assert(sizeof(W4MGroup) == 640);

// w = d · (q − 128), 8.5 bits per weight. quads[c][r] holds columns 4c … 4c+3.
struct W8Group {
  uint16_t d[kPanelRows];
  uint8_t quads[8][kPanelRows][4];
};
static_assert(sizeof(W8Group) == 1088);

// Dense: one column of 32 rows.
struct F16Column {
  uint16_t w[kPanelRows];
};
static_assert(sizeof(F16Column) == 64);

struct F32Column {
  float w[kPanelRows];
};
static_assert(sizeof(F32Column) == 128);

}  // namespace hexad
