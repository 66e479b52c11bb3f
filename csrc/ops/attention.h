// Paged attention of one KV head over one sequence, and the store into the cache that precedes it.
//
// Cache: [block][layer][K|V][kv head][32 tokens]. Within a (block, layer, head), K is [padded head_dim][32 tokens]
// (one query element times 32 adjacent keys needs no horizontal sum) and V is [32 tokens][padded head_dim].
// head_dim is padded to a multiple of 32; padding stays zero. What is stored is finite: infinities become the
// largest number of the cache's type and NaNs 0, since a masked weight of 0 would carry them to other rows.
// In q8 the numbers are int8 codes, and 32 float scales follow those of K and those of V, one per token, quantised
// as ops/rows.h quantises a group: d = max|x| / 127 (0 if below 1e-36), code = x / d rounded to nearest even.
// Its largest number is 3.4e38, so that 127 · d is finite.
//
// Definition, the same for every tile of rows, so that prefill, chunks and decode agree bitwise. A row at position p
// sees the keys max(0, p − window + 1) … p. They lie in segments of 512 and in these in blocks of 32, both at
// multiples of their size whatever the row sees; it takes part in those in which it sees a key. In a segment, from
// m = −∞, l = 0 and o = 0 on, for each such block in order, with s_t = −∞ for keys the row does not see:
//     s_t = fma chain of (scale · q_d, k_td), d ascending
//     m' = max(m, max s);  c = exp(m − m');  p_t = exp(s_t − m')
//     l ← l · c + Σp, the two 16-lane halves added, then a fixed tree
//     o ← fma chain of (p_t, v_t), t ascending, from o · c
//   segments are merged left to right with the same rescaling; the result is o / l.
// In q8, k and v are codes; the chain of s_t is then multiplied by the scale of k_t, and the chain of o takes
// p_t times the scale of v_t. What a row does not see never influences it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hexad {

struct AttentionArgs {
  const float* q;    // [tokens][q_stride], the group's query heads adjacent
  int64_t q_stride;  // floats
  int tokens;        // query tokens in this tile
  int group;         // query heads that share this KV head
  int head_dim;
  int64_t position;  // of the first query token
  int64_t window;    // keys a row sees; kNoWindow: all up to its own
  float scale;
  const int32_t* blocks;  // block numbers of the sequence; those that no row sees are not read
  const char* cache;      // start of the pool
  int64_t block_stride;   // bytes
  int64_t k_offset;       // bytes from a block's start to this layer's and head's K
  int64_t v_offset;
  float* out;          // [tokens][out_stride]
  int64_t out_stride;  // floats
  float* scratch;      // attention_scratch_floats(tokens · group, head_dim)
  // Where a tile's segments are computed apart: the one to compute, and [segments][rows][segment_floats(head_dim)]
  // for what comes of it, which `merge_segments` then makes the output of. Null: all are computed and merged.
  int64_t segment;
  float* segments;
  const AttentionArgs* next;  // what is likely to come after it, whose first K and V it asks for; or null
};

struct StoreKvArgs {
  const float* k;  // [head_dim], already rotated
  const float* v;
  int head_dim;
  int slot;      // token within the block
  char* k_base;  // this block's, layer's and head's K and V
  char* v_base;
};

constexpr float kQ8Limit = 3.4e38f;
constexpr int64_t kNoWindow = int64_t{1} << 31;  // positions are int32

static constexpr int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

// What is kept of a row's segment: o, then m and l.
static constexpr int64_t segment_floats(int64_t head_dim) { return padded_head_dim(head_dim) + 16; }

// Bytes of one head's K (or V) in a block.
static constexpr int64_t kv_unit_bytes(KvDtype dtype, int64_t head_dim) {
  const int64_t numbers = kBlockTokens * padded_head_dim(head_dim);
  return dtype == KvDtype::kF32   ? 4 * numbers
         : dtype == KvDtype::kF16 ? 2 * numbers
                                  : numbers + 4 * kBlockTokens;
}

// Rows (query tokens × heads of a group) a tile aims at: enough for register tiles, few enough for L1.
constexpr int kAttentionRows = 48;

static constexpr int64_t attention_scratch_floats(int64_t rows, int64_t head_dim) {
  int64_t padded = padded_head_dim(head_dim);
  return rows * (3 * padded + 32) + (rows + 15) / 16 * 16 * 6 + 2 * 32 * padded;
}

}  // namespace hexad
