// Matrices that are not packed as they are stored: routers in f32, and the parts of MLA's kv_b_proj.

#include <algorithm>

#include "phalanx/layers/weight_plan.h"
#include "phalanx/layers/widen.h"

namespace phalanx::layers {

ops::PackedLinear WeightPlan::linear_f32(RowSlice part) {
  const int64_t offset = arena_bytes_;
  const int64_t rows = part.take.size();
  const int64_t k = part.cols;
  add_job(Kind::kLinearF32, {std::move(part)}, offset);
  const std::byte* data = place(rows == 0 ? 0 : ops::packed_bytes(rows, k, DType::kF32, isa_));
  return {.data = data, .rows = rows, .k = k, .dtype = DType::kF32, .isa = isa_};
}

ops::PackedHeads WeightPlan::heads(RowSlice part, int64_t period, Range of_head, bool transposed) {
  PHALANX_CHECK(part.take.begin % period == 0 && part.take.size() % period == 0 &&
                of_head.begin >= 0 && of_head.end <= period);
  const int64_t offset = arena_bytes_;
  ops::PackedHeads heads{.heads = part.take.size() / period,
                         .rows = transposed ? part.cols : of_head.size(),
                         .k = transposed ? of_head.size() : part.cols,
                         .dtype = dtype_ == DType::kBF16 ? DType::kBF16 : DType::kF32,
                         .isa = isa_};
  add_job(Kind::kHeads, {std::move(part)}, offset);
  heads.data = place(heads.heads * heads.head_bytes());
  Job& job = jobs_.back();
  job.heads = heads;
  job.period = period;
  job.of_head = of_head;
  job.transposed = transposed;
  return heads;
}

// Head by head, or all rows at once.
void WeightPlan::load_widened(const Job& job, weights::WeightSource& source,
                              Problems& problems) const {
  const RowSlice& part = job.parts.front();
  // A router may be stored wider than the checkpoint's dtype.
  const DType stored_as = job.formats.front() == nullptr ? source.ask(part.name).dtype : dtype_;
  const int64_t row_bytes = job.cols * static_cast<int64_t>(tensor::dtype_bytes(stored_as));
  const bool heads = job.kind == Kind::kHeads;
  const int64_t count = heads ? job.of_head.size() : job.rows;
  std::vector<std::byte> stored(static_cast<size_t>(count * row_bytes));
  std::vector<float> values(static_cast<size_t>(count * job.cols));
  std::vector<float> turned(job.transposed ? values.size() : 0);
  std::vector<uint16_t> halves(heads && job.heads.dtype == DType::kBF16 ? values.size() : 0);
  for (int64_t h = 0; h < (heads ? job.heads.heads : 1); ++h) {
    const int64_t first = heads ? h * job.period + job.of_head.begin : 0;
    read_float(job, first, count, source, stored.data(), problems);
    widen(stored.data(), stored_as, count * job.cols, values.data());
    std::byte* target = base_ + job.offset;
    MatrixView rows{.data = values.data(), .dtype = DType::kF32, .rows = count, .cols = job.cols,
                    .stride = job.cols};
    if (job.transposed) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < job.cols; ++c)
          turned[static_cast<size_t>(c * count + r)] = values[static_cast<size_t>(r * job.cols + c)];
      rows = {.data = turned.data(), .dtype = DType::kF32, .rows = job.cols, .cols = count,
              .stride = count};
    }
    if (!halves.empty()) {
      const float* from = static_cast<const float*>(rows.data);
      std::transform(from, from + halves.size(), halves.begin(), tensor::f32_to_bf16);
      rows.data = halves.data();
      rows.dtype = DType::kBF16;
    }
    if (heads) target += h * job.heads.head_bytes();
    ops::pack_rows(rows, 0, rows.rows, target, isa_);
  }
}

}  // namespace phalanx::layers
