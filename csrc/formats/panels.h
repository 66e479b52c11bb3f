// The packed layouts: a matrix [rows, columns] as panels of 32 rows; within a panel, blocks in K order.
//
// A 4-byte quad is four consecutive columns of one row; 32 quads, one per row, are two 64-byte vectors, so
// that a vector load is an operand of a u8·s8 dot product without any shuffle. Quantised weights are stored
// unsigned. In a group of 32 columns, quad c holds columns 4c … 4c + 3, one per byte; codes that are no bytes lie
// in planes, whose vectors hold some bits of several quads:
//   nibbles   quads[v]: quads v (low) and v + 4 (high)
//   pairs     low[v]: quads 4v … 4v + 3, two bits each, from the lowest up
//   bits      high: one bit of each quad, quad c in bit c
// Where scales belong to 16 columns, quads[v] is 2v (low) and 2v + 1 (high): a vector belongs to one scale.
//
// A group's scales and high bits lie before its other codes, in the group itself: a walk over a panel goes in one
// direction, which hardware prefetchers can follow.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hexad {

constexpr int kSuperGroups = 8;  // groups of a K-quant's block of 256 columns

using QuadRows = uint8_t[kPanelRows][4];

// w = d · (q − 8), 4.5 bits per weight.
struct W4Group {
  uint16_t d[kPanelRows];
  QuadRows quads[4];
};

// w = d · q + m, 5 bits per weight.
struct W4MGroup {
  uint16_t d[kPanelRows];
  uint16_t m[kPanelRows];
  QuadRows quads[4];
};

// w = d · (q − 16), 5.5 bits per weight: a nibble, and the fifth bit in `high`.
struct W5Group {
  uint16_t d[kPanelRows];
  QuadRows high;
  QuadRows quads[4];
};

// w = d · q + m, 6 bits per weight.
struct W5MGroup {
  uint16_t d[kPanelRows];
  uint16_t m[kPanelRows];
  QuadRows high;
  QuadRows quads[4];
};

// w = d · (q − 128), 8.5 bits per weight. quads[c] is quad c.
struct W8Group {
  uint16_t d[kPanelRows];
  QuadRows quads[8];
};

// The K-quants. `m` is the file's dmin with its sign turned, so that minimums are added as everywhere.

// w = d · (sc & 15) · q + m · (sc >> 4), 2.625 bits per weight; a scale and minimum for 16 columns.
struct W2KBlock {
  uint16_t d[kPanelRows];
  uint16_t m[kPanelRows];
  struct {
    uint8_t scales[2][kPanelRows];
    QuadRows low[2];
  } groups[kSuperGroups];
};

// w = d · sc · (q − 4), 3.5625 bits per weight: two bits, and the third in `high`; a scale for 16 columns.
struct W3KBlock {
  uint16_t d[kPanelRows];
  struct {
    int8_t scales[2][kPanelRows];
    QuadRows high;
    QuadRows low[2];
  } groups[kSuperGroups];
};

// w = d · sc · q + m · mn, 4.625 bits per weight.
struct W4KBlock {
  uint16_t d[kPanelRows];
  uint16_t m[kPanelRows];
  struct {
    uint8_t scale[kPanelRows];
    uint8_t minimum[kPanelRows];
    QuadRows quads[4];
  } groups[kSuperGroups];
};

// As W4KBlock with a fifth bit in `high`, 5.625 bits per weight.
struct W5KBlock {
  uint16_t d[kPanelRows];
  uint16_t m[kPanelRows];
  struct {
    uint8_t scale[kPanelRows];
    uint8_t minimum[kPanelRows];
    QuadRows high;
    QuadRows quads[4];
  } groups[kSuperGroups];
};

// w = d · sc · (q − 32), 6.5625 bits per weight: a nibble, and bits 4 and 5 as pairs in `high`; a scale for 16
// columns.
struct W6KBlock {
  uint16_t d[kPanelRows];
  struct {
    int8_t scales[2][kPanelRows];
    struct {
      QuadRows high;
      QuadRows quads[2];
    } parts[2];
  } groups[kSuperGroups];
};

// Dense: one column of 32 rows.
struct F16Column {
  uint16_t w[kPanelRows];
};

struct BF16Column {
  uint16_t w[kPanelRows];
};

struct F32Column {
  float w[kPanelRows];
};

}  // namespace hexad
