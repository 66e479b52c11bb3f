// The sampler's loops; compiled once per ISA. Contracts in ops/logits.h.

#include "ops/logits.h"

#include "ops/table.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

constexpr float kNone = -__builtin_inff();

void block_maxima(const float* x, int64_t n, float* maxima) {
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    // max(NaN, b) is b in every vocabulary, so NaNs are passed over.
    F32 largest[4] = {splat(kNone), splat(kNone), splat(kNone), splat(kNone)};
    const int64_t end = begin + kLogitBlock < n ? begin + kLogitBlock : n;
    int64_t i = begin;
    for (; i + 64 <= end; i += 64) {
      HEXAD_UNROLL
      for (int j = 0; j < 4; ++j) largest[j] = max(load(x + i + 16 * j), largest[j]);
    }
    for (; i < end; i += 16) {
      const Mask m = first_lanes(end - i);
      largest[0] = max(select(m, load(x + i, m), splat(kNone)), largest[0]);
    }
    *maxima++ = max_of(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  }
}

uint64_t bits_at_least(const float* x, int64_t n, float threshold) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const Mask m = first_lanes(n - i);
    bits |= static_cast<uint64_t>(at_least(load(x + i, m), splat(threshold)) & m) << i;
  }
  return bits;
}

WeightSums weigh(const float* x, int64_t n, float largest, float temperature, float floor, float* w) {
  F64 total = splat_wide(0), products = splat_wide(0);
  for (int64_t i = 0; i < n; i += 16) {
    const Mask m = first_lanes(n - i);
    const F32 v = select(m, load(x + i, m), splat(kNone));
    // −110 is where exp is 0 for good, so that 0 · z is 0 as well.
    const F32 z = max(div(sub(v, splat(largest)), splat(temperature)), splat(-110.0f));
    const F32 weight = select(at_least(v, splat(floor)), exp(z), splat(0));
    store(w + i, weight);
    total = add(total, widen(weight));
    products = fma(widen(weight), widen(z), products);
  }
  return {sum(total), sum(products)};
}

Moments moments(const float* x, int64_t n, float floor, double centre) {
  F64 count = splat_wide(0), total = splat_wide(0), squares = splat_wide(0);
  for (int64_t i = 0; i < n; i += 16) {
    const Mask m = first_lanes(n - i);
    const F32 v = load(x + i, m);
    const Mask kept = static_cast<Mask>(at_least(v, splat(floor)) & m);
    const F64 one = widen(select(kept, splat(1), splat(0)));
    const F64 d = sub(widen(select(kept, v, splat(0))), mul(one, splat_wide(centre)));
    count = add(count, one);
    total = add(total, d);
    squares = fma(d, d, squares);
  }
  return {sum(count), sum(total), sum(squares)};
}

void mask(const float* x, int64_t n, const uint32_t* bits, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const Mask m = first_lanes(n - i);
    store(out + i, select(static_cast<Mask>(bits[i / 32] >> i % 32), load(x + i, m), splat(kNone)), m);
  }
}

}  // namespace

void fill_logits(Kernels& table) {
  table.block_maxima = block_maxima;
  table.at_least = bits_at_least;
  table.weigh = weigh;
  table.moments = moments;
  table.mask = mask;
}

}  // namespace hexad::HEXAD_NAMESPACE
