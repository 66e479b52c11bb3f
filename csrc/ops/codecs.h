// Codecs: how the linear loops read the packed layouts of formats/panels.h; compiled once per ISA.
//
// A panel is an array of blocks of kGroups groups; a group is 32 columns (kGroup) of 32 rows, read 16 rows (a
// `half`) at a time. Of a quantised layout:
//   kGroups, kParts  groups per block; scales per group, each for 32 / kParts adjacent columns
//   kBits            of a code, which is stored unsigned
//   kZero            what to subtract from a code: 0 or a power of two ≥ 4
//   kHasMinimum      whether minimum() adds something
//   scale, minimum   of one part of group g of the block
//   order(i)         the i-th quad to be read of a group, parts in turn: loads are shared by neighbours
//   quad(b, g, c, h) columns 4c … 4c + 3 of group g: a code per byte
// Of a dense one: weight(b, h), one column per block.
#pragma once

#include "formats/panels.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

// Nibbles of columns 4c … in the low half of quads[c], of columns 16 + 4c … in the high half.
template <class Packed>
struct Nibbles {
  using Block = Packed;
  static constexpr int kGroups = 1, kParts = 1, kBits = 4;
  static F32 scale(const Block& b, int, int, int half) { return load_f16(b.d + 16 * half); }
  static constexpr int order(int i) { return i % 2 * 4 + i / 2; }
  static Quads quad(const Block& b, int, int c, int half) {
    const Quads both = load_quads(b.quads[c % 4][16 * half]);
    return c < 4 ? low_nibbles(both) : high_nibbles(both);
  }
};

struct W4 : Nibbles<W4Group> {
  static constexpr int kZero = 8;
  static constexpr bool kHasMinimum = false;
  static F32 minimum(const Block&, int, int, int) { return splat(0); }
};

struct W4M : Nibbles<W4MGroup> {
  static constexpr int kZero = 0;
  static constexpr bool kHasMinimum = true;
  static F32 minimum(const Block& b, int, int, int half) { return load_f16(b.m + 16 * half); }
};

struct W8 {
  using Block = W8Group;
  static constexpr int kGroups = 1, kParts = 1, kBits = 8, kZero = 128;
  static constexpr bool kHasMinimum = false;
  static F32 scale(const Block& b, int, int, int half) { return load_f16(b.d + 16 * half); }
  static F32 minimum(const Block&, int, int, int) { return splat(0); }
  static constexpr int order(int i) { return i; }
  static Quads quad(const Block& b, int, int c, int half) { return load_quads(b.quads[c][16 * half]); }
};

struct F16 {
  using Block = F16Column;
  static F32 weight(const Block& b, int half) { return load_f16(b.w + 16 * half); }
};

struct F32Dense {
  using Block = F32Column;
  static F32 weight(const Block& b, int half) { return load(b.w + 16 * half); }
};

// A strip of a panel unpacked to bytes and float scales, for many tiles to share: the same numbers, ready to use.
template <int kParts>
struct StripGroup {
  float d[kParts][kPanelRows];
  float m[kParts][kPanelRows];
  uint8_t quads[8][kPanelRows][4];
};

template <class Packed>
struct Strip {
  static constexpr int kGroups = 1, kParts = Packed::kParts, kBits = Packed::kBits, kZero = Packed::kZero;
  static constexpr bool kHasMinimum = Packed::kHasMinimum;
  using Block = StripGroup<kParts>;
  static F32 scale(const Block& b, int, int part, int half) { return load(b.d[part] + 16 * half); }
  static F32 minimum(const Block& b, int, int part, int half) { return load(b.m[part] + 16 * half); }
  static constexpr int order(int i) { return i; }
  static Quads quad(const Block& b, int, int c, int half) { return load_quads(b.quads[c][16 * half]); }

  // Unpacks `groups` groups of a panel from group `first` on.
  static void unpack(const typename Packed::Block* panel, int64_t first, int64_t groups, Block* to) {
    for (int64_t i = 0; i < groups; ++i, ++to) {
      const typename Packed::Block& from = panel[(first + i) / Packed::kGroups];
      const int g = static_cast<int>((first + i) % Packed::kGroups);
      for (int half = 0; half < 2; ++half) {
        HEXAD_UNROLL
        for (int part = 0; part < kParts; ++part) {
          store(to->d[part] + 16 * half, Packed::scale(from, g, part, half));
          if (kHasMinimum) store(to->m[part] + 16 * half, Packed::minimum(from, g, part, half));
        }
        HEXAD_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int c = Packed::order(i);
          store_quads(to->quads[c][16 * half], Packed::quad(from, g, c, half));
        }
      }
    }
  }
};

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
