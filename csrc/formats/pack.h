// Packing: stored blocks (GGUF's, little-endian) become the 32-row panels of panels.h.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace hexad {

// How a matrix is stored in the checkpoint.
enum class Stored : int { kQ4_0, kQ4_1, kQ8_0, kF16, kF32 };

// Throws std::invalid_argument for a name it does not know.
Stored stored_of(const std::string& name);

// The layout a stored type packs into.
Layout packed_layout(Stored stored);

int64_t group_columns(Layout layout);
int64_t group_bytes(Layout layout);
int64_t stored_row_bytes(Stored stored, int64_t columns);

// Packs up to 32 rows (fewer at the matrix's end; the rest become zeros) into one panel.
void pack_panel(Stored stored, const uint8_t* rows, int64_t row_count, int64_t columns, void* panel);

}  // namespace hexad
