#include "program.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "cpu_features.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "program_ops.h"

namespace hexad {
namespace {

constexpr int64_t kLogitRows = 32;  // rows whose logits exist at a time
constexpr int64_t kPartialFloats = int64_t{1}
                                   << 21;  // for attention over segments; what goes beyond is not split
constexpr int64_t kSplitShare = 4;         // an attention task of more than 1/4 of a member's work is split
constexpr int64_t kMaximaTasks = 16;       // parts of a row whose maxima are found by different members
// A step is late once it is behind by this share of what it should take in all, as if all ops took the same; towards its
// end nothing is won by giving rows up.
constexpr double kLate = 0.15, kWorthGivingUp = 0.9;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// Makes its message in any case; loops over a batch call fail instead.
void require(bool holds, const std::string& message) {
  if (!holds) fail(message);
}

// A product of sizes, both within what a model can have.
int64_t product(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) throw std::bad_alloc();
  return result;
}

constexpr int64_t kMost = int64_t{1} << 31;  // of features, heads, layers, rows

}  // namespace

std::vector<OpTime> Timer::times() const {
  std::vector<OpTime> times(members_.front().size());
  for (size_t part = 0; part < times.size(); ++part) {
    const Sums& first = members_.front()[part];  // takes part in every run
    double waited = 0;
    for (const std::vector<Sums>& sums : members_) waited += static_cast<double>(sums[part].waited);
    // While the caller has no CPU others wait, which belongs to no op of its own.
    const auto ns = static_cast<double>(first.ns);
    waited = std::min(waited / static_cast<double>(members_.size()), ns);
    times[part] = {first.runs, first.barriers, 1e-9 * ns, 1e-9 * waited};
  }
  return times;
}

Program::Program(const Options& options)
    : kernels_(kernels_for(options.isa)), options_(options), team_(options.threads, options.cpus) {
  require(options.threads >= 1 && options.threads <= 1024, "threads must be between 1 and 1024");
  require(options.max_rows >= 1 && options.max_seqs >= 1 && options.kv_blocks >= 1,
          "limits must be positive");
}

Program::~Program() = default;

int Program::add_vector(const float* values, int64_t n) {
  vectors_.emplace_back(values, values + n);
  return static_cast<int>(vectors_.size()) - 1;
}

