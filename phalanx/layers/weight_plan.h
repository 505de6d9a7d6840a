#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/ops/ops.h"
#include "phalanx/weights/weight_source.h"

namespace phalanx::layers {

using ops::DType;
using ops::MatrixView;
using tensor::Range;

// Rows `take` of the tensor `name`, whose shape must be [rows, cols], or [rows] where cols is 0.
struct RowSlice {
  std::string name;
  int64_t rows = 0;
  int64_t cols = 0;
  Range take;
};

// What one rank needs of a checkpoint, and where it goes. Layers declare their weights here in a
// fixed order; the same declarations measure (no base), verify a checkpoint, and load. A second plan
// made in the same order with the arena as base yields the same places, now with addresses.
class WeightPlan {
 public:
  // dtype: of the matrices as stored. base: 64-aligned, lent; nullptr: results carry no address.
  WeightPlan(DType dtype, ops::Isa isa, std::byte* base = nullptr)
      : dtype_(dtype), isa_(isa), base_(base) {}

  // A linear layer whose output rows are those of `parts`, one after the other (equal cols).
  ops::PackedLinear linear(std::vector<RowSlice> parts);
  // Gate and up of equal take.
  ops::PackedGated gated(RowSlice gate, RowSlice up);
  // Rows as they are stored.
  MatrixView rows(RowSlice part);
  // The parts one after the other, converted to f32 (exactly). Parts have cols 0.
  const float* vector(std::vector<RowSlice> parts);

  [[nodiscard]] int64_t arena_bytes() const { return arena_bytes_; }
  // Assumes that vectors are stored as the matrices are.
  [[nodiscard]] int64_t read_bytes() const { return read_bytes_; }

  // Every declared tensor must be there with its shape and a dtype that can be used; adds what is
  // wrong, naming file and tensor.
  void verify(const weights::Checkpoint& checkpoint, Problems& problems) const;

  // Reads and packs everything into base, on all threads of the pool. progress(bytes read, bytes
  // in all) is called from the calling thread.
  void load(weights::WeightSource& source, ThreadPool& pool,
            const std::function<void(int64_t, int64_t)>& progress) const;

 private:
  enum class Kind { kLinear, kGate, kUp, kRows, kVector };
  struct Job {
    Kind kind = Kind::kRows;
    std::vector<RowSlice> parts;
    int64_t rows = 0;    // taken, all parts
    int64_t cols = 0;
    int64_t offset = 0;  // in the arena
  };
  struct Piece;
  std::byte* place(int64_t bytes);
  void add_job(Kind kind, std::vector<RowSlice> parts, int64_t offset);
  void load_piece(const Piece& piece, weights::WeightSource& source,
                  std::vector<std::byte>& buffer) const;

  DType dtype_;
  ops::Isa isa_;
  std::byte* base_;
  int64_t arena_bytes_ = 0;
  int64_t read_bytes_ = 0;
  std::vector<Job> jobs_;
};

}  // namespace phalanx::layers
