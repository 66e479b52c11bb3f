#include "formats/pack.h"

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

// Byte j of a stored 4-bit block holds elements j and j + 16, which is a W4 quad's byte already.
void pack_q4_0(const uint8_t* block, int r, W4Group& group) {
  group.d[r] = half_at(block);
  for (int c = 0; c < 4; ++c) std::memcpy(group.quads[c][r], block + 2 + 4 * c, 4);
}

void pack_q4_1(const uint8_t* block, int r, W4MGroup& group) {
  group.d[r] = half_at(block);
  group.m[r] = half_at(block + 2);
  for (int c = 0; c < 4; ++c) std::memcpy(group.quads[c][r], block + 4 + 4 * c, 4);
}

void pack_q8_0(const uint8_t* block, int r, W8Group& group) {
  group.d[r] = half_at(block);
  for (int c = 0; c < 8; ++c) {
    uint32_t quad;
    std::memcpy(&quad, block + 2 + 4 * c, 4);
    quad ^= 0x80808080u;  // + 128
    std::memcpy(group.quads[c][r], &quad, 4);
  }
}

void pack_f16(const uint8_t* element, int r, F16Column& column) { column.w[r] = half_at(element); }
void pack_f32(const uint8_t* element, int r, F32Column& column) { std::memcpy(&column.w[r], element, 4); }

template <class Group>
void pack_rows(void (*pack)(const uint8_t*, int, Group&), int64_t block_bytes, int64_t blocks,
               const uint8_t* rows, int64_t row_count, void* panel) {
  auto* groups = static_cast<Group*>(panel);
  if (row_count < kPanelRows) std::memset(panel, 0, sizeof(Group) * static_cast<size_t>(blocks));
  // Sixteen blocks of each row at a time: whole cache lines of the source, a few kilobytes of the panel.
  constexpr int64_t kRun = 16;
  for (int64_t first = 0; first < blocks; first += kRun) {
    const int64_t end = first + kRun < blocks ? first + kRun : blocks;
    for (int r = 0; r < row_count; ++r)
      for (int64_t b = first; b < end; ++b) pack(rows + (r * blocks + b) * block_bytes, r, groups[b]);
  }
}

}  // namespace

Stored stored_of(const std::string& name) {
  if (name == "Q4_0") return Stored::kQ4_0;
  if (name == "Q4_1") return Stored::kQ4_1;
  if (name == "Q8_0") return Stored::kQ8_0;
  if (name == "F16") return Stored::kF16;
  if (name == "F32") return Stored::kF32;
  throw std::invalid_argument("the native core cannot pack the stored type '" + name + "'");
}

Layout packed_layout(Stored stored) {
  switch (stored) {
    case Stored::kQ4_0:
      return Layout::kW4;
    case Stored::kQ4_1:
      return Layout::kW4M;
    case Stored::kQ8_0:
      return Layout::kW8;
    case Stored::kF16:
      return Layout::kF16;
    default:
      return Layout::kF32;
  }
}

int64_t group_columns(Layout layout) { return layout == Layout::kF16 || layout == Layout::kF32 ? 1 : kGroup; }

int64_t group_bytes(Layout layout) {
  switch (layout) {
    case Layout::kW4:
      return sizeof(W4Group);
    case Layout::kW4M:
      return sizeof(W4MGroup);
    case Layout::kW8:
      return sizeof(W8Group);
    case Layout::kF16:
      return sizeof(F16Column);
    default:
      return sizeof(F32Column);
  }
}

int64_t stored_row_bytes(Stored stored, int64_t columns) {
  switch (stored) {
    case Stored::kQ4_0:
      return columns / 32 * 18;
    case Stored::kQ4_1:
      return columns / 32 * 20;
    case Stored::kQ8_0:
      return columns / 32 * 34;
    case Stored::kF16:
      return columns * 2;
    default:
      return columns * 4;
  }
}

void pack_panel(Stored stored, const uint8_t* rows, int64_t row_count, int64_t columns, void* panel) {
  switch (stored) {
    case Stored::kQ4_0:
      return pack_rows(pack_q4_0, 18, columns / 32, rows, row_count, panel);
    case Stored::kQ4_1:
      return pack_rows(pack_q4_1, 20, columns / 32, rows, row_count, panel);
    case Stored::kQ8_0:
      return pack_rows(pack_q8_0, 34, columns / 32, rows, row_count, panel);
    case Stored::kF16:
      return pack_rows(pack_f16, 2, columns, rows, row_count, panel);
    case Stored::kF32:
      return pack_rows(pack_f32, 4, columns, rows, row_count, panel);
  }
}

}  // namespace hexad
