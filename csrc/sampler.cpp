#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

#include "ops/logits.h"

namespace hexad {
namespace {

constexpr double kGreedyEpsilon = 1e-5;  // of float64: float32(1e-5) is less
constexpr double kMinTemperature = 0.01;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kEstimated = 100;  // tokens from which mirostat estimates Zipf's exponent

bool likelier(const Candidate& a, const Candidate& b) {
  return a.x > b.x || (a.x == b.x && a.token < b.token);
}

using Tokens = std::span<const int32_t>;

// The last n of the tokens; all if n is negative.
Tokens window(Tokens tokens, int32_t n) {
  return n < 0 || n > std::ssize(tokens) ? tokens : tokens.last(static_cast<size_t>(n));
}

struct Uniforms {
  float token, coin;
};

// The first words of Philox4x32-10 (Salmon et al. 2011) as floats in [0, 1).
Uniforms uniforms(const SampleRow& row) {
  uint32_t counter[4] = {row.position, row.sequence, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(row.seed), static_cast<uint32_t>(row.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const auto unit = [](uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; };
  return {unit(counter[0]), unit(counter[1])};
}

// A row of numbers over the vocabulary with the maximum of each of its blocks.
struct Row {
  const Kernels& kernels;
  float* x;
  int64_t vocab;
  float* maxima;

  void refresh() { kernels.block_maxima(x, vocab, maxima); }
  int64_t blocks() const { return logit_blocks(vocab); }
  int64_t block_size(int64_t b) const { return std::min<int64_t>(kLogitBlock, vocab - b * kLogitBlock); }
  float largest() const { return *std::max_element(maxima, maxima + blocks()); }

  // f(first, bits) for the x of at least `threshold`, 64 tokens at a time: bit i stands for token first + i.
  template <class F>
  void each_at_least(float threshold, const F& f) const {
    for (int64_t b = 0; b < blocks(); ++b) {
      if (!(maxima[b] >= threshold)) continue;
      const int64_t end = b * kLogitBlock + block_size(b);
      for (int64_t i = b * kLogitBlock; i < end; i += 64)
        f(i, kernels.at_least(x + i, std::min<int64_t>(64, end - i), threshold));
    }
  }

  int64_t count_at_least(float threshold) const {
    int64_t count = 0;
    each_at_least(threshold, [&](int64_t, uint64_t bits) { count += std::popcount(bits); });
    return count;
  }

  // 1 + the number of larger x; 0 for a NaN.
  int32_t rank(int32_t token) const {
    const float infinity = std::numeric_limits<float>::infinity(), value = x[token];
    if (std::isnan(value)) return 0;
    return value == infinity ? 1 : 1 + static_cast<int32_t>(count_at_least(std::nextafter(value, infinity)));
  }
};

constexpr auto unlikelihood = [](const Candidate& c) { return -double{c.x}; };

// Puts the shortest prefix of c [n], by rising key and equals by likelihood, of which reached(Σ weight) holds to the
// front, its last element at the end of it, and returns its length; n if it is never reached. Instead of sorting all it
// sums the weights by ranges of the key and looks more closely at the range in which the sum gets there.
template <class Key, class Reached>
int64_t shortest_prefix(Candidate* c, int64_t n, const Key& key, const Reached& reached) {
  constexpr int64_t kFew = 64;
  constexpr int kRanges = 256, kRounds = 4;  // more rounds would not help: a few keys lie far from the others
  double mass = 0;
  Candidate *begin = c, *end = c + n;
  for (int round = 0; round < kRounds && end - begin > kFew; ++round) {
    double low = key(*begin), high = low;
    for (const Candidate* i = begin; i < end; ++i) {
      low = std::min(low, key(*i));
      high = std::max(high, key(*i));
    }
    if (!(high > low) || std::isinf(high - low)) break;
    const double scale = kRanges / (high - low);
    const auto range_of = [&](const Candidate& i) {
      return std::min(static_cast<int>((key(i) - low) * scale), kRanges - 1);
    };
    double masses[kRanges] = {};
    for (const Candidate* i = begin; i < end; ++i) masses[range_of(*i)] += double{i->weight};
    int range = 0;
    while (range < kRanges - 1 && !reached(mass + masses[range])) mass += masses[range++];
    begin = std::partition(begin, end, [&](const Candidate& i) { return range_of(i) < range; });
    end = std::partition(begin, end, [&](const Candidate& i) { return range_of(i) == range; });
  }
  std::sort(begin, end, [&](const Candidate& i, const Candidate& j) {
    const double a = key(i), b = key(j);
    return a < b || (a == b && likelier(i, j));
  });
  while (begin < end)
    if (reached(mass += double{begin++->weight})) break;
  return begin - c;
}

struct Drawn {
  int32_t token;
  double share;  // of the weights of what was kept
};

// The tokens kept so far, their x, and the temperature. Dense at first: all tokens with x ≥ floor. A list once few are
// left or single ones are dropped; its order is that of the ids until `by_likelihood` says that it does not matter.
class Kept {
 public:
  Kept(const Row& row, SamplerScratch& scratch, float floor = kLowest)
      : row_(row), scratch_(scratch), list_(scratch.list.get()), floor_(floor) {}

  float temperature = 1;
  bool by_likelihood = false;  // tokens are drawn likeliest first, not by id

  int64_t vocab() const { return row_.vocab; }
  Candidate* begin() { return list_; }
  Candidate* end() { return list_ + count_; }

  int64_t count() const { return dense_ ? row_.count_at_least(floor_) : count_; }

  // The largest x; −∞ if nothing is kept.
  float largest() const {
    if (dense_) {
      const float x = row_.largest();
      return x >= floor_ ? x : kNone;
    }
    float x = kNone;
    for (int64_t i = 0; i < count_; ++i) x = std::max(x, list_[i].x);
    return x;
  }

  int32_t likeliest() {
    if (!dense_) return std::min_element(begin(), end(), likelier)->token;
    const float largest = this->largest();
    const int64_t b = std::find(row_.maxima, row_.maxima + row_.blocks(), largest) - row_.maxima;
    return static_cast<int32_t>(std::find(row_.x + b * kLogitBlock, row_.x + vocab(), largest) - row_.x);
  }

  // ln of the weight of a candidate; `largest` is of what is kept.
  double z(const Candidate& c, float largest) const { return double{(c.x - largest) / temperature}; }

  // Computes every weight.
  WeightSums weigh() {
    const float largest = this->largest();
    WeightSums total{0, 0};
    float x[kLogitBlock], w[kLogitBlock];
    const auto block = [&](const float* from, int64_t n, float floor) {
      const WeightSums sums = row_.kernels.weigh(from, n, largest, temperature, floor, w);
      total.w += sums.w;
      total.wz += sums.wz;
      return sums.w;
    };
    if (dense_) {
      for (int64_t b = 0; b < row_.blocks(); ++b)
        scratch_.masses[b] =
            row_.maxima[b] >= floor_ ? block(row_.x + b * kLogitBlock, row_.block_size(b), floor_) : 0;
      return total;
    }
    for (int64_t first = 0; first < count_; first += kLogitBlock) {
      const int64_t n = std::min<int64_t>(kLogitBlock, count_ - first);
      for (int64_t i = 0; i < n; ++i) x[i] = list_[first + i].x;
      block(x, n, kLowest);
      for (int64_t i = 0; i < n; ++i) list_[first + i].weight = w[i];
    }
    return total;
  }

  // Moments of x about `centre`.
  Moments moments(float centre) const {
    if (dense_) return row_.kernels.moments(row_.x, vocab(), floor_, double{centre});
    Moments total{0, 0, 0};
    for (int64_t i = 0; i < count_; ++i) {
      const double d = double{list_[i].x} - double{centre};
      total = {total.count + 1, total.sum + d, total.squares + d * d};
    }
    return total;
  }

  // Makes a list of what is kept, without weights. Tokens below the threshold may be left out.
  void list(float threshold = kNone) {
    if (!dense_) return;
    count_ = 0;
    row_.each_at_least(threshold > floor_ ? threshold : floor_, [&](int64_t first, uint64_t bits) {
      for (; bits; bits &= bits - 1) {
        const int64_t token = first + std::countr_zero(bits);
        list_[count_++] = {row_.x[token], 0, static_cast<int32_t>(token)};
      }
    });
    dense_ = false;
  }

  // Makes a list, with weights, of what is kept and at least e^log_share of `mass`, the sum of all weights.
  void list_share(double log_share, double mass) {
    if (!dense_) return;
    const double largest = this->largest();
    const double slack = 0.01;  // more than the roundings of z, w and this line
    list(static_cast<float>(
        std::min(largest + double{temperature} * (log_share + std::log(mass) - slack), largest)));
    weigh();
  }

  void keep_at_least(float threshold) {
    if (dense_) floor_ = std::max(threshold, floor_);  // in this order a NaN stays: nothing reaches it
    drop_if([&](const Candidate& c) { return !(c.x >= threshold); });
  }

  // Drops from a list, whose order stays.
  template <class F>
  void drop_if(const F& f) {
    if (!dense_) count_ = std::remove_if(begin(), end(), f) - list_;
  }

  void keep_likeliest(int64_t count) {
    list(dense_ ? bound_of(count) : kNone);
    if (count >= count_) return;
    std::nth_element(begin(), begin() + count, end(), likelier);
    count_ = count;
  }

  // Of a list with weights, keeps the shortest prefix of at least this mass.
  template <class Key>
  void keep_prefix(const Key& key, double mass) {
    count_ = shortest_prefix(list_, count_, key, [&](double sum) { return sum >= mass; });
  }

  // Replaces x by f(x, mark) where a token has a mark, and clears the marks, all of which are of `seen`.
  template <class F>
  void revise(Tokens seen, const F& f) {
    uint32_t* marks = scratch_.marks.get();
    if (dense_ && floor_ > kLowest) list();  // who is kept must not change with x
    if (dense_) {
      for (const int32_t token : seen)
        if (uint32_t& mark = marks[token]) {
          row_.x[token] = f(row_.x[token], mark);
          mark = 0;
        }
      row_.refresh();
      return;
    }
    for (Candidate& c : *this)
      if (marks[c.token]) c.x = f(c.x, marks[c.token]);
    for (const int32_t token : seen) marks[token] = 0;
    keep_at_least(kLowest);
  }

  // Draws by u in [0, 1).
  Drawn draw(float u) {
    const double mass = weigh().w, target = double{u} * mass;
    const auto reached = [&](double sum) { return sum > target; };
    if (dense_) return draw_dense(reached, mass);
    int64_t place = 0;
    if (by_likelihood) {
      place = shortest_prefix(list_, count_, unlikelihood, reached) - 1;
    } else {
      double sum = double{list_[0].weight};
      while (!reached(sum) && place < count_ - 1) sum += double{list_[++place].weight};
    }
    return {list_[place].token, double{list_[place].weight} / mass};
  }

 private:
  // An x that at least `count` tokens of the row reach, and not many more.
  float bound_of(int64_t count) {
    float* bounds = scratch_.bounds.get();
    std::copy(row_.maxima, row_.maxima + row_.blocks(), bounds);
    if (count <= row_.blocks()) {
      // As many blocks reach it, so at least as many tokens do.
      std::nth_element(bounds, bounds + count - 1, bounds + row_.blocks(), std::greater<float>());
      return bounds[count - 1];
    }
    // Half of the blocks reach the median of the maxima, so it is a fair measure of the spread.
    std::nth_element(bounds, bounds + row_.blocks() / 2, bounds + row_.blocks());
    float high = row_.largest(), low = high - 4 * (high - bounds[row_.blocks() / 2]);
    if (!(low > floor_) || row_.count_at_least(low) < count) return floor_;
    for (int halvings = 0; halvings < 8; ++halvings) {
      const float middle = low + (high - low) / 2;
      const int64_t reach = row_.count_at_least(middle);
      (reach >= count ? low : high) = middle;
      if (reach >= count && reach < count + count / 2) break;
    }
    return low;
  }

  template <class Reached>
  Drawn draw_dense(const Reached& reached, double mass) {
    // First the block, then the token.
    int64_t block = 0;
    double before = 0, sum = 0;
    for (int64_t b = 0; b < row_.blocks(); ++b) {
      if (!(row_.maxima[b] >= floor_)) continue;
      block = b;
      before = sum;
      sum += scratch_.masses[b];
      if (reached(sum)) break;
    }
    float w[kLogitBlock];
    const float* x = row_.x + block * kLogitBlock;
    row_.kernels.weigh(x, row_.block_size(block), largest(), temperature, floor_, w);
    int64_t last = 0;
    sum = before;
    for (int64_t i = 0; i < row_.block_size(block); ++i) {
      if (!(x[i] >= floor_)) continue;
      last = i;
      if (reached(sum += double{w[i]})) break;
    }
    return {static_cast<int32_t>(block * kLogitBlock + last), double{w[last]} / mass};
  }

  Row row_;
  SamplerScratch& scratch_;
  Candidate* list_;
  int64_t count_ = 0;
  float floor_;
  bool dense_ = true;
};

// The samplers, in the order of SamplerId.

void penalties(Kept& kept, const SampleRow& row, Tokens history, uint32_t* marks) {
  const Tokens seen = window(history, row.repeat_last_n);
  for (const int32_t& token : seen)
    marks[token] = (marks[token] + (&token - history.data() >= row.num_prompt ? 2 : 0)) | 1;
  kept.revise(seen, [&](float x, uint32_t mark) {
    x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    const uint32_t count = mark / 2;
    const double lost = count * double{row.frequency_penalty} + double{row.presence_penalty};
    return count > 0 ? x - static_cast<float>(lost) : x;
  });
}

void dry(Kept& kept, const SampleRow& row, Tokens history, const uint32_t* breakers, uint32_t* marks,
         int32_t* runs) {
  const Tokens seen = window(history, row.dry_last_n);
  const int64_t n = std::ssize(seen);
  const auto breaks = [&](int32_t token) { return breakers && breakers[token / 32] >> token % 32 & 1; };
  const auto back = [&](int64_t i) { return seen[static_cast<size_t>(n - 1 - i)]; };
  int64_t most = 0;  // the longest run that may end the window
  while (most < n && !breaks(back(most))) ++most;
  // runs[k]: how many tokens that end the window also end what stands k tokens before it; the Z algorithm (Gusfield
  // 1997) on the reversed window. [left, right) is the match that reaches furthest.
  const int64_t least = std::max(0, row.dry_allowed_length);
  int64_t left = 0, right = 0;
  for (int64_t k = 1; k <= n; ++k) {
    int64_t run = k < right ? std::min<int64_t>(right - k, runs[k - left]) : 0;
    while (k + run < n && back(run) == back(k + run)) ++run;
    if (k + run > right) {
      left = k;
      right = k + run;
    }
    if (k < n) runs[k] = static_cast<int32_t>(run);
    run = std::min(run, most);
    const int32_t token = back(k - 1);  // stood right after that run
    if (run >= least && !breaks(token)) marks[token] = std::max(marks[token], static_cast<uint32_t>(run) + 1);
  }
  kept.revise(seen, [&](float x, uint32_t mark) {
    const double power =
        std::pow(double{row.dry_base}, static_cast<double>(mark) - 1 - row.dry_allowed_length);
    const double lost = std::min(double{row.dry_multiplier} * power, -double{kLowest});
    return x - static_cast<float>(lost);
  });
}

void temperature(Kept& kept, const SampleRow& row) {
  kept.temperature = [&] {
    if (!(row.dynatemp_range > 0)) return row.temperature;
    const double low = std::max(0.0, double{row.temperature} - double{row.dynatemp_range});
    const double high = double{row.temperature} + double{row.dynatemp_range};
    const int64_t count = kept.count();
    double share = 1;
    if (count > 1) {
      const WeightSums sums = kept.weigh();
      share = (std::log(sums.w) - sums.wz / sums.w) / std::log(static_cast<double>(count));
    }
    return static_cast<float>(std::clamp(low + (high - low) * std::pow(share, double{row.dynatemp_exponent}),
                                         kMinTemperature, double{-kLowest}));
  }();
}

void top_n_sigma(Kept& kept, float n) {
  const float largest = kept.largest();
  const Moments m = kept.moments(largest);
  const double mean = m.sum / m.count;
  const double sigma = std::sqrt(std::max(0.0, m.squares / m.count - mean * mean));
  kept.keep_at_least(static_cast<float>(double{largest} - double{n} * sigma));
}

void typical_p(Kept& kept, float p) {
  const float largest = kept.largest();
  const WeightSums sums = kept.weigh();
  const double log_mass = std::log(sums.w), entropy = log_mass - sums.wz / sums.w;
  // Tokens of less than (1 − p) / vocab are less than 1 − p together, so the others reach p; and none of those is
  // further from the entropy than one whose surprise is more than twice the entropy.
  kept.list_share(std::min(std::log((1 - double{p}) / static_cast<double>(kept.vocab())), -2 * entropy),
                  sums.w);
  kept.keep_prefix([&](const Candidate& c) { return std::abs(log_mass - kept.z(c, largest) - entropy); },
                   double{p} * sums.w);
}

void min_p(Kept& kept, float p) {
  kept.keep_at_least(
      static_cast<float>(double{kept.largest()} + double{kept.temperature} * std::log(double{p})));
}

void top_p(Kept& kept, float p) {
  const double mass = kept.weigh().w;
  // Tokens of less than (1 − p) / vocab are less than 1 − p together, so the prefix ends before them.
  kept.list_share(std::log((1 - double{p}) / static_cast<double>(kept.vocab())), mass);
  kept.keep_prefix(unlikelihood, double{p} * mass);
}

void xtc(Kept& kept, float threshold) {
  kept.list();
  const double least = double{threshold} * kept.weigh().w;
  const Candidate* last = nullptr;  // the least likely of the top choices
  for (const Candidate& c : kept)
    if (double{c.weight} >= least && (!last || likelier(*last, c))) last = &c;
  if (!last) return;
  const Candidate stays = *last;
  kept.drop_if([&](const Candidate& c) { return likelier(c, stays); });
}

void mirostat_2(Kept& kept, float mu) {
  const float largest = kept.largest();
  const double mass = kept.weigh().w, log_mass = std::log(mass), log2 = std::log(2.0);
  kept.list_share(-double{mu} * log2, mass);
  const int32_t likeliest = kept.likeliest();
  kept.drop_if([&](const Candidate& c) {
    return !((log_mass - kept.z(c, largest)) / log2 <= double{mu}) && c.token != likeliest;
  });
}

void mirostat_1(Kept& kept, float mu) {
  kept.list();
  const float largest = kept.largest();
  const int64_t n = std::min<int64_t>(kEstimated, kept.count());
  std::partial_sort(kept.begin(), kept.begin() + n, kept.end(), likelier);
  double products = 0, squares = 0;
  for (int64_t i = 0; i + 1 < n; ++i) {
    const double t = std::log(static_cast<double>(i + 2) / static_cast<double>(i + 1));
    products += t * (kept.z(kept.begin()[i], largest) - kept.z(kept.begin()[i + 1], largest));
    squares += t * t;
  }
  const double exponent = products / squares, epsilon = exponent - 1;
  const double count =
      std::pow(epsilon * std::exp2(double{mu}) / (1 - std::pow(static_cast<double>(kept.vocab()), -epsilon)),
               1 / exponent);
  if (count < static_cast<double>(kept.count()))
    kept.keep_likeliest(static_cast<int64_t>(std::max(1.0, count)));
}

// Applies one sampler of the row's order.
void apply(SamplerId sampler, Kept& kept, const SampleBatch& batch, int64_t i, float coin,
           SamplerScratch& scratch) {
  const SampleRow& row = batch.rows[i];
  const Tokens history{batch.history.begin(i), batch.history.end(i)};
  switch (sampler) {
    case SamplerId::kPenalties:
      if (!history.empty()) penalties(kept, row, history, scratch.marks.get());
      break;
    case SamplerId::kDry:
      if (!history.empty() && row.dry_multiplier != 0)
        dry(kept, row, history, batch.mask(row.dry_breakers), scratch.marks.get(), scratch.runs.data());
      break;
    case SamplerId::kTemperature:
      temperature(kept, row);
      break;
    case SamplerId::kTopNSigma:
      if (row.top_n_sigma > 0) top_n_sigma(kept, row.top_n_sigma);
      break;
    case SamplerId::kTypicalP:
      if (!(row.typical_p < 1)) break;
      typical_p(kept, row.typical_p);
      kept.by_likelihood = true;
      break;
    case SamplerId::kMinP:
      if (row.min_p > 0) min_p(kept, row.min_p);
      break;
    case SamplerId::kTopK:
      if (row.top_k <= 0 || row.top_k >= kept.vocab()) break;
      kept.keep_likeliest(row.top_k);
      kept.by_likelihood = true;
      break;
    case SamplerId::kTopP:
      if (!(row.top_p < 1)) break;
      top_p(kept, row.top_p);
      kept.by_likelihood = true;
      break;
    case SamplerId::kXtc:
      if (coin < row.xtc_probability && row.xtc_threshold <= 0.5f) xtc(kept, row.xtc_threshold);
      break;
    default:
      break;
  }
}

bool truncates(SamplerId sampler) { return sampler > SamplerId::kTemperature; }

// The token drawn, or −1. Changes mu where mirostat drew it.
int32_t draw(Kept& kept, const SampleBatch& batch, int64_t i, SamplerScratch& scratch, float& mu) {
  const SampleRow& row = batch.rows[i];
  const bool greedy = row.temperature < kGreedyEpsilon;
  const Uniforms u = uniforms(row);
  for (const SamplerId* sampler = row.order;; ++sampler) {
    if (!std::isfinite(kept.largest())) return -1;
    if (sampler == std::end(row.order) || *sampler == SamplerId::kEnd) break;
    if ((greedy || row.mirostat != 0) && truncates(*sampler)) continue;
    apply(*sampler, kept, batch, i, u.coin, scratch);
  }
  if (greedy) return kept.likeliest();
  if (row.mirostat == 0) return kept.draw(u.token).token;
  row.mirostat == 1 ? mirostat_1(kept, row.mirostat_mu) : mirostat_2(kept, row.mirostat_mu);
  kept.by_likelihood = true;
  const Drawn drawn = kept.draw(u.token);
  mu = static_cast<float>(mu -
                          double{row.mirostat_eta} * (-std::log2(drawn.share) - double{row.mirostat_tau}));
  return drawn.token;
}

// Reports the likeliest of the row and those asked for. Returns ln Σ e^x.
double report(const Row& row, const SampleBatch& batch, int64_t i, SamplerScratch& scratch,
              const SampleOutput& output) {
  Kept all(row, scratch, kNone);
  const double largest = all.largest();
  const double log_mass = std::isfinite(largest) ? largest + std::log(all.weigh().w) : double{kNan};
  const auto logprob = [&](float x) { return static_cast<float>(x - log_mass); };
  for (int64_t ask = batch.asks.starts[i]; ask < batch.asks.starts[i + 1]; ++ask) {
    const int32_t token = batch.asks.values[ask];
    output.ask_logprobs[ask] = logprob(row.x[token]);
    output.ask_ranks[ask] = row.rank(token);
  }
  if (batch.rows[i].num_logprobs > 0) {
    all.keep_likeliest(batch.rows[i].num_logprobs);
    std::sort(all.begin(), all.end(), likelier);
    int64_t place = i * output.top_width;
    for (const Candidate& c : all) {
      output.top_ids[place] = c.token;
      output.top_logprobs[place++] = logprob(c.x);
    }
  }
  return log_mass;
}

}  // namespace

void skip_row(const SampleBatch& batch, int64_t i, const SampleOutput& output) {
  output.tokens[i] = -1;
  output.mirostat_mu[i] = batch.rows[i].mirostat_mu;
  output.logprobs[i] = kNan;
  output.ranks[i] = 0;
  std::fill_n(output.top_ids + i * output.top_width, output.top_width, -1);
  std::fill_n(output.top_logprobs + i * output.top_width, output.top_width, kNan);
}

void sample_row(const Kernels& kernels, float* logits, float* maxima, int64_t vocab, const SampleBatch& batch,
                int64_t i, SamplerScratch& scratch, const SampleOutput& output) {
  skip_row(batch, i, output);
  if (!batch.wants(i)) return;
  const SampleRow& wanted = batch.rows[i];
  const bool reports_drawn = wanted.draw != 0 && wanted.num_logprobs >= 0;
  const Row given{kernels, logits, vocab, maxima};
  double log_mass = 0;
  if (wanted.num_logprobs >= 0 || batch.asks.length(i) > 0)
    log_mass = report(given, batch, i, scratch, output);
  if (wanted.draw == 0) return;

  Row row = given;
  const uint32_t* mask = batch.mask(wanted.mask);
  if (mask || batch.bias.length(i) > 0 || batch.history.length(i) > 0) {
    // The report on the token drawn still needs the logits.
    if (reports_drawn) row.x = scratch.x.get();
    row.maxima = scratch.maxima.get();
    if (mask)
      kernels.mask(logits, vocab, mask, row.x);
    else if (row.x != logits)
      std::memcpy(row.x, logits, static_cast<size_t>(vocab) * sizeof(float));
    for (int64_t place = batch.bias.starts[i]; place < batch.bias.starts[i + 1]; ++place)
      row.x[batch.bias.values[place]] += batch.bias_values[place];
    row.refresh();
  }
  Kept kept(row, scratch);
  const int32_t token = draw(kept, batch, i, scratch, output.mirostat_mu[i]);
  output.tokens[i] = token;
  if (!reports_drawn || token < 0) return;
  output.logprobs[i] = static_cast<float>(logits[token] - log_mass);
  output.ranks[i] = given.rank(token);
}

void SamplerScratch::reserve(int64_t vocab) {
  const size_t tokens = static_cast<size_t>(vocab), blocks = static_cast<size_t>(logit_blocks(vocab));
  x = allocate<float>(tokens);
  list = allocate<Candidate>(tokens);
  marks = allocate<uint32_t>(tokens);
  for (Memory<float>* of : {&maxima, &bounds}) *of = allocate<float>(blocks);
  masses = allocate<double>(blocks);
}

int64_t SamplerScratch::bytes() const {
  return static_cast<int64_t>(x.get_deleter().bytes + list.get_deleter().bytes + marks.get_deleter().bytes +
                              maxima.get_deleter().bytes + bounds.get_deleter().bytes +
                              masses.get_deleter().bytes + runs.capacity() * sizeof(int32_t));
}

void SampleBatch::check(int64_t vocab) const {
  // Called where something is wrong: histories are long, so the messages of what holds must not be made.
  const auto fail = [](const std::string& message) { throw std::invalid_argument(message); };
  const auto check_ragged = [&](const Ragged<int32_t>& tokens, const std::string& name) {
    bool divides = tokens.starts[0] == 0 && tokens.starts[count] == tokens.size;
    for (int64_t i = 0; i < count; ++i) divides &= tokens.starts[i] <= tokens.starts[i + 1];
    if (!divides)
      fail(name + " starts do not divide " + std::to_string(tokens.size) + " tokens among " +
           std::to_string(count) + " rows");
    for (int64_t i = 0; i < tokens.size; ++i)
      if (tokens.values[i] < 0 || tokens.values[i] >= vocab)
        fail(name + " token " + std::to_string(tokens.values[i]) + " is outside the vocabulary of " +
             std::to_string(vocab));
  };
  check_ragged(history, "history");
  check_ragged(bias, "bias");
  check_ragged(asks, "ask");
  if (mask_count > 0 && mask_words != (vocab + 31) / 32)
    fail("masks of " + std::to_string(mask_words) + " words for a vocabulary of " + std::to_string(vocab));
  for (int64_t i = 0; i < count; ++i) {
    const SampleRow& row = rows[i];
    for (const int32_t mask : {row.mask, row.dry_breakers})
      if (mask < -1 || mask >= mask_count)
        fail("mask " + std::to_string(mask) + " of " + std::to_string(mask_count));
    for (const float value : {row.temperature, row.dynatemp_range, row.dynatemp_exponent})
      if (!std::isfinite(value)) fail("a temperature is not finite");
    if (row.mirostat < 0 || row.mirostat > 2)
      fail("mirostat " + std::to_string(row.mirostat) + "; it is 0, 1 or 2");
    for (const SamplerId sampler : row.order)
      if (sampler >= SamplerId::kCount)
        fail("no sampler has the number " + std::to_string(int{static_cast<uint8_t>(sampler)}));
  }
}

}  // namespace hexad
