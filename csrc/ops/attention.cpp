// Attention over the paged cache; compiled once per ISA. Definition in ops/attention.h.

#include "ops/attention.h"

#include "ops/table.h"
#include "simd/simd.h"

namespace hexad::HEXAD_NAMESPACE {
namespace {

inline F32 load_kv(const float* p) { return load(p); }
inline F32 load_kv(const uint16_t* p) { return load_f16(p); }

// c[r][0..31] ← (resume ? c : 0) + Σ_i a[r][i] · b[i][0..31], i ascending, for R rows: both products of
// attention.
template <int R, class T>
void product(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t n, bool resume, float* c,
             int64_t c_stride) {
  F32 sums[R][2];
  HEXAD_UNROLL
  for (int r = 0; r < R; ++r) {
    sums[r][0] = resume ? load(c + r * c_stride) : splat(0);
    sums[r][1] = resume ? load(c + r * c_stride + 16) : splat(0);
  }
  for (int64_t i = 0; i < n; ++i) {
    F32 first = load_kv(b + i * b_stride), second = load_kv(b + i * b_stride + 16);
    HEXAD_UNROLL
    for (int r = 0; r < R; ++r) {
      F32 x = splat(a[r * a_stride + i]);
      sums[r][0] = fma(x, first, sums[r][0]);
      sums[r][1] = fma(x, second, sums[r][1]);
    }
  }
  HEXAD_UNROLL
  for (int r = 0; r < R; ++r) {
    store(c + r * c_stride, sums[r][0]);
    store(c + r * c_stride + 16, sums[r][1]);
  }
}

template <class T>
void product_rows(int64_t rows, const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t n,
                  bool resume, float* c, int64_t c_stride) {
  for (; rows >= 6; rows -= 6, a += 6 * a_stride, c += 6 * c_stride)
    product<6>(a, a_stride, b, b_stride, n, resume, c, c_stride);
  switch (rows) {
    case 5:
      return product<5>(a, a_stride, b, b_stride, n, resume, c, c_stride);
    case 4:
      return product<4>(a, a_stride, b, b_stride, n, resume, c, c_stride);
    case 3:
      return product<3>(a, a_stride, b, b_stride, n, resume, c, c_stride);
    case 2:
      return product<2>(a, a_stride, b, b_stride, n, resume, c, c_stride);
    case 1:
      return product<1>(a, a_stride, b, b_stride, n, resume, c, c_stride);
  }
}

void scale_row(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(x + i, mul(load(x + i), splat(factor)));
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
template <class T>
void prefetch(const T* p, int64_t padded) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kBlockTokens * padded; i += kLine) __builtin_prefetch(p + i);
}

template <class T>
void attention(const AttentionArgs& a) {
  const int64_t padded = padded_head_dim(a.head_dim), rows = int64_t{a.tokens} * a.group;
  float* q = a.scratch;
  float* scores = q + rows * padded;
  float* o = scores + rows * 32;
  float* o_total = o + rows * padded;
  RowState* state = reinterpret_cast<RowState*>(o_total + rows * padded);
  RowState* total = state + rows;
  float* unpacked = reinterpret_cast<float*>(total + rows);

  for (int64_t r = 0; r < rows; ++r) {
    const float* from = a.q + r / a.group * a.q_stride + r % a.group * a.head_dim;
    for (int i = 0; i < a.head_dim; ++i) q[r * padded + i] = from[i] * a.scale;
  }

  const int64_t last = a.position + a.tokens - 1, blocks = last / kBlockTokens + 1;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlockTokens;
    // Rows before the block's first key do not see it.
    const int64_t first_row = begin > a.position ? (begin - a.position) * a.group : 0;
    const int64_t seen = rows - first_row,
                  keys = last + 1 - begin < kBlockTokens ? last + 1 - begin : kBlockTokens;
    if (block % kSegmentBlocks == 0) {
      for (int64_t r = first_row; r < rows; ++r) {
        state[r] = {kMinusInfinity, 0};
        for (int64_t i = 0; i < padded; i += 16) store(o + r * padded + i, splat(0));
      }
    }
    const auto in_block = [&](int64_t b, int64_t offset) {
      return reinterpret_cast<const T*>(a.cache + a.blocks[b] * a.block_stride + offset);
    };
    const T *k = in_block(block, a.k_offset), *v = in_block(block, a.v_offset);
    prefetch(v, padded);
    float* s = scores + first_row * 32;
    float* weighted = o + first_row * padded;

    // With many rows it pays to turn the block into floats once; the numbers are the same.
    const bool unpack = sizeof(T) != sizeof(float) && seen > 12;
    float* k_floats = unpacked;
    float* v_floats = unpacked + 32 * padded;
    if (unpack) {
      for (int64_t i = 0; i < 32 * a.head_dim; i += 16) store(k_floats + i, load_kv(k + i));
      for (int64_t i = 0; i < keys * padded; i += 16) store(v_floats + i, load_kv(v + i));
      product_rows(seen, q + first_row * padded, padded, k_floats, 32, a.head_dim, false, s, 32);
    } else {
      product_rows(seen, q + first_row * padded, padded, k, 32, a.head_dim, false, s, 32);
    }

    for (int64_t r = first_row; r < rows; ++r) {
      float* row = scores + r * 32;
      F32 first = load(row), second = load(row + 16);
      const int64_t visible = a.position + r / a.group + 1 - begin;
      if (visible < kBlockTokens) {
        first = select(first_lanes(visible), first, splat(kMinusInfinity));
        second = select(first_lanes(visible > 16 ? visible - 16 : 0), second, splat(kMinusInfinity));
      }
      const float block_largest = max_of(max(first, second));
      const float largest = block_largest > state[r].largest ? block_largest : state[r].largest;
      first = exp(sub(first, splat(largest)));
      second = exp(sub(second, splat(largest)));
      store(row, first);
      store(row + 16, second);
      // Where the largest score stays, c is exactly 1; on the first block there is nothing to rescale yet.
      float kept = state[r].weight;
      if (largest > state[r].largest && kept > 0) {
        const float keep = exp_of(state[r].largest - largest);
        kept *= keep;
        scale_row(o + r * padded, keep, padded);
      }
      state[r] = {largest, kept + sum(add(first, second))};
    }

    if (block + 1 < blocks) prefetch(in_block(block + 1, a.k_offset), padded);
    for (int64_t column = 0; column < padded; column += 32) {
      if (unpack)
        product_rows(seen, s, 32, v_floats + column, padded, keys, true, weighted + column, padded);
      else
        product_rows(seen, s, 32, v + column, padded, keys, true, weighted + column, padded);
    }

    const int64_t segment = block / kSegmentBlocks;
    const bool ends = (block + 1) % kSegmentBlocks == 0 || block + 1 == blocks;
    if (!ends) continue;
    const int64_t segment_begin = segment * kSegmentBlocks * kBlockTokens;
    const int64_t first_in_segment = segment_begin > a.position ? (segment_begin - a.position) * a.group : 0;
    for (int64_t r = first_in_segment; r < rows; ++r) {
      if (segment == 0) {
        total[r] = state[r];
        for (int64_t i = 0; i < padded; i += 16) store(o_total + r * padded + i, load(o + r * padded + i));
      } else {
        merge(total[r], o_total + r * padded, state[r], o + r * padded, padded);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    float* to = a.out + r / a.group * a.out_stride + r % a.group * a.head_dim;
    const float factor = 1.0f / total[r].weight;
    for (int64_t i = 0; i < a.head_dim; i += 16) {
      Mask m = first_lanes(a.head_dim - i);
      store(to + i, mul(load(o_total + r * padded + i), splat(factor)), m);
    }
  }
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

}  // namespace

void fill_attention(Kernels& table) {
  table.attention[0] = attention<float>;
  table.attention[1] = attention<uint16_t>;
  table.store_kv[0] = store_kv<float>;
  table.store_kv[1] = store_kv<uint16_t>;
}

}  // namespace hexad::HEXAD_NAMESPACE
