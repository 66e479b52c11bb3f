// A compiled graph: a flat list of ops over buffers planned once, with its packed weights and KV cache.
//
// Build it op by op (backends/cpu lowers a graph to these calls), then `forward` runs all ops up to the
// logits over a ragged batch, and `logits` or `sample` finish the wanted rows in tiles of at most 32.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/pack.h"
#include "kernels.h"
#include "platform.h"
#include "sampler.h"
#include "thread_team.h"

namespace hexad {

struct Options {
  std::string isa;  // empty: the best here
  int threads = 1;
  std::vector<std::vector<int>> cpus = {};  // that each thread stays on; empty: left to the system
  bool quantised = true;                    // multiply quantised weights with int8 activations
  KvDtype kv_dtype = KvDtype::kF16;
  int64_t max_rows = 1;
  int64_t max_seqs = 1;
  int64_t kv_blocks = 1;
};

// One step's input; see backends/backend.py. Pointers need to live for the call only.
struct BatchView {
  const int32_t* tokens;
  int64_t rows;
  const int32_t* row_starts;
  const int32_t* starts;
  int64_t seqs;
  const int32_t* block_tables;
  int64_t table_width;
  const int32_t* sample_rows;
  int64_t samples;
  // Rows from `needed` on, of whole sequences and none of them sampled, are given up if the step is late; `expected`:
  // seconds that it should take.
  int64_t needed;
  double expected;
};

struct Weight {
  const Stored* stored;
  Layout layout;
  int64_t rows, columns;
  int64_t panel_bytes;
  char* data;  // in the program's memory for weights; null until they are packed

  int64_t panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int64_t bytes() const { return panels() * panel_bytes; }
  const char* panel(int64_t i) const { return data + i * panel_bytes; }
};

// A weight as a checkpoint stores it: its bytes, or where they lie in an open file.
struct Source {
  const uint8_t* data;  // null: in the file
  int64_t bytes;
  int file;
  int64_t start;
  const int64_t* order;  // of a file's rows: which of them each row of the weight is; null: as they lie
  int64_t order_size;
};

// Float rows [max_rows][features].
struct Buffer {
  int64_t features;
  Memory<float> data;
  float* row(int64_t i) const { return data.get() + i * features; }
};

struct Projection {
  int weight;
  int bias;  // vector, or −1
};

enum class Epilogue { kStore, kAdd, kGated };

inline size_t at(int64_t i) { return static_cast<size_t>(i); }

class Program;
struct LinearOp;

// Sums since timing began, of the caller's time. waited: what members spent at barriers meanwhile, a mean over all; who
// stays out of a run does not wait. barriers: met in all runs together.
struct OpTime {
  int64_t runs = 0, barriers = 0;
  double seconds = 0, waited = 0;
};

// Times what a team does part by part, if it is switched on.
class Timer {
 public:
  void begin(ThreadTeam& team, size_t parts) {
    members_.assign(static_cast<size_t>(team.size()), std::vector<Sums>(parts));
    team.time_waiting(true);
    on_ = true;
  }
  bool on() const { return on_; }

  // Calls f() on behalf of a member, as the given part.
  template <class F>
  void time(const ThreadTeam& team, int member, size_t part, F&& f) {
    if (!on_) return f();
    const ThreadTeam::Count before = team.count(member);
    const int64_t begin = now_ns();
    f();
    const ThreadTeam::Count& after = team.count(member);
    Sums& sums = members_[static_cast<size_t>(member)][part];
    sums.runs += 1;
    sums.ns += now_ns() - begin;
    sums.waited += after.waited - before.waited;
    sums.barriers += after.barriers - before.barriers;
  }
  std::vector<OpTime> times() const;

