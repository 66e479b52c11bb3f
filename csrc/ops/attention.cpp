// Attention over the paged cache; compiled once per ISA. Definition in ops/attention.h.

#include "ops/attention.h"

#include "ops/table.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

inline F32 load_kv(const float* p) { return load(p); }
inline F32 load_kv(const uint16_t* p) { return load_f16(p); }
inline F32 load_kv(const int8_t* p) { return to_float(load_bytes(p)); }

template <class T>
constexpr KvDtype kDtype = KvDtype::kF32;
template <>
constexpr KvDtype kDtype<uint16_t> = KvDtype::kF16;
template <>
constexpr KvDtype kDtype<int8_t> = KvDtype::kQ8;

// c[r][0 … columns) ← (keep ? keep[r] · c : 0) + Σ_i a[r][i] · b[i][0 … columns), i ascending: both products of
// attention. Meanwhile `ahead` is asked for, `ahead_bytes` from there on: blocks lie far apart, so the hardware does
// not see the next one coming, and all at once it would have to wait. It is passed on by reference: reading what was
// just written, in other pieces, for a copy took a fifth of the time of a few rows.
template <class T>
struct Product {
  const float* a;
  int64_t a_stride;
  const T* b;
  int64_t b_stride;
  int64_t n;
  int64_t columns;  // a multiple of 32
  const float* keep;
  float* c;
  int64_t c_stride;
  const char* ahead;
  int64_t ahead_bytes;
};

// R rows × H vectors of b, the first of them `column`. A function of its own, so that its loop has all registers.
template <int R, int H, class T>
__attribute__((noinline)) void product_block(const Product<T>& p, int64_t column, const char* ahead,
                                             int64_t step) {
  // What a step reads, at least a line: with few rows no step has another tile's to share what is ahead.
  constexpr int kLines = (16 * H * static_cast<int>(sizeof(T)) + 63) / 64;
  const float* a = p.a;
  const T* b = p.b + column;
  float* c = p.c + column;
  F32 sums[R][H];
  HEXAD_UNROLL
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < H; ++h)
      sums[r][h] = p.keep ? mul(load(c + r * p.c_stride + 16 * h), splat(p.keep[r])) : splat(0);
  for (int64_t i = 0; i < p.n; ++i, b += p.b_stride, ahead += step) {
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + 64 * line);
    F32 numbers[H];
    for (int h = 0; h < H; ++h) numbers[h] = load_kv(b + 16 * h);
    HEXAD_UNROLL
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(a[r * p.a_stride + i]);
      for (int h = 0; h < H; ++h) sums[r][h] = fma(x, numbers[h], sums[r][h]);
    }
  }
  HEXAD_UNROLL
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < H; ++h) store(c + r * p.c_stride + 16 * h, sums[r][h]);
}

// All rows in register tiles of `width`, at most R; each of their steps asks for `step` bytes of what is ahead.
template <int R, class T>
inline __attribute__((always_inline)) void product_rows(int64_t rows, int64_t width, Product<T>& p,
                                                        int64_t step) {
  constexpr int kNarrow = tile_halves(R), kWide = tile_vectors(R);
  for (; rows >= R && width >= R; rows -= R, p.a += R * p.a_stride, p.c += R * p.c_stride) {
    int64_t column = 0;
    for (; column + 16 * kWide <= p.columns; column += 16 * kWide, p.ahead += p.n * step)
      product_block<R, kWide>(p, column, p.ahead, step);
    for (; column < p.columns; column += 16 * kNarrow, p.ahead += p.n * step)
      product_block<R, kNarrow>(p, column, p.ahead, step);
    if (p.keep) p.keep += R;
  }
  if constexpr (R > 1)
    if (rows > 0) product_rows<R - 1>(rows, width, p, step);
}

// Its register tiles are about equal: 7 rows are 4 + 3, not 6 + 1.
template <class T>
__attribute__((noinline)) void product(int64_t rows, Product<T>&& p) {
  const int64_t tiles = (rows + kTileSlots - 1) / kTileSlots, width = (rows + tiles - 1) / tiles,
                columns = 16 * tile_vectors(static_cast<int>(width)),
                steps = tiles * ((p.columns + columns - 1) / columns) * p.n;
  product_rows<kTileSlots>(rows, width, p, p.ahead_bytes / steps);
}

