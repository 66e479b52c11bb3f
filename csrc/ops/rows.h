// Row ops: what happens to one row of activations between the matrix products. x and out may be the same.
//
// norm           out = x / √(mean(x²) + eps) · weight; the sum of squares in 16 lanes, then a fixed tree.
// quantise       writes q and d of x [n] into slot `slot` of a quantised activation tile (ops/linear.h): per group of
//                32, d = max|x| / 127 (0 if below 1e-36; NaN if the group holds a NaN or an infinity), q = x / d
//                rounded to nearest even. n is a multiple of 32. Sets bit `slot` of outliers[group] where the
//                group is an outlier of its row.
// quantise_rest  the same for x − d · q of one group (x [32], its quantised `group`), into slot `slot` of `rest`.
// total          writes the sums s, n, h and p of `groups` groups of a tile, from their q and d.
// interleave     writes x [n] into slot `slot` of a dense activation tile.
// rotate         half-split RoPE in place: (a, b) = (head[i], head[i + half]) → (a·cos − b·sin, b·cos + a·sin).
// gated_silu     out = gate / (1 + e^−gate) · up.
// add            out = a + b, of n numbers in each of some rows; strides in floats.
// read           walks bytes (a multiple of 256) once and returns something that depends on all of them.
// dot_rate       `iterations` rounds of independent dot products in registers; returns the multiply-adds done.
#pragma once

#include "kernels.h"
