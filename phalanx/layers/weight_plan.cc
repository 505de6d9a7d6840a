#include "phalanx/layers/weight_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "phalanx/layers/widen.h"

namespace phalanx::layers {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kPieceBytes = 4 << 20;

bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

std::vector<int64_t> shape_of(const RowSlice& slice) {
  if (slice.cols == 0) return {slice.rows};
  return {slice.rows, slice.cols};
}

}  // namespace

struct WeightPlan::Piece {
  const Job* job = nullptr;
  int64_t row_begin = 0;  // among the taken rows of the job
  int64_t rows = 0;
};

std::byte* WeightPlan::place(int64_t bytes) {
  std::byte* at = base_ == nullptr ? nullptr : base_ + arena_bytes_;
  arena_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return at;
}

void WeightPlan::add_job(Kind kind, std::vector<RowSlice> parts, int64_t offset) {
  Job job{.kind = kind, .parts = std::move(parts), .offset = offset};
  job.cols = job.parts.front().cols;
  for (const RowSlice& part : job.parts) {
    PHALANX_CHECK(part.cols == job.cols && part.take.begin >= 0 &&
                  part.take.begin <= part.take.end && part.take.end <= part.rows);
    job.rows += part.take.size();
  }
  read_bytes_ += job.rows * std::max<int64_t>(1, job.cols) *
                 static_cast<int64_t>(tensor::dtype_bytes(dtype_));
  jobs_.push_back(std::move(job));
}

ops::PackedLinear WeightPlan::linear(std::vector<RowSlice> parts) {
  const int64_t offset = arena_bytes_;
  const int64_t k = parts.front().cols;
  add_job(Kind::kLinear, std::move(parts), offset);
  const int64_t rows = jobs_.back().rows;
  const std::byte* data =
      place(rows == 0 ? 0 : ops::packed_bytes(rows, k, dtype_, isa_));
  return {.data = data, .rows = rows, .k = k, .dtype = dtype_, .isa = isa_};
}

ops::PackedGated WeightPlan::gated(RowSlice gate, RowSlice up) {
  PHALANX_CHECK(gate.take == up.take && gate.cols == up.cols);
  const int64_t offset = arena_bytes_;
  const int64_t k = gate.cols;
  const int64_t rows = gate.take.size();
  add_job(Kind::kGate, {std::move(gate)}, offset);
  add_job(Kind::kUp, {std::move(up)}, offset);
  const std::byte* data =
      place(rows == 0 ? 0 : ops::packed_gated_bytes(rows, k, dtype_, isa_));
  const int64_t padded = (rows + tensor::kPanelRows - 1) / tensor::kPanelRows * tensor::kPanelRows;
  return {.panels = {.data = data, .rows = 2 * padded, .k = k, .dtype = dtype_, .isa = isa_},
          .rows = rows};
}

MatrixView WeightPlan::rows(RowSlice part) {
  const int64_t offset = arena_bytes_;
  const int64_t count = part.take.size();
  const int64_t cols = part.cols;
  add_job(Kind::kRows, {std::move(part)}, offset);
  std::byte* data = place(count * cols * static_cast<int64_t>(tensor::dtype_bytes(dtype_)));
  return {.data = data, .dtype = dtype_, .rows = count, .cols = cols, .stride = cols};
}

const float* WeightPlan::vector(std::vector<RowSlice> parts) {
  PHALANX_CHECK(parts.front().cols == 0);
  const int64_t offset = arena_bytes_;
  add_job(Kind::kVector, std::move(parts), offset);
  return reinterpret_cast<const float*>(
      place(jobs_.back().rows * static_cast<int64_t>(sizeof(float))));
}

