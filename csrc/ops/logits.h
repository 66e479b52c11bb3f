// What the sampler does to a row of logits. NaNs are passed over everywhere.
//
// block_maxima  maxima[b] = the largest of x[b · kLogitBlock …], −∞ where there is none.
// at_least      bit i is set where x[i] ≥ threshold; n ≤ 64.
// weigh         w[i] = e^((x[i] − largest) / temperature) where x[i] ≥ floor and 0 elsewhere, in float32; w has room for
//               n rounded up to 16. Returns Σ w and Σ w · z, z the exponent, summed in float64.
// moments       count, Σ d and Σ d² of d = x − centre over x ≥ floor, in float64.
// mask          out[i] = x[i] where bit i % 32 of mask[i / 32] is set, −∞ elsewhere; x and out may be the same.
#pragma once

#include "kernels.h"

namespace hexad {

struct WeightSums {
  double w, wz;
};

struct Moments {
  double count, sum, squares;
};

}  // namespace hexad
