// Draws tokens from rows of logits and reports on them. The definition of every sampler is
// backends/reference_sampler.py; this is how they are computed without sorting the vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "platform.h"

namespace hexad {

// The numbers of SAMPLER_IDS in backends/sampling.py; 0 ends an order.
enum class SamplerId : uint8_t {
  kEnd,
  kPenalties,
  kDry,
  kTemperature,
  kTopNSigma,
  kTypicalP,
  kMinP,
  kTopK,
  kTopP,
  kXtc,
  kCount
};

// One element of ROW_DTYPE in backends/sampling.py.
struct SampleRow {
  uint64_t seed;
  uint32_t position;
  uint32_t sequence;
  float temperature;
  float top_p;
  float min_p;
  float typical_p;
  float top_n_sigma;
  float xtc_probability;
  float xtc_threshold;
  float repetition_penalty;
  float presence_penalty;
  float frequency_penalty;
  float dry_multiplier;
  float dry_base;
  float mirostat_tau;
  float mirostat_eta;
  float mirostat_mu;
  float dynatemp_range;
  float dynatemp_exponent;
  int32_t top_k;
  int32_t repeat_last_n;
  int32_t num_prompt;
  int32_t dry_allowed_length;
  int32_t dry_last_n;
  int32_t dry_breakers;
  int32_t mirostat;
  int32_t mask;
  int32_t draw;
  int32_t num_logprobs;
  SamplerId order[12];
};
static_assert(sizeof(SampleRow) == 136 && offsetof(SampleRow, temperature) == 16 &&
              offsetof(SampleRow, top_k) == 84 && offsetof(SampleRow, order) == 124);

// A ragged array: row i has values[starts[i]] up to values[starts[i + 1]].
template <class T>
struct Ragged {
  const T* values;
  const int64_t* starts;
  int64_t size;

  const T* begin(int64_t i) const { return values + starts[i]; }
  const T* end(int64_t i) const { return values + starts[i + 1]; }
  int64_t length(int64_t i) const { return starts[i + 1] - starts[i]; }
};

// SampleBatch of backends/sampling.py.
struct SampleBatch {
  const SampleRow* rows;
  int64_t count;
  Ragged<int32_t> history;
  Ragged<int32_t> bias;
  const float* bias_values;
  Ragged<int32_t> asks;
  const uint32_t* masks;  // [mask_count][mask_words]
  int64_t mask_count, mask_words;

  bool wants(int64_t i) const { return rows[i].draw != 0 || rows[i].num_logprobs >= 0 || asks.length(i) > 0; }
  const uint32_t* mask(int32_t index) const { return index < 0 ? nullptr : masks + index * mask_words; }
  // Throws std::invalid_argument where it contradicts itself or goes beyond the vocabulary.
  void check(int64_t vocab) const;
};

// SampleOutput of backends/sampling.py.
struct SampleOutput {
  int32_t* tokens;
  float* mirostat_mu;
  float* logprobs;
  int32_t* ranks;
  int32_t* top_ids;  // [count][top_width]
  float* top_logprobs;
  int64_t top_width;
  float* ask_logprobs;
  int32_t* ask_ranks;
};

struct Candidate {
  float x;       // logit with what was added to it
  float weight;  // as of the last weighing
  int32_t token;
};

// One thread's memory, so that drawing allocates nothing.
struct SamplerScratch {
  Memory<float> x;  // a row that may be written to
  Memory<Candidate> list;
  Memory<uint32_t> marks;        // per token; zero between uses
  Memory<float> maxima, bounds;  // per block
  Memory<double> masses;
  std::vector<int32_t> runs;  // per token of a history; grown before threads start

  void reserve(int64_t vocab);
  int64_t bytes() const;
};

// Blocks of logits that share a maximum.
inline int64_t logit_blocks(int64_t vocab) { return (vocab + kLogitBlock - 1) / kLogitBlock; }

// Does what row i of the batch wants of its logits [vocab], which it may overwrite, and fills in its part of the
// output. maxima: those of the logits' blocks (ops/logits.h). Does not throw.
void sample_row(const Kernels& kernels, float* logits, float* maxima, int64_t vocab, const SampleBatch& batch,
                int64_t i, SamplerScratch& scratch, const SampleOutput& output);

// What a row that wants nothing gets.
void skip_row(const SampleBatch& batch, int64_t i, const SampleOutput& output);

}  // namespace hexad
