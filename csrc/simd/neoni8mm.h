// The vocabulary of simd/neon.h, compiled with the int8 matrix extension: its usdot takes weight bytes unsigned.
#pragma once

#ifndef __ARM_FEATURE_MATMUL_INT8
#error "compile with +i8mm"
#endif

#include "simd/neon.h"
