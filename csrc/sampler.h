// Draws one token from a row of logits; −1 where none is finite enough to draw. The definition is backends/reference.py's `sample`.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace hexad {

struct SampleParams {
  float temperature;  // below 1e-5: greedy
  int32_t top_k;      // ≤ 0 keeps all
  float top_p;        // 1 keeps all
  float min_p;        // 0 keeps all
  uint64_t seed;
  uint32_t sequence;
  uint32_t position;
};

struct Candidate {
  float logit;
  int32_t token;
};

// The first word of Philox4x32-10 (Salmon et al. 2011) as a float in [0, 1).
float uniform(uint64_t seed, uint32_t sequence, uint32_t position);

// `scratch` has capacity for the vocabulary, so that nothing is allocated here. Does not throw.
int32_t sample_token(const Kernels& kernels, const float* logits, int64_t vocab, const SampleParams& params,
                     std::vector<Candidate>& scratch);

}  // namespace hexad
