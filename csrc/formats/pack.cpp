#include "formats/pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "formats/panels.h"

namespace hexad {
namespace {

uint16_t half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}

uint32_t quad_at(const uint8_t* p) {
  uint32_t quad;
  std::memcpy(&quad, p, 4);
  return quad;
}

void put(uint32_t quad, int r, QuadRows& to) { std::memcpy(to[r], &quad, 4); }

// The codes of a group, a quad each; and how they go into the planes of panels.h.
struct Codes {
  uint32_t quads[8];

  // The bits of `mask`, from bit `from` on, of 32 bytes.
  static Codes of(const uint8_t* bytes, int from, uint32_t mask) {
    Codes codes;
    for (int c = 0; c < 8; ++c) codes.quads[c] = quad_at(bytes + 4 * c) >> from & 0x01010101u * mask;
    return codes;
  }
  void put_nibbles(int r, QuadRows (&to)[4]) const {
    for (int v = 0; v < 4; ++v) put(quads[v] | quads[v + 4] << 4, r, to[v]);
  }
  template <class Part>
  void put_adjacent_nibbles(int r, Part (&to)[2]) const {
    for (int v = 0; v < 4; ++v) put(quads[2 * v] | quads[2 * v + 1] << 4, r, to[v / 2].quads[v % 2]);
  }
  void put_pairs(int r, QuadRows& first, QuadRows& second) const {
    put(quads[0] | quads[1] << 2 | quads[2] << 4 | quads[3] << 6, r, first);
    put(quads[4] | quads[5] << 2 | quads[6] << 4 | quads[7] << 6, r, second);
  }
  void put_bits(int r, QuadRows& to) const {
    uint32_t all = 0;
    for (int c = 0; c < 8; ++c) all |= quads[c] << c;
    put(all, r, to);
  }
};

// Byte j of a stored 4-bit block holds elements j and j + 16, which is a byte of the nibbles' plane already.
void copy_nibbles(const uint8_t* bytes, int r, QuadRows (&to)[4]) {
  for (int v = 0; v < 4; ++v) put(quad_at(bytes + 4 * v), r, to[v]);
}

// Bit 4c + b of 32 becomes bit c of byte b.
uint32_t regroup_bits(uint32_t x) {
  uint32_t all = 0;
  for (int b = 0; b < 4; ++b) {
    uint32_t byte = x >> b & 0x11111111u;
    byte = (byte | byte >> 3) & 0x03030303u;
    byte = (byte | byte >> 6) & 0x000F000Fu;
    byte = (byte | byte >> 12) & 0xFFu;
    all |= byte << (8 * b);
  }
  return all;
}

void pack_q4_0(const uint8_t* block, int r, W4Group& group) {
  group.d[r] = half_at(block);
  copy_nibbles(block + 2, r, group.quads);
}

void pack_q4_1(const uint8_t* block, int r, W4MGroup& group) {
  group.d[r] = half_at(block);
  group.m[r] = half_at(block + 2);
  copy_nibbles(block + 4, r, group.quads);
}

void pack_q5_0(const uint8_t* block, int r, W5Group& group) {
  group.d[r] = half_at(block);
  put(regroup_bits(quad_at(block + 2)), r, group.high);
  copy_nibbles(block + 6, r, group.quads);
}

void pack_q5_1(const uint8_t* block, int r, W5MGroup& group) {
  group.d[r] = half_at(block);
  group.m[r] = half_at(block + 2);
  put(regroup_bits(quad_at(block + 4)), r, group.high);
  copy_nibbles(block + 8, r, group.quads);
}

void pack_q8_0(const uint8_t* block, int r, W8Group& group) {
  group.d[r] = half_at(block);
  for (int c = 0; c < 8; ++c) put(quad_at(block + 2 + 4 * c) ^ 0x80808080u, r, group.quads[c]);  // + 128
}

// d and −dmin.
template <class Block>
void put_halves(const uint8_t* p, int r, Block& to) {
  to.d[r] = half_at(p);
  to.m[r] = half_at(p + 2) ^ 0x8000u;
}

void pack_q2_k(const uint8_t* block, int r, W2KBlock& to) {
  put_halves(block + 80, r, to);
  for (int i = 0; i < 16; ++i) to.groups[i / 2].scales[i % 2][r] = block[i];
  for (int g = 0; g < kSuperGroups; ++g)
    Codes::of(block + 16 + g / 4 * 32, g % 4 * 2, 3).put_pairs(r, to.groups[g].low[0], to.groups[g].low[1]);
}

void pack_q3_k(const uint8_t* block, int r, W3KBlock& to) {
  to.d[r] = half_at(block + 108);
  const uint8_t* low = block + 96;
  for (int i = 0; i < 16; ++i) {
    const int scale = (low[i % 8] >> i / 8 * 4 & 15) | (low[8 + i % 4] >> i / 4 * 2 & 3) << 4;
    to.groups[i / 2].scales[i % 2][r] = static_cast<int8_t>(scale - 32);
  }
  for (int g = 0; g < kSuperGroups; ++g) {
    Codes::of(block + 32 + g / 4 * 32, g % 4 * 2, 3).put_pairs(r, to.groups[g].low[0], to.groups[g].low[1]);
    Codes::of(block, g, 1).put_bits(r, to.groups[g].high);
  }
}

// Eight 6-bit scales and minimums from 12 bytes: the first four are the low bits of bytes 0–3 and 4–7, the others have
// their low nibbles in bytes 8–11 and their high bits above the first four.
template <class Block>
void put_six_bit_scales(const uint8_t* p, int r, Block& to) {
  for (int i = 0; i < 4; ++i) {
    auto &first = to.groups[i], &second = to.groups[i + 4];
    first.scale[r] = p[i] & 63;
    first.minimum[r] = p[i + 4] & 63;
    second.scale[r] = static_cast<uint8_t>((p[i + 8] & 15) | p[i] >> 6 << 4);
    second.minimum[r] = static_cast<uint8_t>(p[i + 8] >> 4 | p[i + 4] >> 6 << 4);
  }
}

void pack_q4_k(const uint8_t* block, int r, W4KBlock& to) {
  put_halves(block, r, to);
  put_six_bit_scales(block + 4, r, to);
  for (int g = 0; g < kSuperGroups; ++g)
    Codes::of(block + 16 + g / 2 * 32, g % 2 * 4, 15).put_nibbles(r, to.groups[g].quads);
}

void pack_q5_k(const uint8_t* block, int r, W5KBlock& to) {
  put_halves(block, r, to);
  put_six_bit_scales(block + 4, r, to);
  for (int g = 0; g < kSuperGroups; ++g) {
    Codes::of(block + 48 + g / 2 * 32, g % 2 * 4, 15).put_nibbles(r, to.groups[g].quads);
    Codes::of(block + 16, g, 1).put_bits(r, to.groups[g].high);
  }
}

void pack_q6_k(const uint8_t* block, int r, W6KBlock& to) {
  to.d[r] = half_at(block + 208);
  for (int i = 0; i < 16; ++i) to.groups[i / 2].scales[i % 2][r] = static_cast<int8_t>(block[192 + i]);
  for (int g = 0; g < kSuperGroups; ++g) {
    const int half = g / 4, run = g % 4;  // of 128 columns; of 32
    auto& parts = to.groups[g].parts;
    Codes::of(block + 64 * half + run % 2 * 32, run / 2 * 4, 15).put_adjacent_nibbles(r, parts);
    Codes::of(block + 128 + 32 * half, run * 2, 3).put_pairs(r, parts[0].high, parts[1].high);
  }
}

template <class Column>
void pack_element(const uint8_t* element, int r, Column& column) {
  std::memcpy(&column.w[r], element, sizeof(column.w[r]));
}

template <class Packed, void (*kPack)(const uint8_t*, int, Packed&)>
void pack_rows(const uint8_t* rows, int64_t row_count, int64_t blocks, int64_t block_bytes, void* panel) {
  auto* packed = static_cast<Packed*>(panel);
  if (row_count < kPanelRows) std::memset(panel, 0, sizeof(Packed) * static_cast<size_t>(blocks));
  // Some cache lines of each row at a time: several kilobytes of the panel.
  const int64_t run = std::max<int64_t>(1, 288 / block_bytes);
  for (int64_t first = 0; first < blocks; first += run) {
    const int64_t end = std::min(first + run, blocks);
    for (int r = 0; r < row_count; ++r)
      for (int64_t b = first; b < end; ++b) kPack(rows + (r * blocks + b) * block_bytes, r, packed[b]);
  }
}

template <class Packed, void (*kPack)(const uint8_t*, int, Packed&)>
constexpr Stored stored(const char* name, int64_t block_columns, int64_t block_bytes, Layout layout,
                        const char* layout_name) {
  return {name, layout, layout_name, block_columns, block_bytes, sizeof(Packed), pack_rows<Packed, kPack>};
}

constexpr Stored kStored[] = {
    stored<W4Group, pack_q4_0>("Q4_0", 32, 18, Layout::kW4, "w4"),
    stored<W4MGroup, pack_q4_1>("Q4_1", 32, 20, Layout::kW4M, "w4m"),
    stored<W5Group, pack_q5_0>("Q5_0", 32, 22, Layout::kW5, "w5"),
    stored<W5MGroup, pack_q5_1>("Q5_1", 32, 24, Layout::kW5M, "w5m"),
    stored<W8Group, pack_q8_0>("Q8_0", 32, 34, Layout::kW8, "w8"),
    stored<W2KBlock, pack_q2_k>("Q2_K", 256, 84, Layout::kW2K, "w2k"),
    stored<W3KBlock, pack_q3_k>("Q3_K", 256, 110, Layout::kW3K, "w3k"),
    stored<W4KBlock, pack_q4_k>("Q4_K", 256, 144, Layout::kW4K, "w4k"),
    stored<W5KBlock, pack_q5_k>("Q5_K", 256, 176, Layout::kW5K, "w5k"),
    stored<W6KBlock, pack_q6_k>("Q6_K", 256, 210, Layout::kW6K, "w6k"),
    stored<F16Column, pack_element<F16Column>>("F16", 1, 2, Layout::kF16, "f16"),
    stored<BF16Column, pack_element<BF16Column>>("BF16", 1, 2, Layout::kBF16, "bf16"),
    stored<F32Column, pack_element<F32Column>>("F32", 1, 4, Layout::kF32, "f32"),
};

}  // namespace

const Stored& stored_of(const std::string& name) {
  for (const Stored& stored : kStored)
    if (name == stored.name) return stored;
  throw std::invalid_argument("the native core cannot pack the stored type '" + name + "'");
}

}  // namespace hexad
