#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/ops/heads.h"
#include "phalanx/ops/ops.h"
#include "phalanx/quant/format.h"
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
  // What the values of a vector may be; others are refused while loading, by name.
  enum class Values : uint8_t { kAny, kFinite, kPositive };

  // dtype: of the float matrices as stored. base: 64-aligned, lent; nullptr: results carry no
  // address. formats: lent; nullptr: a float checkpoint.
  WeightPlan(DType dtype, ops::Isa isa, std::byte* base = nullptr,
             const quant::Formats* formats = nullptr)
      : dtype_(dtype), isa_(isa), base_(base), formats_(formats) {}

  // A linear layer whose output rows are those of `parts`, one after the other (equal cols).
  ops::PackedLinear linear(std::vector<RowSlice> parts);
  // The same as a float matrix, whatever the format of the parts.
  ops::PackedLinear dense(std::vector<RowSlice> parts);
  // Gate and up of equal take.
  ops::PackedGated gated(RowSlice gate, RowSlice up);
  // A linear layer in f32, whatever float dtype it is stored in (exact).
  ops::PackedLinear linear_f32(RowSlice part);
  // Rows `of_head` of each run of `period` rows among the taken ones, one matrix per run; bf16 where
  // the checkpoint's dtype is that, else f32. transposed: [cols outputs, of_head inputs], else
  // [of_head outputs, cols inputs]. Quantised ones by their values.
  ops::PackedHeads heads(RowSlice part, int64_t period, Range of_head, bool transposed);
  // Rows as they are stored, or the values of quantised ones.
  MatrixView rows(RowSlice part);
  // The parts one after the other, converted to f32 (exactly). Parts have cols 0. nullptr where all of
  // them are biases that belong to quantised layers.
  const float* vector(std::vector<RowSlice> parts, Values values = Values::kAny);

  // The bias of the norm `layer` over `width` values; nullptr where the checkpoint has none.
  const float* norm_bias(const std::string& layer, int64_t width);

  // Names of all declared tensors; the parts of quantised layers too.
  [[nodiscard]] std::set<std::string, std::less<>> names() const;

  [[nodiscard]] int64_t arena_bytes() const { return arena_bytes_; }
  // Assumes that vectors are stored as the matrices are.
  [[nodiscard]] int64_t read_bytes() const { return read_bytes_; }

  // Every declared tensor must be there with its shape and a dtype that can be used; adds what is
  // wrong, naming file and tensor.
  void verify(const weights::Checkpoint& checkpoint, Problems& problems) const;

  // Reads and packs everything into base, on all threads of the pool. progress(bytes read, bytes
  // in all) is called from the calling thread. prepare(): called once before
  // base is written, while the disk already reads.
  void load(weights::WeightSource& source, ThreadPool& pool,
            const std::function<void(int64_t, int64_t)>& progress,
            const std::function<void()>& prepare) const;

 private:
  // The last two: of a static input (scale, offset), and the order of k.
  enum class Kind {
    kLinear, kGate, kUp, kRows, kVector, kLinearF32, kHeads, kInput, kOrder
  };
  struct Job {
    Kind kind = Kind::kRows;
    std::vector<RowSlice> parts;
    std::vector<const quant::LinearFormat*> formats;  // of the parts; nullptr: float
    ops::PackedLinear packed;  // kLinear, kGate, kUp of quantised layers: their layout
    int64_t rows = 0;    // taken, all parts
    int64_t cols = 0;
    int64_t offset = 0;  // in the arena
    ops::PackedHeads heads;  // kHeads, and what of the rows
    int64_t period = 0;
    Range of_head;
    bool transposed = false;
    Values values = Values::kAny;  // kVector
  };
  struct Piece;
  // Of a row as float, whatever its format.
  [[nodiscard]] int64_t row_bytes_of(const Job& job) const;
  static void announce(const Piece& piece, weights::WeightSource& source);
  std::byte* place(int64_t bytes);
  Job& add_job(Kind kind, std::vector<RowSlice> parts, int64_t offset);
  [[nodiscard]] const quant::LinearFormat* format_of(const RowSlice& part) const;
  ops::PackedLinear float_linear(std::vector<RowSlice> parts);
  ops::PackedLinear quantised_linear(std::vector<RowSlice> parts);
  // Storage, group, zero points and input of a layer of these parts.
  ops::PackedLinear layout_of(const std::vector<RowSlice>& parts);
  const float* own_bias(const std::vector<RowSlice>& parts);
  void verify_part(const Job& job, const RowSlice& part, const quant::LinearFormat* format,
                   const weights::Checkpoint& checkpoint, Problems& problems) const;
  void load_piece(const Piece& piece, weights::WeightSource& source,
                  std::vector<std::byte>& buffer, Problems& problems) const;
  void load_widened(const Job& job, weights::WeightSource& source, Problems& problems) const;
  void load_vector(const Job& job, weights::WeightSource& source,
                   std::vector<std::byte>& buffer, Problems& problems) const;
  // Rows of a quantised tensor in the kernels' form; order: of k, where the layer has one.
  [[nodiscard]] static quant::Rows read_quantised(const RowSlice& part,
                                                  const quant::LinearFormat& format, Range rows,
                                                  weights::WeightSource& source,
                                                  Problems& problems,
                                                  std::vector<int32_t>* order = nullptr);
  // Rows [row_begin, + rows) of all taken ones, as stored or dequantised.
  void read_float(const Job& job, int64_t row_begin, int64_t rows, weights::WeightSource& source,
                  std::byte* out, Problems& problems) const;

  DType dtype_;
  ops::Isa isa_;
  std::byte* base_;
  const quant::Formats* formats_;
  int64_t arena_bytes_ = 0;
  int64_t read_bytes_ = 0;
  std::vector<Job> jobs_;
};

}  // namespace phalanx::layers
