#include "program_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/attention.h"
#include "ops/linear.h"

namespace hexad {
namespace {

// Activations of a block of rows, over which panel after panel passes. A strip of a panel multiplies a few KB of each
// tile, so they may well come from a cache that cores share; the more of them, the fewer strips are unpacked.
constexpr int64_t kBlockBytes = 2048 * 1024;

}  // namespace

void EmbedOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  const Weight& w = p.weight(weight);
  const auto gather = p.kernels_.gather_row[static_cast<int>(w.layout)];
  p.team_.loop(member, rows, [&](int64_t i) {
    gather(w.data, p.batch_.tokens[begin + i], w.columns, p.buffer(out).row(begin + i));
  });
}

void NormOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  const int64_t size = p.buffer(x).features / heads;
  p.team_.loop(member, rows, [&](int64_t i) {
    const float* from = p.buffer(x).row(begin + i);
    float* to = p.buffer(out).row(begin + i);
    for (int64_t h = 0; h < heads; ++h)
      p.kernels_.norm(from + h * size, p.vector(weight), eps, size, to + h * size);
  });
}

struct LinearOp::Work {
  int64_t begin, rows, columns;
  int width;
  int64_t tiles;
  int64_t quantised_stride, dense_stride;  // bytes per tile; 0 where that kind is not needed
  char* quantised;
  char* dense;
};

void LinearOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  if (rows == 0) return;
  Work work{};
  work.begin = begin;
  work.rows = rows;
  work.columns = p.buffer(x).features;
  work.width = tile_width(rows);
  work.tiles = (rows + work.width - 1) / work.width;
  for (const Projection& projection : projections) {
    if (p.quantises(p.weight(projection.weight)))
      work.quantised_stride = quantised_tile_bytes(work.columns, work.width, p.kernels_.pair_sums);
    else
      work.dense_stride = work.columns * work.width * static_cast<int64_t>(sizeof(float));
  }

  if (work.tiles == 1) {
    // One tile: every member makes its own copy, which is cheaper than meeting at a barrier.
    work.quantised = p.scratch_[at(member)].tile.get();
    work.dense = p.scratch_[at(member)].dense_tile.get();
    prepare(p, work, member, 0);
  } else {
    work.quantised = p.quantised_tiles_.get();
    work.dense = p.dense_tiles_.get();
    p.team_.loop(member, work.tiles, [&](int64_t tile) { prepare(p, work, member, tile); });
  }

  int64_t units = 0;
  for (const Projection& projection : projections) units += p.weight(projection.weight).panels();
  if (epilogue == Epilogue::kGated) units /= 2;
  // Of a quantised tile's room for outliers little is in use.
  const int64_t outliers = outlier_capacity(work.columns / kGroup, work.width) *
                           activation_group_bytes(work.width, p.kernels_.pair_sums);
  const int64_t tile_bytes = std::max(work.quantised_stride - outliers, work.dense_stride);
  const int64_t most = std::clamp<int64_t>(kBlockBytes / tile_bytes, 8, kMaxBlockRows / work.width);
  const int64_t blocks = (work.tiles + most - 1) / most, per_block = (work.tiles + blocks - 1) / blocks;
  p.team_.loop(member, blocks * units, [&](int64_t task) {
    const int64_t tile = task / units * per_block;
    finish(p, work, member, task % units, tile, std::min(per_block, work.tiles - tile));
  });
}

