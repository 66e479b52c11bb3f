// The ops of a compiled program: each cuts its work into tasks for the team and calls kernels; no arithmetic
// here.
#pragma once

#include "program.h"

namespace hexad {

// Rows of each of the tiles that `rows` make: of the widths that use the registers well the one that leaves the fewest
// slots empty, where a tile costs what half a row does beside its rows.
constexpr int tile_width(int64_t rows) {
  if (rows <= kMaxTile) return static_cast<int>(rows);
  int best = kMaxTile;
  const auto cost = [rows](int width) { return (rows + width - 1) / width * (2 * width + 1); };
  for (int width = kMaxTile - 1; width >= 4; --width)
    if (cost(width) < cost(best)) best = width;
  return best;
}
constexpr int64_t kMaxBlockRows = 192;  // rows a panel passes over in one task; sizes Scratch::out

struct EmbedOp : Op {
  int weight, out;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

struct NormOp : Op {
  int x, weight, out;
  int64_t heads;
  float eps;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

// Norm → activation tiles (quantised, dense or both, as the projections' layouts need) → panels → epilogue.
struct LinearOp : Op {
  int x, norm, residual, out;
  float eps;
  std::vector<Projection> projections;
  Epilogue epilogue;
  float* head_out = nullptr;  // the logits' destination; rows are counted from `begin` there

  void run(Program& p, int member, int64_t begin, int64_t rows) override;

 private:
  struct Work;
  void prepare(Program& p, const Work& work, int member, int64_t tile) const;
  float* multiply(Program& p, const Work& work, int member, const Weight& w, int64_t panel, int64_t tile,
                  int64_t tile_count, int slot) const;
  void finish(Program& p, const Work& work, int member, int64_t unit, int64_t tile, int64_t tile_count) const;
};

struct RopeOp : Op {
  int x, rope, out;
  int64_t head_dim;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

// Fills the table of one rope for the batch's positions.
struct RopeTableOp : Op {
  int rope;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

struct GatedOp : Op {
  int gate, up, out;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

struct AddOp : Op {
  int a, b, out;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

// Norms and rotates q and k in place, writes k and v to the cache, then attends: a chunk reads its own keys back from
// there.
struct AttentionOp : Op {
  int q, k, v, rope, q_norm, k_norm, out, tiling;
  int64_t q_column, k_column, v_column, layer, heads, kv_heads, head_dim, window;
  float scale, norm_eps;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;

 private:
  void turn(Program& p, int64_t row, float* x, int64_t count, int norm) const;
};

struct TakeRowsOp : Op {
  int x, out;
  void run(Program& p, int member, int64_t begin, int64_t rows) override;
};

}  // namespace hexad