float exp_of(float x) {
  float lanes[16];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

constexpr float kMinusInfinity = -__builtin_inff();

// The running softmax of one row: largest score and sum of weights; the weighted values lie beside it.
struct RowState {
  float largest;
  float weight;
};

// Merges the segment (s, o_segment) into (total, o_total).
void merge(RowState& total, float* o_total, const RowState& s, float* o_segment, int64_t n) {
  const float largest = total.largest > s.largest ? total.largest : s.largest;
  const float keep = exp_of(total.largest - largest), take = exp_of(s.largest - largest);
  total = {largest, total.weight * keep + s.weight * take};
  for (int64_t i = 0; i < n; i += 16)
    store(o_total + i, fma(load(o_segment + i), splat(take), mul(load(o_total + i), splat(keep))));
}

// Asks for a block's K or V. Blocks lie far apart, so the hardware does not see the next one coming.
void prefetch(const void* unit, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(unit) + i);
}

// Rows of a tile and the keys they see.
struct Sight {
  const AttentionArgs& a;

  int64_t position(int64_t row) const { return a.position + row / a.group; }
  int64_t first_key(int64_t row) const {
    const int64_t key = position(row) + 1 - a.window;
    return key > 0 ? key : 0;
  }
  // The rows that see one of `count` keys from `key` on, which some row of the tile does: they are adjacent.
  struct Rows {
    int64_t first, end;
  };
  Rows rows_that_see(int64_t key, int64_t count) const {
    const int64_t first = key - a.position, end = key + count - 1 + a.window - a.position;
    return {(first > 0 ? first : 0) * a.group, (end < a.tokens ? end : a.tokens) * a.group};
  }
};

constexpr int64_t kSegment = int64_t{kSegmentBlocks} * kBlockTokens;

// The first block to compute.
int64_t first_block_of(const AttentionArgs& a) {
  const int64_t seen = Sight{a}.first_key(0) / kBlockTokens, begin = a.segment * kSegmentBlocks;
  return a.segments != nullptr && begin > seen ? begin : seen;
}

const char* block_of(const AttentionArgs& a, int64_t block) {
  return a.cache + a.blocks[block] * a.block_stride;
}

// Writes a row's output.
void finish_row(const AttentionArgs& a, int64_t r, const RowState& total, const float* o_total) {
  float* to = a.out + r / a.group * a.out_stride + r % a.group * a.head_dim;
  const float factor = 1.0f / total.weight;
  for (int64_t i = 0; i < a.head_dim; i += 16) {
    Mask m = first_lanes(a.head_dim - i);
    store(to + i, mul(load(o_total + i), splat(factor)), m);
  }
}

void merge_segments(const AttentionArgs& a) {
  const int64_t padded = padded_head_dim(a.head_dim), rows = int64_t{a.tokens} * a.group;
  const int64_t stride = segment_floats(a.head_dim);
  const Sight sight{a};
  float* o_total = a.scratch;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = sight.first_key(r) / kSegment, last = sight.position(r) / kSegment;
    RowState total{};
    for (int64_t segment = first; segment <= last; ++segment) {
      float* o = a.segments + (segment * rows + r) * stride;
      const RowState state{o[padded], o[padded + 1]};
      if (segment > first) {
        merge(total, o_total, state, o, padded);
      } else {
        total = state;
        for (int64_t i = 0; i < padded; i += 16) store(o_total + i, load(o + i));
      }
    }
    finish_row(a, r, total, o_total);
  }
}

