// Which kernel tables this machine can run, read once.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hexad {

// Names of the ISAs this build has and this machine (CPU and operating system) supports, best first.
const std::vector<std::string>& supported_isas();

// The table for `isa`; the empty string takes the best one, or what HEXAD_ISA names.
// Throws std::invalid_argument listing what is supported.
const Kernels& kernels_for(const std::string& isa);

}  // namespace hexad
