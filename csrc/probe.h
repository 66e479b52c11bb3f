// What this machine can do, measured: the rates limits are computed from.
#pragma once

#include "kernels.h"

namespace hexad {

// Bytes per second all threads together read from memory (well past the last cache).
double probe_bandwidth(const Kernels& kernels, int threads);

// int8 multiply-adds per second all threads together reach in registers.
double probe_int8(const Kernels& kernels, int threads);

}  // namespace hexad