template <class T>
void attention(const AttentionArgs& a) {
  constexpr bool kScaled = kDtype<T> == KvDtype::kQ8;
  const int64_t padded = padded_head_dim(a.head_dim), rows = int64_t{a.tokens} * a.group;
  const int64_t unit = kv_unit_bytes(kDtype<T>, a.head_dim);
  float* q = a.scratch;
  float* scores = q + rows * padded;
  float* o = scores + rows * 32;
  float* o_total = o + rows * padded;
  const int64_t lanes = (rows + 15) / 16 * 16;
  float* largest = o_total + rows * padded;  // the running softmax, as in RowState
  float* weight = largest + lanes;
  float* block_largest = weight + lanes;
  float* keep = block_largest + lanes;
  RowState* total = reinterpret_cast<RowState*>(keep + lanes);
  float* k_floats = keep + 3 * lanes;
  float* v_floats = k_floats + 32 * padded;

  for (int64_t r = 0; r < rows; ++r) {
    const float* from = a.q + r / a.group * a.q_stride + r % a.group * a.head_dim;
    for (int i = 0; i < a.head_dim; ++i) q[r * padded + i] = from[i] * a.scale;
  }

  using Rows = Sight::Rows;
  const Sight sight{a};
  const int64_t last = a.position + a.tokens - 1;
  const int64_t first_block = first_block_of(a), end = (a.segment + 1) * kSegmentBlocks;
  int64_t blocks = last / kBlockTokens + 1;
  if (a.segments != nullptr && end < blocks) blocks = end;
  if (first_block < blocks) {
    prefetch(block_of(a, first_block) + a.k_offset, unit);
    prefetch(block_of(a, first_block) + a.v_offset, unit);
  }
  for (int64_t block = first_block; block < blocks; ++block) {
    const int64_t begin = block * kBlockTokens, segment_begin = begin / kSegment * kSegment;
    if (block == first_block || begin == segment_begin) {
      const Rows fresh = sight.rows_that_see(segment_begin, kSegment);
      for (int64_t r = fresh.first; r < fresh.end; ++r) {
        largest[r] = kMinusInfinity;
        weight[r] = 0;
        for (int64_t i = 0; i < padded; i += 16) store(o + r * padded + i, splat(0));
      }
    }
    const Rows seeing = sight.rows_that_see(begin, kBlockTokens);
    const int64_t seen = seeing.end - seeing.first,
                  keys = last + 1 - begin < kBlockTokens ? last + 1 - begin : kBlockTokens;
    const char* const here = block_of(a, block);
    const T* k = reinterpret_cast<const T*>(here + a.k_offset);
    const T* v = reinterpret_cast<const T*>(here + a.v_offset);
    // A block's work is about as long as memory takes to answer.
    const char *k_ahead = here + a.k_offset, *v_ahead = here + a.v_offset;
    if (block + 1 < blocks) {
      k_ahead = block_of(a, block + 1) + a.k_offset;
      v_ahead = block_of(a, block + 1) + a.v_offset;
    } else if (a.next != nullptr) {
      const char* const there = block_of(*a.next, first_block_of(*a.next));
      k_ahead = there + a.next->k_offset;
      v_ahead = there + a.next->v_offset;
    }

    // With many rows it pays to turn the block into floats once; the numbers are the same.
    const bool unpack = sizeof(T) != sizeof(float) && seen > 12;
    if (unpack) {
      for (int64_t i = 0; i < 32 * a.head_dim; i += 16) store(k_floats + i, load_kv(k + i));
      for (int64_t i = 0; i < keys * padded; i += 16) store(v_floats + i, load_kv(v + i));
    }
    // a · (K or V), whichever form it has.
    float* s = scores + seeing.first * 32;
    const float* queries = q + seeing.first * padded;
    if (unpack)
      product<float>(seen, {queries, padded, k_floats, 32, a.head_dim, 32, nullptr, s, 32, k_ahead, unit});
    else
      product<T>(seen, {queries, padded, k, 32, a.head_dim, 32, nullptr, s, 32, k_ahead, unit});

    // The softmax goes over all rows step by step, so that no row waits for another's.
    for (int64_t r = seeing.first; r < seeing.end; ++r) {
      float* row = scores + r * 32;
      F32 first = load(row), second = load(row + 16);
      if constexpr (kScaled) {
        const float* scales = reinterpret_cast<const float*>(k + kBlockTokens * padded);
        first = mul(first, load(scales));
        second = mul(second, load(scales + 16));
      }
      const F32 hidden = splat(kMinusInfinity);
      const int64_t visible = sight.position(r) + 1 - begin, skipped = sight.first_key(r) - begin;
      if (visible < kBlockTokens) {
        first = select(first_lanes(visible), first, hidden);
        second = select(first_lanes(visible > 16 ? visible - 16 : 0), second, hidden);
      }
      if (skipped > 0) {
        first = select(first_lanes(skipped), hidden, first);
        second = select(first_lanes(skipped > 16 ? skipped - 16 : 0), hidden, second);
      }
      block_largest[r] = max_of(max(first, second));
      store(row, first);
      store(row + 16, second);
    }
    // c is exactly 1 where the largest score stays.
    for (int64_t r = seeing.first; r < seeing.end; r += 16) {
      const Mask rest = first_lanes(seeing.end - r);
      const F32 before = load(largest + r, rest), now = max(load(block_largest + r, rest), before);
      const F32 c = exp(sub(before, now));
      store(largest + r, now, rest);
      store(weight + r, mul(load(weight + r, rest), c), rest);
      store(keep + r, c, rest);
    }
    for (int64_t r = seeing.first; r < seeing.end; ++r) {
      float* row = scores + r * 32;
      F32 first = exp(sub(load(row), splat(largest[r])));
      F32 second = exp(sub(load(row + 16), splat(largest[r])));
      weight[r] += sum(add(first, second));
      if constexpr (kScaled) {
        const float* scales = reinterpret_cast<const float*>(v + kBlockTokens * padded);
        first = mul(first, load(scales));
        second = mul(second, load(scales + 16));
      }
      store(row, first);
      store(row + 16, second);
    }

    float* o_seeing = o + seeing.first * padded;
    if (unpack)
      product<float>(seen, {s, 32, v_floats, padded, keys, padded, keep + seeing.first, o_seeing, padded,
                            v_ahead, unit});
    else
      product<T>(seen,
                 {s, 32, v, padded, keys, padded, keep + seeing.first, o_seeing, padded, v_ahead, unit});

    if (begin + kBlockTokens < segment_begin + kSegment && block + 1 < blocks) continue;
    const Rows done = sight.rows_that_see(segment_begin, kSegment);
    for (int64_t r = done.first; r < done.end; ++r) {
      if (a.segments != nullptr) {
        float* to = a.segments + (a.segment * rows + r) * segment_floats(a.head_dim);
        for (int64_t i = 0; i < padded; i += 16) store(to + i, load(o + r * padded + i));
        to[padded] = largest[r];
        to[padded + 1] = weight[r];
      } else if (sight.first_key(r) < segment_begin) {
        merge(total[r], o_total + r * padded, {largest[r], weight[r]}, o + r * padded, padded);
      } else {  // the first segment the row sees
        total[r] = {largest[r], weight[r]};
        for (int64_t i = 0; i < padded; i += 16) store(o_total + r * padded + i, load(o + r * padded + i));
      }
    }
  }

  if (a.segments == nullptr)
    for (int64_t r = 0; r < rows; ++r) finish_row(a, r, total[r], o_total + r * padded);
}