void WeightPlan::verify(const weights::Checkpoint& checkpoint, Problems& problems) const {
  for (const Job& job : jobs_) {
    for (const RowSlice& part : job.parts) {
      const weights::TensorEntry* entry = checkpoint.find(part.name);
      const std::string expected = weights::shape_text(shape_of(part));
      if (entry == nullptr) {
        problems.add({.what = "tensor is absent",
                      .where = fmt::format("{}: tensor {}", checkpoint.directory(), part.name),
                      .expected = fmt::format("shape {}", expected),
                      .fix = "config.json and the weight files must belong to one checkpoint"});
        continue;
      }
      const std::string where =
          fmt::format("{}: tensor {}", checkpoint.path_of(*entry), part.name);
      if (entry->shape != shape_of(part))
        problems.add({.what = "tensor of another shape", .where = where,
                      .found = weights::shape_text(entry->shape), .expected = expected,
                      .fix = "config.json and the weight files must belong to one checkpoint"});
      if (job.kind == Kind::kVector) {
        if (!is_float(entry->dtype))
          problems.add({.what = "tensor of another dtype", .where = where,
                        .found = std::string(tensor::dtype_name(entry->dtype)),
                        .expected = "f32, f16 or bf16"});
      } else if (entry->dtype != dtype_) {
        problems.add({.what = "tensor of another dtype", .where = where,
                      .found = std::string(tensor::dtype_name(entry->dtype)),
                      .expected = std::string(tensor::dtype_name(dtype_)),
                      .fix = "let torch_dtype (or dtype) in config.json name the dtype of the weights"});
      }
    }
  }
}

void WeightPlan::load_piece(const Piece& piece, weights::WeightSource& source,
                            std::vector<std::byte>& buffer) const {
  const Job& job = *piece.job;
  std::byte* target = base_ + job.offset;
  if (job.kind == Kind::kVector) {
    auto* out = reinterpret_cast<float*>(target);
    for (const RowSlice& part : job.parts) {
      const weights::TensorEntry& entry = source.ask(part.name);
      buffer.resize(static_cast<size_t>(part.take.size() * entry.row_bytes()));
      source.read_rows(entry, part.take.begin, part.take.size(), buffer.data());
      widen(buffer.data(), entry.dtype, part.take.size(), out);
      out += part.take.size();
    }
    return;
  }
  const int64_t row_bytes = job.cols * static_cast<int64_t>(tensor::dtype_bytes(dtype_));
  std::byte* out = target + piece.row_begin * row_bytes;
  if (job.kind != Kind::kRows) {
    buffer.resize(static_cast<size_t>(piece.rows * row_bytes));
    out = buffer.data();
  }
  int64_t part_begin = 0;
  std::byte* to = out;
  for (const RowSlice& part : job.parts) {
    const int64_t begin = std::max(piece.row_begin, part_begin);
    const int64_t end = std::min(piece.row_begin + piece.rows, part_begin + part.take.size());
    if (begin < end) {
      source.read_rows(source.ask(part.name), part.take.begin + begin - part_begin, end - begin, to);
      to += (end - begin) * row_bytes;
    }
    part_begin += part.take.size();
  }
  const MatrixView rows{.data = out, .dtype = dtype_, .rows = piece.rows, .cols = job.cols,
                        .stride = job.cols};
  if (job.kind == Kind::kLinear)
    ops::pack_rows(rows, piece.row_begin, job.rows, target, isa_);
  else if (job.kind != Kind::kRows)
    ops::pack_gated_rows(rows, piece.row_begin, job.rows, job.kind == Kind::kUp ? 1 : 0, target,
                         isa_);
}

void WeightPlan::load(weights::WeightSource& source, ThreadPool& pool,
                      const std::function<void(int64_t, int64_t)>& progress) const {
  PHALANX_CHECK(base_ != nullptr);
  std::vector<Piece> pieces;
  for (const Job& job : jobs_) {
    for (const RowSlice& part : job.parts) (void)source.ask(part.name);
    int64_t step = job.rows;
    if (job.kind != Kind::kVector) {
      const int64_t row_bytes = job.cols * static_cast<int64_t>(tensor::dtype_bytes(dtype_));
      step = std::max<int64_t>(1, kPieceBytes / row_bytes / tensor::kPanelRows) *
             tensor::kPanelRows;
    }
    for (int64_t row = 0; row < job.rows; row += step)
      pieces.push_back({.job = &job, .row_begin = row, .rows = std::min(step, job.rows - row)});
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  pool.run([&](int thread) {
    std::vector<std::byte> buffer;
    while (!failed.load(std::memory_order_relaxed)) {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= pieces.size()) break;
      try {
        load_piece(pieces[i], source, buffer);
      } catch (...) {
        failed.store(true, std::memory_order_relaxed);
        throw;
      }
      if (thread == 0 && progress) progress(source.bytes_read(), read_bytes_);
    }
  });
  if (progress) progress(source.bytes_read(), read_bytes_);
}

}  // namespace phalanx::layers