 private:
  struct Sums {
    int64_t runs = 0, ns = 0, waited = 0, barriers = 0;
  };
  std::vector<std::vector<Sums>> members_;  // a member's own array each: no two write to one cache line
  bool on_ = false;
};

// Per-member working memory, sized when the program is sealed.
struct Scratch {
  Memory<float> rows;             // normed rows of one tile
  Memory<char> tile;              // one quantised activation tile
  Memory<char> dense_tile;        // one dense one
  std::vector<uint8_t> outliers;  // per group, the slots whose row has an outlier there
  Memory<float> out[2];           // kernel output for a block of rows × one panel
  Memory<char> strip;             // kStripBytes
  Memory<float> attention;
  SamplerScratch sampler;
};

class Op {
 public:
  virtual ~Op() = default;
  // Runs on every member of the team. `begin`, `rows`: the rows of the op's domain to compute.
  virtual void run(Program& program, int member, int64_t begin, int64_t rows) = 0;
  bool sampled = false;  // its rows are the batch's sample rows, not all its tokens
};

class Program {
 public:
  explicit Program(const Options& options);
  ~Program();

  // Building. Each returns the number later calls name it by; std::invalid_argument for what does not fit.
  int add_weight(const std::string& stored, int64_t rows, int64_t columns);
  int add_vector(const float* values, int64_t n);
  int add_buffer(int64_t features);
  // `magnitude` multiplies cosines and sines.
  int add_rope(const float* inv_freq, int64_t half, float magnitude);
  void set_cache(int64_t layers, int64_t kv_heads, int64_t head_dim);

  void op_embed(int weight, int out);
  // Each of `heads` equal parts of a row is normed by itself, with the same weight.
  void op_norm(int x, int weight, float eps, int64_t heads, int out);
  void op_linear(int x, int norm, float eps, std::vector<Projection> projections, Epilogue epilogue,
                 int residual, int out);
  void op_rope(int x, int rope, int64_t head_dim, int out);
  void op_gated(int gate, int up, int out);
  void op_add(int a, int b, int out);
  // q_norm, k_norm: vectors [head_dim] for norms of each head before the rotation, or −1. window: keys a row
  // sees, its own included; 0: all up to its own.
  void op_attention(int q, int64_t q_column, int k, int64_t k_column, int v, int64_t v_column, int rope,
                    int q_norm, int k_norm, float norm_eps, int64_t layer, int64_t heads, int64_t kv_heads,
                    int64_t head_dim, float scale, int64_t window, int out);
  void op_take_rows(int x, int out);
  void op_logits(int x, int norm, float eps, int weight);
  void seal();
  // Fills all weights, once, in the order they were added. Throws ReadError where a file cannot be read.
  void pack(const std::vector<Source>& sources);
  // Touches the cache and all working memory, so that none of it is first taken while it runs.
  void prefault();

  // Running: one call at a time; a second one at once throws std::logic_error.
  // Returns whether all rows were computed. Of those given up, some of the KV has been written.
  bool forward(const BatchView& batch);
  // `rows` and `count` are what the caller made room for: the sample rows of the last forward.
  void logits(float* out, int64_t rows);
  void sample(const SampleBatch& wanted, const SampleOutput& output);
  // The sample rows as the logits' matrix takes them, after its norm [rows][hidden()].
  void hidden(float* out, int64_t rows);
  // Copies KV blocks, each pair a source and a destination, in order.
  void copy_blocks(const int64_t* pairs, int64_t count);

  // Times every op from the first call on, which costs a few µs a step. Returns, in this order, what the ops took
  // (a rope's table is an op), the logits, drawing tokens from them, and whole calls (`waited` is 0 there).
  std::vector<OpTime> profile();

  int64_t samples() const { return samples_; }
  int64_t vocab() const;
  int64_t hidden_size() const;
  int64_t weight_bytes() const;
  int64_t workspace_bytes() const;  // everything beside weights and cache
  const char* isa() const { return kernels_.isa; }
  int threads() const { return team_.size(); }