// x made finite: within ±limit, and 0 for NaN.
inline float finite(float x, float limit) {
  return x > limit ? limit : x < -limit ? -limit : x == x ? x : 0.0f;
}
inline void put(float* p, float x) { *p = finite(x, 3.40282347e38f); }
inline void put(uint16_t* p, float x) { *p = to_f16(finite(x, 65504.0f)); }

template <class T>
void store_kv(const StoreKvArgs& a) {
  T* k = reinterpret_cast<T*>(a.k_base) + a.slot;
  T* v = reinterpret_cast<T*>(a.v_base) + a.slot * padded_head_dim(a.head_dim);
  for (int i = 0; i < a.head_dim; ++i) put(k + i * kBlockTokens, a.k[i]);
  for (int i = 0; i < a.head_dim; ++i) put(v + i, a.v[i]);
}

F32 finite(F32 x, float limit) {
  x = max(select(at_least(x, x), x, splat(0)), splat(-limit));
  return select(at_least(splat(limit), x), x, splat(limit));
}

// Quantises x [n] into codes `stride` bytes apart; returns their scale.
float quantise(const float* x, int64_t n, int8_t* codes, int64_t stride) {
  const auto numbers = [&](int64_t i) { return finite(load(x + i, first_lanes(n - i)), kQ8Limit); };
  F32 largest = splat(0);
  for (int64_t i = 0; i < n; i += 16) largest = max(largest, abs(numbers(i)));
  float d = max_of(largest) / 127.0f;
  if (d < 1e-36f) d = 0;  // 1/d would overflow
  const F32 inverse = splat(d > 0 ? 1.0f / d : 0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    int8_t bytes[16];
    store_bytes(bytes, to_int(mul(numbers(i), inverse)));
    for (int64_t j = i; j < n && j < i + 16; ++j) codes[j * stride] = bytes[j - i];
  }
  return d;
}

void store_q8(const StoreKvArgs& a) {
  const int64_t padded = padded_head_dim(a.head_dim), scales = kBlockTokens * padded;
  int8_t* k = reinterpret_cast<int8_t*>(a.k_base);
  int8_t* v = reinterpret_cast<int8_t*>(a.v_base);
  reinterpret_cast<float*>(k + scales)[a.slot] = quantise(a.k, a.head_dim, k + a.slot, kBlockTokens);
  reinterpret_cast<float*>(v + scales)[a.slot] = quantise(a.v, a.head_dim, v + a.slot * padded, 1);
}

template <class T>
void fill(Kernels& table, void (*store_one)(const StoreKvArgs&)) {
  table.attention[static_cast<int>(kDtype<T>)] = attention<T>;
  table.store_kv[static_cast<int>(kDtype<T>)] = store_one;
}

}  // namespace

void fill_attention(Kernels& table) {
  fill<float>(table, store_kv<float>);
  fill<uint16_t>(table, store_kv<uint16_t>);
  fill<int8_t>(table, store_q8);
  table.merge_segments = merge_segments;
}

}  // namespace hexad::HEXAD_NAMESPACE
