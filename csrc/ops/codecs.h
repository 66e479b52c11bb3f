// Codecs: how the linear loops read the packed layouts of formats/panels.h; compiled once per ISA.
//
// A panel is an array of blocks of kGroups groups; a group is 32 columns (kGroup) of 32 rows, read 16 rows (a
// `half`) at a time. Of a quantised layout:
//   kGroups, kParts  groups per block; scales per group, each for 32 / kParts adjacent columns
//   kBits            of a code, which is stored unsigned
//   kZero            what to subtract from a code: 0 or a power of two ≥ 4
//   kHasMinimum      whether minimum() adds something
//   kFactors         whether parts have integer factors: scale and minimum are what they share
//   head             what all groups of a block have in common: read once
//   scale, minimum   of one part of group g of the block; with factors a part's own is a product with
//   scale_factor, minimum_factor
//   order(i)         the i-th quad to be read of a group, parts in turn: loads are shared by neighbours
//   kPacked          whether it comes from memory, a block after the other
//   quad(b, g, c, h) columns 4c … 4c + 3 of group g: a code per byte
// Of a dense one: weight(b, h), one column per block.
#pragma once

#include "formats/panels.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

// How a group's codes lie in planes (formats/panels.h). code(group, c, half) is quad c.
struct FourBits {
  static constexpr int kBits = 4;
  static constexpr int order(int i) { return i % 2 * 4 + i / 2; }
  template <class Group>
  static Quads code(const Group& group, int c, int half) {
    const Quads both = load_quads(group.quads[c % 4][16 * half]);
    return c < 4 ? low_nibbles(both) : high_nibbles(both);
  }
};

struct FiveBits {
  static constexpr int kBits = 5;
  static constexpr int order(int i) { return FourBits::order(i); }
  template <class Group>
  static Quads code(const Group& group, int c, int half) {
    return with_bits(FourBits::code(group, c, half), load_quads(group.high[16 * half]), c - 4, 0x10);
  }
};

struct EightBits {
  static constexpr int kBits = 8;
  static constexpr int order(int i) { return i; }
  template <class Group>
  static Quads code(const Group& group, int c, int half) {
    return load_quads(group.quads[c][16 * half]);
  }
};

// The rest belong to layouts with a scale for each half of a group: quads 0 … 3 and 4 … 7 share no vector of low
// bits.
struct TwoBits {
  static constexpr int kBits = 2;
  static constexpr int order(int i) { return i; }
  template <class Group>
  static Quads code(const Group& group, int c, int half) {
    return bits(load_quads(group.low[c / 4][16 * half]), c % 4 * 2, 3);
  }
};

struct ThreeBits {
  static constexpr int kBits = 3;
  static constexpr int order(int i) { return i; }
  template <class Group>
  static Quads code(const Group& group, int c, int half) {
    return with_bits(TwoBits::code(group, c, half), load_quads(group.high[16 * half]), c - 2, 4);
  }
};

struct SixBits {
  static constexpr int kBits = 6;
  static constexpr int order(int i) { return i; }
  template <class Group>
  static Quads code(const Group& group, int c, int half) {
    const auto& part = group.parts[c / 4];
    const Quads both = load_quads(part.quads[c % 4 / 2][16 * half]);
    return with_bits(c % 2 == 0 ? low_nibbles(both) : high_nibbles(both), load_quads(part.high[16 * half]),
                     c % 4 * 2 - 4, 0x30);
  }
};

// What a block's groups have in common; nothing where a block is one group, whose scales are read when needed.
struct Head {
  F32 d, m;
};
struct NoHead {};

