// Arrays of strings as GGUF has them: each a 64-bit length and that many bytes of UTF-8. A vocabulary has hundreds of
// thousands, too many for a loop of Python's. The bytes are not to be trusted.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace hexad {

// Where `count` strings from `start` on end; −1 where they run past the end of the buffer.
int64_t end_of_strings(nanobind::handle buffer, int64_t start, int64_t count);

// These strings, or the first of them, up to one that is not UTF-8 or runs past the end.
nanobind::list strings(nanobind::handle buffer, int64_t start, int64_t count);

}  // namespace hexad
