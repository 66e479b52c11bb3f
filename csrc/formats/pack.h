// Packing: stored blocks (GGUF's, little-endian) become the 32-row panels of panels.h.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace hexad {

// How a matrix is stored in a checkpoint, and what it is packed into.
struct Stored {
  const char* name;  // GGUF's
  Layout layout;
  const char* layout_name;
  int64_t block_columns;  // a row is a whole number of blocks, stored and packed
  int64_t block_bytes;    // of one row, as stored
  int64_t packed_bytes;   // of 32 rows, packed
  void (*pack)(const uint8_t* rows, int64_t row_count, int64_t blocks, int64_t block_bytes, void* panel);

  int64_t row_bytes(int64_t columns) const { return columns / block_columns * block_bytes; }
  int64_t panel_bytes(int64_t columns) const { return columns / block_columns * packed_bytes; }
};

// Throws std::invalid_argument for a name it does not know.
const Stored& stored_of(const std::string& name);

// Packs up to 32 rows (fewer at the matrix's end; the rest become zeros) into one panel.
inline void pack_panel(const Stored& stored, const uint8_t* rows, int64_t row_count, int64_t columns,
                       void* panel) {
  stored.pack(rows, row_count, columns / stored.block_columns, stored.block_bytes, panel);
}

}  // namespace hexad