// An fp16 scale, and perhaps minimum, for each group.
template <class Packed, class Codes, int kZeroPoint, bool kMinimum>
struct HalfScales {
  using Block = Packed;
  static constexpr int kGroups = 1, kParts = 1, kBits = Codes::kBits, kZero = kZeroPoint;
  static constexpr bool kPacked = true;
  static constexpr bool kHasMinimum = kMinimum, kFactors = false;
  static NoHead head(const Block&, int) { return {}; }
  static F32 scale(NoHead, const Block& b, int, int, int half) { return load_f16(b.d + 16 * half); }
  static F32 minimum(NoHead, const Block& b, int, int, int half) {
    if constexpr (kMinimum)
      return load_f16(b.m + 16 * half);
    else
      return splat(0);
  }
  static constexpr int order(int i) { return Codes::order(i); }
  static Quads quad(const Block& b, int, int c, int half) { return Codes::code(b, c, half); }
};

using W4 = HalfScales<W4Group, FourBits, 8, false>;
using W4M = HalfScales<W4MGroup, FourBits, 0, true>;
using W5 = HalfScales<W5Group, FiveBits, 16, false>;
using W5M = HalfScales<W5MGroup, FiveBits, 0, true>;
using W8 = HalfScales<W8Group, EightBits, 128, false>;

// The K-quants: products of an fp16 and an integer of at most 8 bits, which float32 holds exactly.
template <class Packed, class Codes, bool kMinimum>
struct SuperBlock {
  using Block = Packed;
  static constexpr int kGroups = kSuperGroups, kBits = Codes::kBits;
  static constexpr bool kPacked = true, kHasMinimum = kMinimum;
  static Head head(const Block& b, int half) {
    if constexpr (kMinimum)
      return {load_f16(b.d + 16 * half), load_f16(b.m + 16 * half)};
    else
      return {load_f16(b.d + 16 * half), splat(0)};
  }
  static constexpr int order(int i) { return Codes::order(i); }
  static Quads quad(const Block& b, int g, int c, int half) { return Codes::code(b.groups[g], c, half); }
};

template <class Packed, class Codes>
struct ByteScales : SuperBlock<Packed, Codes, true> {
  static constexpr int kParts = 1, kZero = 0;
  static constexpr bool kFactors = false;
  static F32 scale(const Head& head, const Packed& b, int g, int, int half) {
    return mul(head.d, to_float(load_bytes(b.groups[g].scale + 16 * half)));
  }
  static F32 minimum(const Head& head, const Packed& b, int g, int, int half) {
    return mul(head.m, to_float(load_bytes(b.groups[g].minimum + 16 * half)));
  }
};

template <class Packed, class Codes, int kZeroPoint>
struct SignedScales : SuperBlock<Packed, Codes, false> {
  static constexpr int kParts = 2, kZero = kZeroPoint;
  static constexpr bool kFactors = false;
  static F32 scale(const Head& head, const Packed& b, int g, int part, int half) {
    return mul(head.d, to_float(load_bytes(b.groups[g].scales[part] + 16 * half)));
  }
  static F32 minimum(const Head& head, const Packed&, int, int, int) { return head.m; }
};

struct W2K : SuperBlock<W2KBlock, TwoBits, true> {
  static constexpr int kParts = 2, kZero = 0;
  static constexpr bool kFactors = true;
  static F32 scale(const Head& head, const Block&, int, int, int) { return head.d; }
  static F32 minimum(const Head& head, const Block&, int, int, int) { return head.m; }
  static I32 scale_factor(const Block& b, int g, int part, int half) {
    return load_nibbles(b.groups[g].scales[part] + 16 * half, 0);
  }
  static I32 minimum_factor(const Block& b, int g, int part, int half) {
    return load_nibbles(b.groups[g].scales[part] + 16 * half, 4);
  }
  // As sums take them: a part's scale, and the minimums of both as pairs of int16.
  static Part factor(const Block& b, int g, int part, int half) {
    return as_part(scale_factor(b, g, part, half));
  }
  static I32 minimum_factors(const Block& b, int g, int half) {
    return add(minimum_factor(b, g, 0, half), shift_left(minimum_factor(b, g, 1, half), 16));
  }
};

