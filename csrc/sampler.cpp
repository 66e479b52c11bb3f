#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hexad {
namespace {

bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Sorts the likeliest `count` candidates to the front.
void sort_front(std::vector<Candidate>& candidates, size_t count) {
  count = std::min(count, candidates.size());
  auto middle = candidates.begin() + static_cast<std::ptrdiff_t>(count);
  if (count < candidates.size()) std::nth_element(candidates.begin(), middle, candidates.end(), likelier);
  std::sort(candidates.begin(), middle, likelier);
}

}  // namespace

float uniform(uint64_t seed, uint32_t sequence, uint32_t position) {
  uint32_t counter[4] = {position, sequence, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<float>(counter[0] >> 8) * 0x1p-24f;
}

int32_t sample_token(const Kernels& kernels, const float* logits, int64_t vocab, const SampleParams& params,
                     std::vector<Candidate>& kept) {
  const int64_t likeliest = kernels.argmax(logits, vocab);
  const float largest = logits[likeliest];
  if (!std::isfinite(largest)) return -1;
  constexpr float kGreedy = 1e-5f;
  if (params.temperature < kGreedy) return static_cast<int32_t>(likeliest);

  const double temperature = params.temperature;
  float threshold = -std::numeric_limits<float>::infinity();
  if (params.min_p > 0)
    threshold = static_cast<float>(largest + temperature * std::log(double{params.min_p}));
  kept.clear();
  for (int64_t i = 0; i < vocab; ++i)
    if (logits[i] >= threshold) kept.push_back({logits[i], static_cast<int32_t>(i)});

  auto weight = [&](const Candidate& c) { return std::exp((c.logit - largest) / params.temperature); };
  const bool cut_k = params.top_k > 0 && params.top_k < vocab;
  if (cut_k) {
    sort_front(kept, static_cast<size_t>(params.top_k));
    kept.resize(std::min(kept.size(), static_cast<size_t>(params.top_k)));
  }
  double total = 0;
  for (const Candidate& c : kept) total += double{weight(c)};
  if (params.top_p < 1) {
    // Sorting the whole vocabulary is rarely needed: sort a growing front until it holds the mass.
    const double wanted = double{params.top_p} * total;
    double mass = 0;
    size_t count = 0, sorted = cut_k ? kept.size() : 0;
    do {
      if (count == sorted) {
        sorted = std::max<size_t>(256, sorted * 8);
        sort_front(kept, sorted);
      }
      mass += double{weight(kept[count++])};
    } while (count < kept.size() && mass < wanted);
    kept.resize(count);
    total = mass;
  }
  const double target = double{uniform(params.seed, params.sequence, params.position)} * total;
  double mass = 0;
  for (const Candidate& c : kept)
    if ((mass += double{weight(c)}) > target) return c.token;
  return kept.back().token;
}

}  // namespace hexad