void LinearOp::prepare(Program& p, const Work& work, int member, int64_t tile) const {
  char* quantised = work.quantised + tile * work.quantised_stride;
  char* dense = work.dense + tile * work.dense_stride;
  const int64_t first = tile * work.width, count = std::min<int64_t>(work.width, work.rows - first);
  if (count < work.width) {  // slots without a row are zero
    std::memset(quantised, 0, at(work.quantised_stride));
    std::memset(dense, 0, at(work.dense_stride));
  }
  Scratch& scratch = p.scratch_[at(member)];
  const float* input[kMaxTile];
  for (int slot = 0; slot < count; ++slot) {
    input[slot] = p.buffer(x).row(work.begin + first + slot);
    if (norm < 0) continue;
    float* normed = scratch.rows.get() + slot * work.columns;
    p.kernels_.norm(input[slot], p.vector(norm), eps, work.columns, normed);
    input[slot] = normed;
  }
  if (work.quantised_stride) {
    const int64_t groups = work.columns / kGroup,
                  group_bytes = activation_group_bytes(work.width, p.kernels_.pair_sums);
    std::fill_n(scratch.outliers.begin(), groups, uint8_t{0});
    for (int slot = 0; slot < count; ++slot)
      p.kernels_.quantise(input[slot], work.columns, slot, work.width, quantised, scratch.outliers.data());
    p.kernels_.total(groups, work.width, quantised);
    auto* outlier_count = reinterpret_cast<int32_t*>(quantised + groups * group_bytes);
    char* rest = quantised + outlier_offset(groups, work.width, p.kernels_.pair_sums);
    *outlier_count = 0;
    for (int64_t g = 0; g < groups; ++g) {
      if (scratch.outliers[at(g)] == 0) continue;
      std::memset(rest, 0, at(group_bytes));
      for (int slot = 0; slot < count; ++slot)
        if (scratch.outliers[at(g)] >> slot & 1)
          p.kernels_.quantise_rest(input[slot] + g * kGroup, slot, work.width, quantised + g * group_bytes,
                                   rest);
      p.kernels_.total(1, work.width, rest);
      outlier_count[++*outlier_count] = static_cast<int32_t>(g);
      rest += group_bytes;
    }
  }
  if (work.dense_stride)
    for (int slot = 0; slot < count; ++slot)
      p.kernels_.interleave(input[slot], work.columns, slot, work.width, reinterpret_cast<float*>(dense));
}

float* LinearOp::multiply(Program& p, const Work& work, int member, const Weight& w, int64_t panel,
                          int64_t tile, int64_t tile_count, int slot) const {
  Scratch& scratch = p.scratch_[at(member)];
  const bool quantised = p.quantises(w);
  const int64_t stride = quantised ? work.quantised_stride : work.dense_stride;
  LinearArgs args{};
  args.panel = w.panel(panel);
  args.columns = work.columns;
  args.tiles = (quantised ? work.quantised : work.dense) + tile * stride;
  args.tile_stride = stride;
  args.tile_count = static_cast<int>(tile_count);
  args.width = work.width;
  args.out = scratch.out[slot].get();
  args.scratch = scratch.strip.get();
  (quantised ? p.kernels_.linear_quantised : p.kernels_.linear_dense)[static_cast<int>(w.layout)](args);
  return args.out;
}

void LinearOp::finish(Program& p, const Work& work, int member, int64_t unit, int64_t tile,
                      int64_t tile_count) const {
  const int64_t first = tile * work.width, count = std::min(tile_count * work.width, work.rows - first);
  // Which projection the unit falls into, and the output column where that projection begins.
  size_t index = 0;
  int64_t panel = unit, column = 0;
  while (epilogue != Epilogue::kGated && panel >= p.weight(projections[index].weight).panels()) {
    const Weight& passed = p.weight(projections[index++].weight);
    panel -= passed.panels();
    column += passed.rows;
  }
  const Weight& w = p.weight(projections[index].weight);
  const int64_t valid = std::min<int64_t>(kPanelRows, w.rows - panel * kPanelRows);
  column += panel * kPanelRows;

  float* product = multiply(p, work, member, w, panel, tile, tile_count, 0);
  const auto add_bias = [&](const Projection& projection, float* rows) {
    if (projection.bias < 0) return;
    const float* bias = p.vector(projection.bias) + panel * kPanelRows;
    p.kernels_.add(rows, kPanelRows, bias, 0, count, valid, rows, kPanelRows);
  };
  add_bias(projections[index], product);

  float* to = head_out ? head_out + first * w.rows : p.buffer(out).row(work.begin + first);
  const int64_t stride = head_out ? w.rows : p.buffer(out).features;
  switch (epilogue) {
    case Epilogue::kStore:
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(to + i * stride + column, product + i * kPanelRows, at(valid) * sizeof(float));
      break;
    case Epilogue::kAdd:
      p.kernels_.add(p.buffer(residual).row(work.begin + first) + column, p.buffer(residual).features,
                     product, kPanelRows, count, valid, to + column, stride);
      break;
    case Epilogue::kGated: {
      float* up = multiply(p, work, member, p.weight(projections[1].weight), panel, tile, tile_count, 1);
      add_bias(projections[1], up);
      for (int64_t i = 0; i < count; ++i)
        p.kernels_.gated_silu(product + i * kPanelRows, up + i * kPanelRows, valid, to + i * stride + column);
      break;
    }
  }
}

void RopeTableOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  const Program::Rope& table = p.ropes_[at(rope)];
  const int64_t half = static_cast<int64_t>(table.inv_freq.size());
  p.team_.loop(member, rows, [&](int64_t i) {
    float* to = table.table.get() + (begin + i) * 2 * half;
    const float position = static_cast<float>(p.row_position_[at(begin + i)]);
    for (int64_t j = 0; j < half; ++j) {
      const float angle = position * table.inv_freq[at(j)];
      to[j] = std::cos(angle) * table.magnitude;
      to[half + j] = std::sin(angle) * table.magnitude;
    }
  });
}

namespace {

void rotate_heads(Program& p, int rope, int64_t row, float* x, int64_t heads, int64_t head_dim) {
  const Program::Rope& table = p.ropes_[at(rope)];
  const int64_t half = static_cast<int64_t>(table.inv_freq.size());
  const float* cosine = table.table.get() + row * 2 * half;
  for (int64_t h = 0; h < heads; ++h) p.kernels_.rotate(x + h * head_dim, cosine, cosine + half, half);
}

}  // namespace

void RopeOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  const int64_t features = p.buffer(x).features;
  p.team_.loop(member, rows, [&](int64_t i) {
    float* to = p.buffer(out).row(begin + i);
    if (x != out) std::memcpy(to, p.buffer(x).row(begin + i), at(features) * sizeof(float));
    rotate_heads(p, rope, begin + i, to, features / head_dim, head_dim);
  });
}

void GatedOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  p.team_.loop(member, rows, [&](int64_t i) {
    p.kernels_.gated_silu(p.buffer(gate).row(begin + i), p.buffer(up).row(begin + i), p.buffer(gate).features,
                          p.buffer(out).row(begin + i));
  });
}

void AddOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  p.team_.loop(member, rows, [&](int64_t i) {
    p.kernels_.add(p.buffer(a).row(begin + i), 0, p.buffer(b).row(begin + i), 0, 1, p.buffer(a).features,
                   p.buffer(out).row(begin + i), 0);
  });
}

// Norms and rotates adjacent heads of a row.
void AttentionOp::turn(Program& p, int64_t row, float* x, int64_t count, int norm) const {
  for (int64_t h = 0; norm >= 0 && h < count; ++h)
    p.kernels_.norm(x + h * head_dim, p.vector(norm), norm_eps, head_dim, x + h * head_dim);
  if (rope >= 0) rotate_heads(p, rope, row, x, count, head_dim);
}

void AttentionOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  const Program::Cache& cache = p.cache_;
  const BatchView& batch = p.batch_;
  const int dtype = static_cast<int>(p.options_.kv_dtype);
  p.team_.loop(member, rows, [&](int64_t i) {
    const int64_t row = begin + i, position = p.row_position_[at(row)];
    float* keys = p.buffer(k).row(row) + k_column;
    const float* values = p.buffer(v).row(row) + v_column;
    turn(p, row, p.buffer(q).row(row) + q_column, heads, q_norm);
    turn(p, row, keys, kv_heads, k_norm);
    const int64_t block =
        batch.block_tables[p.row_seq_[at(row)] * batch.table_width + position / kBlockTokens];
    char* base = cache.data.get() + block * cache.block_bytes;
    for (int64_t h = 0; h < kv_heads; ++h) {
      StoreKvArgs args{};
      args.k = keys + h * head_dim;
      args.v = values + h * head_dim;
      args.head_dim = static_cast<int>(head_dim);
      args.slot = static_cast<int>(position % kBlockTokens);
      args.k_base = base + cache.k_offset(layer, h);
      args.v_base = base + cache.v_offset(layer, h);
      p.kernels_.store_kv[dtype](args);
    }
  });

  const Program::Tiling& cut = p.tilings_[at(tiling)];
  const int64_t group = heads / kv_heads;
  const auto args_of = [&](const Program::QueryTile& tile, int64_t head) {
    AttentionArgs args{};
    args.q = p.buffer(q).row(tile.row) + q_column + head * group * head_dim;
    args.q_stride = p.buffer(q).features;
    args.tokens = tile.tokens;
    args.group = static_cast<int>(group);
    args.head_dim = static_cast<int>(head_dim);
    args.position = p.row_position_[at(tile.row)];
    args.window = window;
    args.scale = scale;
    args.blocks = batch.block_tables + tile.seq * batch.table_width;
    args.cache = cache.data.get();
    args.block_stride = cache.block_bytes;
    args.k_offset = cache.k_offset(layer, head);
    args.v_offset = cache.v_offset(layer, head);
    args.out = p.buffer(out).row(tile.row) + head * group * head_dim;
    args.out_stride = p.buffer(out).features;
    args.scratch = p.scratch_[at(member)].attention.get();
    if (tile.segments > 0)
      args.segments = p.partials_.get() + tile.partial +
                      head * tile.segments * tile.tokens * group * segment_floats(head_dim);
    return args;
  };
  const auto task_of = [&](int64_t i) {
    const Program::QueryTask& task = cut.tasks[at(i / kv_heads)];
    AttentionArgs args = args_of(cut.tiles[at(task.tile)], i % kv_heads);
    args.segment = task.segment;
    return args;
  };
  // Tiles, and so tasks, are in the order of rows, and the last ones may have been given up.
  const auto within = [&](int32_t tile) { return cut.tiles[at(tile)].row < begin + rows; };
  const int64_t tasks =
      kv_heads * (std::partition_point(cut.tasks.begin(), cut.tasks.end(),
                                       [&](const Program::QueryTask& task) { return within(task.tile); }) -
                  cut.tasks.begin());
  p.team_.loop(member, tasks, [&](int64_t i) {
    AttentionArgs args = task_of(i), next{};
    if (i + 1 < tasks) {
      next = task_of(i + 1);
      args.next = &next;
    }
    p.kernels_.attention[dtype](args);
  });
  const int64_t split = std::partition_point(cut.split.begin(), cut.split.end(), within) - cut.split.begin();
  if (split == 0) return;
  p.team_.loop(member, split * kv_heads, [&](int64_t i) {
    p.kernels_.merge_segments(args_of(cut.tiles[at(cut.split[at(i / kv_heads)])], i % kv_heads));
  });
}

void TakeRowsOp::run(Program& p, int member, int64_t begin, int64_t rows) {
  const int64_t features = p.buffer(x).features;
  p.team_.loop(member, rows, [&](int64_t i) {
    std::memcpy(p.buffer(out).row(begin + i), p.buffer(x).row(p.batch_.sample_rows[begin + i]),
                at(features) * sizeof(float));
  });
}

}  // namespace hexad