using W3K = SignedScales<W3KBlock, ThreeBits, 4>;
using W4K = ByteScales<W4KBlock, FourBits>;
using W5K = ByteScales<W5KBlock, FiveBits>;
using W6K = SignedScales<W6KBlock, SixBits, 32>;

struct F16 {
  using Block = F16Column;
  static F32 weight(const Block& b, int half) { return load_f16(b.w + 16 * half); }
};

struct BF16 {
  using Block = BF16Column;
  static F32 weight(const Block& b, int half) { return load_bf16(b.w + 16 * half); }
};

struct F32Dense {
  using Block = F32Column;
  static F32 weight(const Block& b, int half) { return load(b.w + 16 * half); }
};

// The zero point that dots of a codec's codes leave in their sum.
template <class Codec>
constexpr int kZeroOf = Codec::kBits == 8 ? kByteZero : Codec::kZero;
template <class Codec>
using DotsOf = Dots<Codec::kBits, 8 / Codec::kParts, kZeroOf<Codec>>;

// A strip of a panel unpacked to bytes and float scales, for many tiles to share: the same numbers, ready to use.
// What a codec has none of takes no room.
template <class Packed>
struct StripGroup {
  static constexpr int kScales = Packed::kFactors ? 1 : Packed::kParts, kFactors = Packed::kFactors ? 2 : 0;
  typename DotsOf<Packed>::Weights quads[8][2];  // of both halves
  float d[kScales][kPanelRows];
  float m[Packed::kHasMinimum ? 1 : 0][kPanelRows];
  Part factors[kFactors][2];
  I32 minimum_factors[kFactors];  // of both halves
};

template <class Packed>
struct Strip {
  static constexpr int kGroups = 1, kParts = Packed::kParts, kBits = Packed::kBits, kZero = Packed::kZero;
  static constexpr bool kPacked = false;
  static constexpr bool kHasMinimum = Packed::kHasMinimum, kFactors = Packed::kFactors;
  using Block = StripGroup<Packed>;
  static NoHead head(const Block&, int) { return {}; }
  static F32 scale(NoHead, const Block& b, int, int part, int half) {
    return load(b.d[kFactors ? 0 : part] + 16 * half);
  }
  static F32 minimum(NoHead, const Block& b, int, int, int half) { return load(b.m[0] + 16 * half); }
  static const Part& factor(const Block& b, int, int part, int half) { return b.factors[part][half]; }
  static const I32& minimum_factors(const Block& b, int, int half) { return b.minimum_factors[half]; }
  static constexpr int order(int i) { return i; }
  static auto quad(const Block& b, int, int c, int half) { return b.quads[c][half]; }

  // Unpacks `groups` groups of a panel from group `first` on.
  static void unpack(const typename Packed::Block* panel, int64_t first, int64_t groups, Block* to) {
    for (int64_t i = 0; i < groups; ++i, ++to) {
      const typename Packed::Block& from = panel[(first + i) / Packed::kGroups];
      const int g = static_cast<int>((first + i) % Packed::kGroups);
      for (int half = 0; half < 2; ++half) {
        const auto head = Packed::head(from, half);
        HEXAD_UNROLL
        for (int part = 0; part < Block::kScales; ++part)
          store(to->d[part] + 16 * half, Packed::scale(head, from, g, part, half));
        if constexpr (kHasMinimum) store(to->m[0] + 16 * half, Packed::minimum(head, from, g, 0, half));
        if constexpr (kFactors) {
          for (int part = 0; part < kParts; ++part)
            to->factors[part][half] = Packed::factor(from, g, part, half);
          to->minimum_factors[half] = Packed::minimum_factors(from, g, half);
        }
        HEXAD_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int c = Packed::order(i);
          to->quads[c][half] = Packed::quad(from, g, c, half);
        }
      }
    }
  }
};

}  // namespace
}  // namespace hexad::HEXAD_NAMESPACE
