// The kernel table: every loop that is compiled once per instruction set.
//
// A kernel is single-threaded, works on memory it is given and allocates nothing. Contracts stand in ops/*.h.
// This header is read by every ISA's translation units, so it holds plain data and no inline code.
#pragma once

#include <cstdint>

namespace hexad {

constexpr int kPanelRows = 32;      // weight rows per packed panel: two 16-lane vectors
constexpr int kGroup = 32;          // columns that share a scale, in weights and in activations
constexpr int kMaxTile = 6;         // batch rows in one activation tile
constexpr int kBlockTokens = 32;    // tokens per KV cache block
constexpr int kSegmentBlocks = 16;  // KV blocks per attention segment: 512 keys
constexpr int kLogitBlock = 256;    // logits that share a maximum

enum class KvDtype : int { kF32, kF16, kQ8, kCount };

// The packed layouts (formats/panels.h): Wn has codes of n bits, M minimums, K the scales of a K-quant.
enum class Layout : int {
  kW4,
  kW4M,
  kW5,
  kW5M,
  kW8,
  kW2K,
  kW3K,
  kW4K,
  kW5K,
  kW6K,
  kF16,
  kBF16,
  kF32,
  kCount
};

struct LinearArgs;     // ops/linear.h
struct AttentionArgs;  // ops/attention.h
struct StoreKvArgs;    // ops/attention.h
struct WeightSums;     // ops/logits.h
struct Moments;        // ops/logits.h

struct Kernels {
  const char* isa;

  // ops/linear.h; indexed by Layout. `quantised` multiplies int8 activation tiles (null for dense layouts), `dense`
  // float ones. pair_sums: whether int8 ones have `p`.
  bool pair_sums;
  void (*linear_quantised[static_cast<int>(Layout::kCount)])(const LinearArgs&);
  void (*linear_dense[static_cast<int>(Layout::kCount)])(const LinearArgs&);
  void (*gather_row[static_cast<int>(Layout::kCount)])(const void* panels, int64_t row, int64_t columns,
                                                       float* out);

  // ops/rows.h
  void (*norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*quantise)(const float* x, int64_t n, int slot, int width, void* tile, uint8_t* outliers);
  void (*quantise_rest)(const float* x, int slot, int width, const void* group, void* rest);
  void (*total)(int64_t groups, int width, void* tile);
  void (*interleave)(const float* x, int64_t n, int slot, int width, float* tile);
  void (*rotate)(float* head, const float* cosine, const float* sine, int64_t half);
  void (*gated_silu)(const float* gate, const float* up, int64_t n, float* out);
  void (*add)(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t n,
              float* out, int64_t out_stride);

  // ops/rows.h; what probes run.
  int64_t (*read)(const void* data, int64_t bytes);
  int64_t (*dot_rate)(int64_t iterations, int64_t* sink);

  // ops/attention.h; indexed by KvDtype.
  void (*attention[static_cast<int>(KvDtype::kCount)])(const AttentionArgs&);
  void (*merge_segments)(const AttentionArgs&);
  void (*store_kv[static_cast<int>(KvDtype::kCount)])(const StoreKvArgs&);

  // ops/logits.h
  void (*block_maxima)(const float* x, int64_t n, float* maxima);
  uint64_t (*at_least)(const float* x, int64_t n, float threshold);
  WeightSums (*weigh)(const float* x, int64_t n, float largest, float temperature, float floor, float* w);
  Moments (*moments)(const float* x, int64_t n, float floor, double centre);
  void (*mask)(const float* x, int64_t n, const uint32_t* bits, float* out);
};

// One per ISA that this build has; the only symbol its objects export beside the three parts it calls.
namespace generic {
void fill_kernels(Kernels& table);
}
namespace avx2 {
void fill_kernels(Kernels& table);
}
namespace avx512 {
void fill_kernels(Kernels& table);
}
namespace avx512vnni {
void fill_kernels(Kernels& table);
}
namespace neon {
void fill_kernels(Kernels& table);
}
namespace neoni8mm {
void fill_kernels(Kernels& table);
}

}  // namespace hexad