int Program::add_buffer(int64_t features) {
  require(!sealed_, "the program is sealed");
  require(features > 0 && features < kMost, "a buffer of " + std::to_string(features) + " features");
  buffers_.push_back({features, allocate<float>(at(product(options_.max_rows, features)))});
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::add_rope(const float* inv_freq, int64_t half, float magnitude) {
  require(half > 0 && !sampled_domain_, "a rope needs frequencies and stands before take_rows");
  ropes_.push_back(
      {{inv_freq, inv_freq + half}, magnitude, allocate<float>(at(options_.max_rows * 2 * half))});
  auto op = std::make_unique<RopeTableOp>();
  op->rope = static_cast<int>(ropes_.size()) - 1;
  add_op(std::move(op));
  return static_cast<int>(ropes_.size()) - 1;
}

void Program::set_cache(int64_t layers, int64_t kv_heads, int64_t head_dim) {
  require(cache_.layers == 0 && !sealed_, "the cache is set once, before the program is sealed");
  for (int64_t size : {layers, kv_heads, head_dim})
    require(size > 0 && size < (1 << 20), "a cache of " + std::to_string(layers) + " layers, " +
                                              std::to_string(kv_heads) + " KV heads of " +
                                              std::to_string(head_dim));
  cache_.layers = layers;
  cache_.kv_heads = kv_heads;
  cache_.head_dim = head_dim;
  cache_.unit = kv_unit_bytes(options_.kv_dtype, head_dim);
  cache_.block_bytes = product(product(layers * 2, kv_heads), cache_.unit);
  cache_.data = allocate<char>(at(product(options_.kv_blocks, cache_.block_bytes)));
}

int Program::check_buffer(int buffer, int64_t features, const char* what) const {
  require(buffer >= 0 && at(buffer) < buffers_.size(), std::string(what) + ": no such buffer");
  const int64_t has = buffers_[at(buffer)].features;
  require(features < 0 || has == features, std::string(what) + " has " + std::to_string(has) + " features; " +
                                               std::to_string(features) + " expected");
  return buffer;
}

void Program::check_vector(int vector, int64_t n, const char* what) const {
  if (vector < 0) return;
  require(at(vector) < vectors_.size(), std::string(what) + ": no such vector");
  const auto has = vectors_[at(vector)].size();
  require(has == at(n), std::string(what) + " has " + std::to_string(has) + " elements; " +
                            std::to_string(n) + " expected");
}

const Weight& Program::check_weight(int weight) const {
  require(weight >= 0 && at(weight) < weights_.size(), "no such weight");
  return weights_[at(weight)];
}

void Program::add_op(std::unique_ptr<Op> op) {
  require(!sealed_, "the program is sealed");
  op->sampled = sampled_domain_;
  ops_.push_back(std::move(op));
}

void Program::op_embed(int weight, int out) {
  auto op = std::make_unique<EmbedOp>();
  op->weight = weight;
  op->out = check_buffer(out, check_weight(weight).columns, "embed's output");
  const int64_t rows = this->weight(weight).rows;
  vocabulary_ = vocabulary_ > 0 ? std::min(vocabulary_, rows) : rows;
  add_op(std::move(op));
}

void Program::op_norm(int x, int weight, float eps, int64_t heads, int out) {
  auto op = std::make_unique<NormOp>();
  op->x = check_buffer(x, -1, "norm's input");
  require(weight >= 0, "norm needs a weight");
  require(heads > 0 && buffer(x).features % heads == 0, "norm's " + std::to_string(buffer(x).features) +
                                                            " features are no " + std::to_string(heads) +
                                                            " equal heads");
  check_vector(weight, buffer(x).features / heads, "norm's weight");
  op->weight = weight;
  op->heads = heads;
  op->eps = eps;
  op->out = check_buffer(out, buffer(x).features, "norm's output");
  add_op(std::move(op));
}

void Program::op_linear(int x, int norm, float eps, std::vector<Projection> projections, Epilogue epilogue,
                        int residual, int out) {
  auto op = std::make_unique<LinearOp>();
  op->x = check_buffer(x, -1, "linear's input");
  const int64_t columns = buffer(x).features;
  check_vector(norm, columns, "linear's norm");
  require(!projections.empty(), "linear needs a projection");
  int64_t features = 0;
  for (const Projection& projection : projections) {
    const Weight& w = check_weight(projection.weight);
    require(w.columns == columns, "linear's weight has " + std::to_string(w.columns) + " columns; " +
                                      std::to_string(columns) + " expected");
    check_vector(projection.bias, w.rows, "linear's bias");
    features += w.rows;
  }
  if (epilogue == Epilogue::kGated) {
    require(
        projections.size() == 2 && weight(projections[0].weight).rows == weight(projections[1].weight).rows,
        "a gated linear has two projections of equal size");
    features /= 2;
  }
  require(epilogue != Epilogue::kAdd || projections.size() == 1, "linear with a residual has one projection");
  op->norm = norm;
  op->eps = eps;
  op->projections = std::move(projections);
  op->epilogue = epilogue;
  op->residual = epilogue == Epilogue::kAdd ? check_buffer(residual, features, "linear's residual") : -1;
  op->out = check_buffer(out, features, "linear's output");
  require(op->out != op->x, "linear cannot write its own input");
  add_op(std::move(op));
}

void Program::op_rope(int x, int rope, int64_t head_dim, int out) {
  auto op = std::make_unique<RopeOp>();
  op->x = check_buffer(x, -1, "rope's input");
  require(rope >= 0 && at(rope) < ropes_.size(), "no such rope");
  require(head_dim > 0 && buffer(x).features % head_dim == 0 &&
              2 * static_cast<int64_t>(ropes_[at(rope)].inv_freq.size()) <= head_dim,
          "rope turns heads of " + std::to_string(head_dim) +
              ", which does not fit its input or its frequencies");
  require(!sampled_domain_, "rope stands before take_rows");
  op->rope = rope;
  op->head_dim = head_dim;
  op->out = check_buffer(out, buffer(x).features, "rope's output");
  add_op(std::move(op));
}

void Program::op_gated(int gate, int up, int out) {
  auto op = std::make_unique<GatedOp>();
  op->gate = check_buffer(gate, -1, "gated's gate");
  op->up = check_buffer(up, buffer(gate).features, "gated's up");
  op->out = check_buffer(out, buffer(gate).features, "gated's output");
  add_op(std::move(op));
}

void Program::op_add(int a, int b, int out) {
  auto op = std::make_unique<AddOp>();
  op->a = check_buffer(a, -1, "add's input");
  op->b = check_buffer(b, buffer(a).features, "add's input");
  op->out = check_buffer(out, buffer(a).features, "add's output");
  add_op(std::move(op));
}

void Program::op_attention(int q, int64_t q_column, int k, int64_t k_column, int v, int64_t v_column,
                           int rope, int q_norm, int k_norm, float norm_eps, int64_t layer, int64_t heads,
                           int64_t kv_heads, int64_t head_dim, float scale, int64_t window, int out) {
  require(cache_.layers > 0 && layer >= 0 && layer < cache_.layers && kv_heads == cache_.kv_heads &&
              head_dim == cache_.head_dim && heads > 0 && heads % kv_heads == 0,
          "attention of layer " + std::to_string(layer) + ", " + std::to_string(heads) + " heads on " +
              std::to_string(kv_heads) + " of " + std::to_string(head_dim) + " does not fit the cache of " +
              std::to_string(cache_.layers) + " layers, " + std::to_string(cache_.kv_heads) + " heads of " +
              std::to_string(cache_.head_dim));
  require(!sampled_domain_, "attention stands before take_rows");
  require(window >= 0, "attention's window of " + std::to_string(window) + " keys; 0 is none");
  check_vector(q_norm, head_dim, "attention's query norm");
  check_vector(k_norm, head_dim, "attention's key norm");
  auto op = std::make_unique<AttentionOp>();
  const auto inside = [&](int value, int64_t column, int64_t count, const char* what) {
    check_buffer(value, -1, what);
    require(column >= 0 && column + count * head_dim <= buffer(value).features,
            std::string(what) + " is too narrow");
    return value;
  };
  op->q = inside(q, q_column, heads, "attention's query");
  op->k = inside(k, k_column, kv_heads, "attention's key");
  op->v = inside(v, v_column, kv_heads, "attention's value");
  require(rope < 0 || (at(rope) < ropes_.size() &&
                       2 * static_cast<int64_t>(ropes_[at(rope)].inv_freq.size()) <= head_dim),
          "attention's rope does not fit");
  const auto apart = [&](int a, int64_t a_column, int64_t a_heads, int b, int64_t b_column, int64_t b_heads) {
    return a != b || a_column + a_heads * head_dim <= b_column || b_column + b_heads * head_dim <= a_column;
  };
  require(
      (rope < 0 && q_norm < 0 && k_norm < 0) || (apart(q, q_column, heads, k, k_column, kv_heads) &&
                                                 apart(q, q_column, heads, v, v_column, kv_heads) &&
                                                 apart(k, k_column, kv_heads, v, v_column, kv_heads)),
      "attention norms and rotates queries and keys in place, so queries, keys and values must lie apart");
  op->q_column = q_column;
  op->k_column = k_column;
  op->v_column = v_column;
  op->rope = rope;
  op->q_norm = q_norm;
  op->k_norm = k_norm;
  op->norm_eps = norm_eps;
  op->layer = layer;
  op->heads = heads;
  op->kv_heads = kv_heads;
  op->head_dim = head_dim;
  op->scale = scale;
  op->window = window > 0 ? std::min(window, kNoWindow) : kNoWindow;
  op->out = check_buffer(out, heads * head_dim, "attention's output");
  require(op->out != q && op->out != k && op->out != v, "attention cannot write its own input");
  const int tokens = std::max<int>(1, kAttentionRows / static_cast<int>(heads / kv_heads));
  auto found =
      std::find_if(tilings_.begin(), tilings_.end(), [&](const Tiling& t) { return t.tokens == tokens; });
  op->tiling = static_cast<int>(found - tilings_.begin());
  if (found == tilings_.end()) tilings_.push_back({tokens, {}, {}, {}});
  add_op(std::move(op));
}

void Program::op_take_rows(int x, int out) {
  auto op = std::make_unique<TakeRowsOp>();
  op->x = check_buffer(x, -1, "take_rows' input");
  op->out = check_buffer(out, buffer(x).features, "take_rows' output");
  require(x != out && !sampled_domain_, "take_rows stands once and writes a buffer of its own");
  sampled_domain_ = true;
  add_op(std::move(op));
}

void Program::op_logits(int x, int norm, float eps, int weight) {
  require(head_ == nullptr && sampled_domain_ && !sealed_, "logits stand once, after take_rows");
  auto op = std::make_unique<LinearOp>();
  op->x = check_buffer(x, check_weight(weight).columns, "logits' input");
  check_vector(norm, buffer(x).features, "logits' norm");
  op->norm = norm;
  op->eps = eps;
  op->projections = {{weight, -1}};
  op->epilogue = Epilogue::kStore;
  op->residual = op->out = -1;
  head_weight_ = weight;
  head_ = std::move(op);
}

void Program::seal() {
  require(!sealed_ && !ops_.empty(), "a program is sealed once, with ops");
  int64_t widest = 1, attention = 1;
  for (const Buffer& b : buffers_) widest = std::max(widest, b.features);
  for (const auto& op : ops_)
    if (const auto* a = dynamic_cast<const AttentionOp*>(op.get())) {
      attention = std::max(
          attention,
          attention_scratch_floats(std::max<int64_t>(kAttentionRows, a->heads / a->kv_heads), a->head_dim));
      partial_floats_ = std::max(partial_floats_, a->heads * segment_floats(a->head_dim));
    }
  if (partial_floats_ > 0) partials_ = allocate<float>(kPartialFloats);
  const int64_t columns = (widest + kGroup - 1) / kGroup * kGroup;
  const int64_t dense_tile = columns * kMaxTile * static_cast<int64_t>(sizeof(float));
  int64_t quantised_bytes = 0, dense_bytes = 0;
  for (int width = 1; width <= kMaxTile; ++width) {
    const int64_t rows = width < 4 ? width : options_.max_rows, tiles = (rows + width - 1) / width;
    quantised_bytes =
        std::max(quantised_bytes, quantised_tile_bytes(columns, width, kernels_.pair_sums) * tiles);
    dense_bytes = std::max(dense_bytes, dense_tile / kMaxTile * width * tiles);
  }
  quantised_tiles_ = allocate<char>(at(quantised_bytes));
  dense_tiles_ = allocate<char>(at(dense_bytes));
  scratch_.resize(at(team_.size()));
  for (Scratch& s : scratch_) {
    s.rows = allocate<float>(at(columns * kMaxTile));
    s.tile = allocate<char>(at(quantised_tile_bytes(columns, kMaxTile, kernels_.pair_sums)));
    s.dense_tile = allocate<char>(at(dense_tile));
    s.outliers.resize(at(columns / kGroup));
    for (auto& out : s.out) out = allocate<float>(at(kMaxBlockRows * kPanelRows));
    s.strip = allocate<char>(kStripBytes);
    s.attention = allocate<float>(at(attention));
    if (head_) s.sampler.reserve(vocab());
  }
  if (head_) {
    logits_tile_ = allocate<float>(at(kLogitRows * vocab()));
    logits_maxima_ = allocate<float>(at(kLogitRows * logit_blocks(vocab())));
  }
  row_seq_.resize(at(options_.max_rows));
  row_position_.resize(at(options_.max_rows));
  sealed_ = true;
}

namespace {

// Has `loop` take the pages of memory in runs; what they hold stays.
template <class T, class Loop>
void touch(const Memory<T>& memory, Loop&& loop) {
  constexpr size_t kPage = 4096, kRun = size_t{1} << 21;
  const size_t bytes = memory ? memory.get_deleter().bytes : 0;
  volatile char* const data = reinterpret_cast<char*>(memory.get());
  loop((bytes + kRun - 1) / kRun, [=](int64_t run) {
    const size_t begin = at(run) * kRun, end = std::min(begin + kRun, bytes);
    for (size_t i = begin; i < end; i += kPage) data[i] = data[i];
  });
}

}  // namespace

void Program::prefault() {
  require(sealed_, "a program is prefaulted once it is sealed");
  const Call call(*this);
  team_.run([&](int member) {
    const auto shared = [&](size_t runs, auto&& body) {
      team_.loop(member, static_cast<int64_t>(runs), body);
    };
    const auto own = [](size_t runs, auto&& body) {
      for (size_t run = 0; run < runs; ++run) body(static_cast<int64_t>(run));
    };
    touch(cache_.data, shared);
    for (const Buffer& b : buffers_) touch(b.data, shared);
    for (const Rope& r : ropes_) touch(r.table, shared);
    for (const Memory<char>* m : {&quantised_tiles_, &dense_tiles_}) touch(*m, shared);
    for (const Memory<float>* m : {&partials_, &logits_tile_, &logits_maxima_}) touch(*m, shared);
    const Scratch& s = scratch_[at(member)];
    for (const Memory<char>* m : {&s.tile, &s.dense_tile, &s.strip}) touch(*m, own);
    for (const Memory<float>* m :
         {&s.rows, &s.out[0], &s.out[1], &s.attention, &s.sampler.x, &s.sampler.maxima, &s.sampler.bounds})
      touch(*m, own);
    touch(s.sampler.list, own);
    touch(s.sampler.marks, own);
    touch(s.sampler.masses, own);
  });
}

int64_t Program::vocab() const {
  require(head_weight_ >= 0, "the program has no logits");
  return weight(head_weight_).rows;
}

int64_t Program::hidden_size() const {
  require(head_weight_ >= 0, "the program has no logits");
  return weight(head_weight_).columns;
}

int64_t Program::weight_bytes() const {
  int64_t total = 0;
  for (const Weight& w : weights_) total += w.bytes();
  for (const auto& v : vectors_) total += static_cast<int64_t>(v.size() * sizeof(float));
  return total;
}

int64_t Program::workspace_bytes() const {
  const auto bytes = [](const auto& memory) { return static_cast<int64_t>(memory.get_deleter().bytes); };
  int64_t total = bytes(quantised_tiles_) + bytes(dense_tiles_) + bytes(partials_) + bytes(logits_tile_) +
                  bytes(logits_maxima_);
  for (const Buffer& b : buffers_) total += bytes(b.data);
  for (const Rope& rope : ropes_) total += bytes(rope.table);
  for (const Scratch& s : scratch_)
    total += bytes(s.rows) + bytes(s.tile) + bytes(s.dense_tile) + bytes(s.out[0]) + bytes(s.out[1]) +
             bytes(s.strip) + bytes(s.attention) + s.sampler.bytes();
  return total;
}

bool Program::forward(const BatchView& batch) {
  const Call call(*this);
  require(sealed_ && (packed_ || weights_.empty()), "the program is not sealed, or has no weights yet");
  require(batch.rows >= 1 && batch.rows <= options_.max_rows,
          "a step of " + std::to_string(batch.rows) + " rows; 1 to " + std::to_string(options_.max_rows) +
              " are planned for");
  require(batch.seqs >= 1 && batch.seqs <= options_.max_seqs,
          "a step of " + std::to_string(batch.seqs) + " sequences; 1 to " +
              std::to_string(options_.max_seqs) + " are planned for");
  require(batch.samples <= options_.max_rows, std::to_string(batch.samples) + " sample rows; at most " +
                                                  std::to_string(options_.max_rows) + " are planned for");
  require(batch.row_starts[0] == 0 && batch.row_starts[batch.seqs] == batch.rows,
          "row_starts do not cover the rows");
  for (int64_t i = 0; i < batch.rows && vocabulary_ > 0; ++i)
    if (batch.tokens[i] < 0 || batch.tokens[i] >= vocabulary_)
      fail("token " + std::to_string(batch.tokens[i]) + " is outside the vocabulary of " +
           std::to_string(vocabulary_));
  for (Tiling& tiling : tilings_) tiling.tiles.clear();
  for (int64_t s = 0; s < batch.seqs; ++s) {
    const int32_t begin = batch.row_starts[s], end = batch.row_starts[s + 1];
    require(begin >= 0 && begin < end && end <= batch.rows && batch.starts[s] >= 0,
            "a sequence without rows, beyond the batch, or before position 0");
    const int64_t last = int64_t{batch.starts[s]} + end - begin - 1;
    require(last / kBlockTokens < batch.table_width, "a block table is too short for its sequence");
    for (int64_t b = 0; b <= last / kBlockTokens; ++b) {
      const int32_t block = batch.block_tables[s * batch.table_width + b];
      if (block < 0 || block >= options_.kv_blocks)
        fail("KV block " + std::to_string(block) + " does not exist");
    }
    for (int32_t row = begin; row < end; ++row) {
      row_seq_[at(row)] = static_cast<int32_t>(s);
      row_position_[at(row)] = batch.starts[s] + row - begin;
    }
    for (Tiling& tiling : tilings_)
      for (int32_t row = begin; row < end; row += tiling.tokens)
        tiling.tiles.push_back({static_cast<int32_t>(s), row, std::min(tiling.tokens, end - row), 0, 0});
  }
  for (Tiling& tiling : tilings_) split(tiling);
  for (int64_t i = 0; i < batch.samples; ++i)
    if (batch.sample_rows[i] < (i > 0 ? batch.sample_rows[i - 1] : 0) || batch.sample_rows[i] >= batch.rows)
      fail("sample rows are not ascending rows of the batch");
  const int32_t *ends = batch.row_starts + 1, *last = ends + batch.seqs;
  require(std::find(ends, last, batch.needed) != last &&
              (batch.samples == 0 || batch.sample_rows[batch.samples - 1] < batch.needed),
          "the rows that can be given up are no whole sequences, or sampled");
  batch_ = batch;
  samples_ = batch.samples;
  // The caller looks at the clock as it begins an op, and what it decides holds from the next one on: all members have
  // met before that.
  const double count = static_cast<double>(ops_.size());
  const int64_t begin = now_ns();
  const auto late = [&](size_t op) {
    const double share = static_cast<double>(op) / count;
    return share < kWorthGivingUp &&
           1e-9 * static_cast<double>(now_ns() - begin) > (share + kLate) * batch.expected;
  };
  std::atomic<size_t> given_up{ops_.size()};
  team_.run([&](int member) {
    int64_t rows = batch.rows;
    for (size_t i = 0; i < ops_.size(); ++i) {
      if (given_up.load(std::memory_order_relaxed) <= i)
        rows = batch.needed;
      else if (member == 0 && rows > batch.needed && late(i))
        given_up.store(i + 1, std::memory_order_relaxed);
      timer_.time(team_, member, i,
                  [&] { ops_[i]->run(*this, member, 0, ops_[i]->sampled ? batch.samples : rows); });
    }
  });
  batch_ = {};
  return given_up >= ops_.size();
}

void Program::split(Tiling& tiling) {
  // What is worth splitting is a large part of what a member has to do; the work is that of one KV head.
  constexpr int64_t kSegment = int64_t{kSegmentBlocks} * kBlockTokens;
  const auto work = [&](const QueryTile& tile) {
    return int64_t{tile.tokens} * (row_position_[at(tile.row)] + tile.tokens);
  };
  int64_t total = 0, used = 0;
  for (const QueryTile& tile : tiling.tiles) total += work(tile);
  tiling.tasks.clear();
  tiling.split.clear();
  for (size_t i = 0; i < tiling.tiles.size(); ++i) {
    QueryTile& tile = tiling.tiles[i];
    const int64_t segments = (row_position_[at(tile.row)] + tile.tokens - 1) / kSegment + 1;
    const int64_t floats = segments * tile.tokens * partial_floats_;
    if (team_.size() > 1 && segments > 1 && used + floats <= kPartialFloats &&
        work(tile) * kSplitShare * team_.size() > total * cache_.kv_heads) {
      tile.segments = static_cast<int32_t>(segments);
      tile.partial = used;
      used += floats;
      tiling.split.push_back(static_cast<int32_t>(i));
    }
    for (int32_t segment = 0; segment < std::max(1, tile.segments); ++segment)
      tiling.tasks.push_back({static_cast<int32_t>(i), segment});
  }
}

void Program::check_head(int64_t rows) const {
  require(head_ != nullptr && sealed_, "the program has no logits");
  require(rows == samples_, "room or parameters for " + std::to_string(rows) + " rows; the last step has " +
                                std::to_string(samples_) + " sample rows");
}

void Program::run_head(int member, int64_t begin, int64_t rows) {
  timer_.time(team_, member, ops_.size(), [&] { head_->run(*this, member, begin, rows); });
}

std::vector<OpTime> Program::profile() {
  require(sealed_, "a program is profiled once it is sealed");
  const Call call(*this);
  if (!timer_.on()) timer_.begin(team_, ops_.size() + 2);
  std::vector<OpTime> times = timer_.times();
  times.push_back(calls_);
  return times;
}

void Program::logits(float* out, int64_t rows) {
  const Call call(*this);
  check_head(rows);
  for (int64_t begin = 0; begin < rows; begin += kLogitRows) {
    head_->head_out = out + begin * vocab();
    team_.run([&](int member) { run_head(member, begin, std::min(kLogitRows, rows - begin)); });
  }
}

void Program::hidden(float* out, int64_t rows) {
  const Call call(*this);
  check_head(rows);
  const int64_t size = hidden_size();
  team_.run([&](int member) {
    team_.loop(member, rows, [&](int64_t i) {
      const float* x = buffer(head_->x).row(i);
      if (head_->norm < 0)
        std::memcpy(out + i * size, x, at(size) * sizeof(float));
      else
        kernels_.norm(x, vector(head_->norm), head_->eps, size, out + i * size);
    });
  });
}

void Program::sample(const SampleBatch& wanted, const SampleOutput& output) {
  const Call call(*this);
  check_head(wanted.count);
  wanted.check(vocab());
  int64_t longest = 0;
  for (int64_t i = 0; i < wanted.count; ++i) {
    if (wanted.rows[i].num_logprobs > output.top_width)
      fail("no room for " + std::to_string(wanted.rows[i].num_logprobs) + " logprobs");
    if (wanted.rows[i].dry_multiplier != 0) longest = std::max(longest, wanted.history.length(i));
  }
  for (Scratch& s : scratch_)
    if (s.sampler.runs.size() < at(longest)) s.sampler.runs.resize(at(longest));
  const int64_t width = vocab(), blocks = logit_blocks(width);
  head_->head_out = logits_tile_.get();
  team_.run([&](int member) {
    for (int64_t begin = 0; begin < wanted.count; begin += kLogitRows) {
      const int64_t rows = std::min(kLogitRows, wanted.count - begin);
      bool wants = false;
      for (int64_t i = 0; i < rows; ++i) wants |= wanted.wants(begin + i);
      if (!wants) {
        team_.loop(member, rows, [&](int64_t i) { skip_row(wanted, begin + i, output); });
        continue;
      }
      run_head(member, begin, rows);
      timer_.time(team_, member, ops_.size() + 1, [&] {
        // By columns, as the panels were: a member finds most of what it reads in its own cache.
        team_.loop(member, kMaximaTasks * rows, [&](int64_t task) {
          const int64_t i = task % rows, part = task / rows;
          const int64_t from = blocks * part / kMaximaTasks, to = blocks * (part + 1) / kMaximaTasks;
          kernels_.block_maxima(logits_tile_.get() + i * width + from * kLogitBlock,
                                std::min(to * kLogitBlock, width) - from * kLogitBlock,
                                logits_maxima_.get() + i * blocks + from);
        });
        team_.loop(member, rows, [&](int64_t i) {
          sample_row(kernels_, logits_tile_.get() + i * width, logits_maxima_.get() + i * blocks, width,
                     wanted, begin + i, scratch_[at(member)].sampler, output);
        });
      });
    }
  });
}

void Program::copy_blocks(const int64_t* pairs, int64_t count) {
  const Call call(*this);
  for (int64_t i = 0; i < 2 * count; ++i)
    require(pairs[i] >= 0 && pairs[i] < options_.kv_blocks,
            "KV block " + std::to_string(pairs[i]) + " does not exist");
  for (int64_t i = 0; i < count; ++i)
    if (pairs[2 * i] != pairs[2 * i + 1])
      std::memcpy(cache_.data.get() + pairs[2 * i + 1] * cache_.block_bytes,
                  cache_.data.get() + pairs[2 * i] * cache_.block_bytes, at(cache_.block_bytes));
}

}  // namespace hexad
