// Program's weights: read, packed and kept.

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>

#include "program.h"

namespace hexad {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // of rows and columns
constexpr int64_t kMostBytes = int64_t{1} << 56;
constexpr int64_t kPieceBytes =
    1 << 18;  // of a file read at a time: what stays in a core's L2 until it is packed
constexpr int64_t kAlignment = 64;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Consecutive panels of one weight.
struct Piece {
  const Weight* weight;
  const Source* source;
  int64_t first_row, rows;

  int64_t row_bytes() const { return weight->stored->row_bytes(weight->columns); }
  int64_t bytes() const { return rows * row_bytes(); }
};

// A member's buffers for what it reads.
struct ReadBuffers {
  Memory<uint8_t> lying, ordered;  // rows as the file has them, and as the weight does
};

// The rows of a piece as they are stored, in the weight's order.
const uint8_t* rows_of(const Piece& piece, ReadBuffers& buffers) {
  const Source& source = *piece.source;
  const int64_t row_bytes = piece.row_bytes();
  if (source.data) return source.data + piece.first_row * row_bytes;
  const auto read = [&](int64_t row, int64_t rows, uint8_t* to) {
    read_file(source.file, source.start + row * row_bytes, at(rows * row_bytes), to);
  };
  if (!source.order) {
    read(piece.first_row, piece.rows, buffers.lying.get());
    return buffers.lying.get();
  }
  // Reordered rows stay within their heads: what lies between the first and the last of them is read at once, unless
  // that is far more.
  const int64_t* order = source.order + piece.first_row;
  const auto [low, high] = std::minmax_element(order, order + piece.rows);
  const bool dense = *high - *low < 2 * piece.rows;
  if (dense) read(*low, *high - *low + 1, buffers.lying.get());
  for (int64_t r = 0; r < piece.rows; ++r) {
    uint8_t* to = buffers.ordered.get() + r * row_bytes;
    if (dense)
      std::memcpy(to, buffers.lying.get() + (order[r] - *low) * row_bytes, at(row_bytes));
    else
      read(order[r], 1, to);
  }
  return buffers.ordered.get();
}

void pack_piece(const Piece& piece, ReadBuffers& buffers) {
  const Weight& w = *piece.weight;
  const uint8_t* rows = rows_of(piece, buffers);
  char* panel = w.data + piece.first_row / kPanelRows * w.panel_bytes;
  for (int64_t r = 0; r < piece.rows; r += kPanelRows, panel += w.panel_bytes)
    pack_panel(*w.stored, rows + r * piece.row_bytes(), std::min<int64_t>(kPanelRows, piece.rows - r),
               w.columns, panel);
}

void check(const Weight& w, const Source& source) {
  const int64_t expected = w.stored->row_bytes(w.columns) * w.rows;
  if (source.data) {
    require(source.bytes == expected, "a weight has " + std::to_string(source.bytes) + " bytes; " +
                                          std::to_string(expected) + " expected");
    return;
  }
  require(source.start >= 0 && source.start < kMostBytes, "a weight begins beyond its file");
  if (!source.order) return;
  require(source.order_size == w.rows, "the order of " + std::to_string(source.order_size) +
                                           " rows is not that of " + std::to_string(w.rows));
  for (int64_t r = 0; r < w.rows; ++r)
    if (source.order[r] < 0 || source.order[r] >= w.rows)
      throw std::invalid_argument("row " + std::to_string(source.order[r]) + " is none of a weight's " +
                                  std::to_string(w.rows));
}

}  // namespace

int Program::add_weight(const std::string& stored, int64_t rows, int64_t columns) {
  const Stored& type = stored_of(stored);
  require(!sealed_, "the program is sealed");
  require(rows > 0 && columns > 0 && rows < kMost && columns < kMost, "a weight of " + std::to_string(rows) +
                                                                          " × " + std::to_string(columns) +
                                                                          "; each is between 1 and 2^31");
  require(columns % type.block_columns == 0, std::to_string(columns) + " columns are no multiple of " +
                                                 std::to_string(type.block_columns) + ", as " + stored +
                                                 " needs");
  int64_t bytes;
  if (__builtin_mul_overflow((rows + kPanelRows - 1) / kPanelRows, type.panel_bytes(columns), &bytes) ||
      bytes > kMostBytes)
    throw std::bad_alloc();
  weights_.push_back({&type, type.layout, rows, columns, type.panel_bytes(columns), nullptr});
  return static_cast<int>(weights_.size()) - 1;
}

void Program::pack(const std::vector<Source>& sources) {
  const Busy busy(busy_);
  require(sealed_ && !packed_, "weights are packed once, when the program is sealed");
  require(sources.size() == weights_.size(),
          std::to_string(sources.size()) + " sources for " + std::to_string(weights_.size()) + " weights");
  std::vector<Piece> pieces;
  int64_t total = 0, reach = 0, ordered = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Weight& w = weights_[i];
    check(w, sources[i]);
    const int64_t panel = w.stored->row_bytes(w.columns) * kPanelRows;
    const int64_t step = std::max<int64_t>(1, kPieceBytes / panel) * kPanelRows;
    for (int64_t row = 0; row < w.rows; row += step) {
      pieces.push_back({&w, &sources[i], row, std::min(step, w.rows - row)});
      if (sources[i].data) continue;
      const int64_t bytes = pieces.back().bytes();
      reach = std::max(reach, sources[i].order ? 2 * bytes : bytes);
      if (sources[i].order) ordered = std::max(ordered, bytes);
    }
    total += aligned(w.bytes());
    if (total > kMostBytes) throw std::bad_alloc();
  }
  packed_ = allocate<char>(at(total));
  int64_t place = 0;
  for (Weight& w : weights_) {
    w.data = packed_.get() + place;
    place += aligned(w.bytes());
  }
  std::vector<ReadBuffers> buffers(at(team_.size()));
  for (ReadBuffers& b : buffers) b = {allocate<uint8_t>(at(reach)), allocate<uint8_t>(at(ordered))};
  std::exception_ptr failure;
  std::mutex failing;
  team_.run([&](int member) {
    team_.loop(member, static_cast<int64_t>(pieces.size()), [&](int64_t i) {
      try {
        pack_piece(pieces[at(i)], buffers[at(member)]);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing);
        failure = std::current_exception();
      }
    });
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace hexad