  // For the ops.
  struct Rope {
    std::vector<float> inv_freq;
    float magnitude;
    Memory<float> table;  // [max_rows][2][half]: cosines, then sines
  };
  // segments: of keys, where they are computed apart; 0: they are not. partial: their place in `partials_`.
  struct QueryTile {
    int32_t seq, row, tokens, segments;
    int64_t partial;
  };
  struct QueryTask {
    int32_t tile, segment;
  };
  // The batch cut into runs of at most `tokens` rows of one sequence, and these, where they are long and few, into
  // segments, so that there is enough for all members to do.
  struct Tiling {
    int tokens;
    std::vector<QueryTile> tiles;
    std::vector<QueryTask> tasks;
    std::vector<int32_t> split;  // tiles with segments
  };
  void split(Tiling& tiling);
  struct Cache {
    int64_t layers = 0, kv_heads = 0, head_dim = 0, unit = 0, block_bytes = 0;  // unit: bytes of one head's K
    Memory<char> data;
    int64_t k_offset(int64_t layer, int64_t head) const { return ((layer * 2) * kv_heads + head) * unit; }
    int64_t v_offset(int64_t layer, int64_t head) const { return ((layer * 2 + 1) * kv_heads + head) * unit; }
  };

  const Kernels& kernels_;
  const Options options_;
  ThreadTeam team_;
  std::vector<Weight> weights_;
  Memory<char> packed_;  // of all of them: one piece, for the sake of huge pages
  std::vector<std::vector<float>> vectors_;
  std::vector<Buffer> buffers_;
  std::vector<Rope> ropes_;
  std::vector<Tiling> tilings_;
  Cache cache_;
  std::vector<Scratch> scratch_;
  Memory<char> quantised_tiles_, dense_tiles_;  // activation tiles of all rows, shared by the team
  Memory<float> partials_;                      // attention over segments, for a layer at a time
  int64_t partial_floats_ = 0;                  // of one query row over all KV heads, the most of any layer
  BatchView batch_{};
  std::vector<int32_t> row_seq_, row_position_;

  const float* vector(int i) const { return i < 0 ? nullptr : vectors_[static_cast<size_t>(i)].data(); }
  Buffer& buffer(int i) { return buffers_[static_cast<size_t>(i)]; }
  const Weight& weight(int i) const { return weights_[static_cast<size_t>(i)]; }
  bool quantises(const Weight& w) const {
    return options_.quantised && kernels_.linear_quantised[static_cast<int>(w.layout)] != nullptr;
  }

 private:
  int check_buffer(int buffer, int64_t features, const char* what) const;
  void check_vector(int vector, int64_t n, const char* what) const;
  const Weight& check_weight(int weight) const;
  void check_head(int64_t rows) const;
  void run_head(int member, int64_t begin, int64_t rows);
  void add_op(std::unique_ptr<Op> op);

  // Holds the program for one call, and times it where that is wanted.
  class Call {
   public:
    explicit Call(Program& program) : program_(program) {
      if (program_.busy_.test_and_set(std::memory_order_acquire))
        throw std::logic_error("the program is busy: it takes one call at a time");
      if (program_.timer_.on()) begin_ = now_ns();
    }
    ~Call() {
      if (begin_ != 0) {
        program_.calls_.runs += 1;
        program_.calls_.seconds += 1e-9 * static_cast<double>(now_ns() - begin_);
      }
      program_.busy_.clear(std::memory_order_release);
    }

   private:
    Program& program_;
    int64_t begin_ = 0;
  };

  std::vector<std::unique_ptr<Op>> ops_;
  std::unique_ptr<LinearOp> head_;
  Timer timer_;
  OpTime calls_;
  int head_weight_ = -1;
  Memory<float> logits_tile_, logits_maxima_;
  int64_t samples_ = 0;
  int64_t vocabulary_ = 0;  // rows of the embedding table
  bool sampled_domain_ = false, sealed_ = false;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace hexad
