#include "phalanx/layers/weight_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

#include "phalanx/layers/widen.h"
#include "phalanx/ops/quantised.h"

namespace phalanx::layers {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kPieceBytes = 512 << 10;  // read and packed while it lies in the core's own cache
constexpr size_t kPiecesAhead = 192;        // that the disk may be asked for before their turn
constexpr int64_t kDiskBytes = 4 << 20;     // that the disk is asked for at once
constexpr size_t kPiecesInTurn = 4;         // by one thread: neighbours in file and arena

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kBias = ".bias";

std::string_view layer_of(std::string_view tensor) { return tensor.substr(0, tensor.rfind('.')); }

std::string dtypes_text(const std::vector<DType>& dtypes) {
  std::string text;
  for (size_t i = 0; i < dtypes.size(); ++i)
    text += std::string(i == 0 ? "" : i + 1 == dtypes.size() ? " or " : ", ") +
            std::string(tensor::dtype_name(dtypes[i]));
  return text;
}

// Bytes to read for the taken rows of a quantised part.
int64_t bytes_of(const quant::LinearFormat& format, const RowSlice& part) {
  int64_t bytes = 0;
  for (const quant::PartSpec& spec : quant::parts(format, part.rows, part.cols)) {
    int64_t count = 1;
    for (const int64_t n : spec.shape) count *= n;
    const int64_t all = spec.units({0, part.rows}).size();
    const bool scale = spec.role == quant::PartSpec::Role::kScale ||
                       spec.role == quant::PartSpec::Role::kDeqScale;
    const DType dtype = scale ? format.scale_dtype : spec.dtypes.front();
    bytes += all == 0 ? 0
                      : count / all * spec.units(part.take).size() *
                            static_cast<int64_t>(tensor::dtype_bytes(dtype));
  }
  return bytes;
}

std::vector<int64_t> shape_of(const RowSlice& slice) {
  if (slice.cols == 0) return {slice.rows};
  return {slice.rows, slice.cols};
}

}  // namespace

namespace {

// first: of the values, in the tensor.
void check_values(WeightPlan::Values wanted, std::span<const float> values, int64_t first,
                  const std::string& where, Problems& problems) {
  if (wanted == WeightPlan::Values::kAny) return;
  const bool positive = wanted == WeightPlan::Values::kPositive;
  int64_t count = 0;
  size_t at = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i]) && (!positive || values[i] > 0)) continue;
    if (count++ == 0) at = i;
  }
  if (count == 0) return;
  problems.add({.what = positive ? "scale that cannot be used" : "offset that cannot be used",
                .where = where,
                .found = fmt::format("{} of them, the first {} at {}", count, values[at],
                                     first + static_cast<int64_t>(at)),
                .expected = positive ? "finite numbers above 0" : "finite numbers",
                .fix = "the file is damaged or the quantisation failed: make or fetch it again"});
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

WeightPlan::Job& WeightPlan::add_job(Kind kind, std::vector<RowSlice> parts, int64_t offset) {
  Job job{.kind = kind, .parts = std::move(parts), .offset = offset};
  job.cols = job.parts.front().cols;
  for (const RowSlice& part : job.parts) {
    PHALANX_CHECK(part.cols == job.cols && part.take.begin >= 0 &&
                  part.take.begin <= part.take.end && part.take.end <= part.rows);
    job.rows += part.take.size();
    const quant::LinearFormat* format = kind == Kind::kVector ? nullptr : format_of(part);
    job.formats.push_back(format);
    if (part.name.empty() || kind == Kind::kInput || kind == Kind::kOrder) continue;
    read_bytes_ += format == nullptr ? part.take.size() * std::max<int64_t>(1, part.cols) *
                                           static_cast<int64_t>(tensor::dtype_bytes(dtype_))
                                     : bytes_of(*format, part);
  }
  jobs_.push_back(std::move(job));
  return jobs_.back();
}

const quant::LinearFormat* WeightPlan::format_of(const RowSlice& part) const {
  if (formats_ == nullptr || !part.name.ends_with(kWeight)) return nullptr;
  return formats_->find(layer_of(part.name));
}

ops::PackedLinear WeightPlan::linear(std::vector<RowSlice> parts) {
  // Runs of parts that can lie in one packed matrix.
  std::vector<std::vector<RowSlice>> runs;
  for (RowSlice& part : parts) {
    const quant::LinearFormat* format = format_of(part);
    const quant::LinearFormat* before = runs.empty() ? nullptr : format_of(runs.back().back());
    const bool joins = !runs.empty() &&
                       (format == nullptr || before == nullptr ? format == before
                                                               : before->packs_with(*format, part.cols));
    if (!joins) runs.emplace_back();
    runs.back().push_back(std::move(part));
  }
  if (runs.size() == 1) return quantised_linear(std::move(runs.front()));
  ops::PackedLinear whole{.k = runs.front().front().cols, .dtype = dtype_, .isa = isa_};
  for (std::vector<RowSlice>& run : runs) {
    whole.parts.push_back(quantised_linear(std::move(run)));
    whole.rows += whole.parts.back().rows;
  }
  return whole;
}

ops::PackedLinear WeightPlan::dense(std::vector<RowSlice> parts) {
  return float_linear(std::move(parts));
}

ops::PackedLinear WeightPlan::float_linear(std::vector<RowSlice> parts) {
  const int64_t offset = arena_bytes_;
  const int64_t k = parts.front().cols;
  const int64_t rows = add_job(Kind::kLinear, std::move(parts), offset).rows;
  const std::byte* data =
      place(rows == 0 ? 0 : ops::packed_bytes(rows, k, dtype_, isa_));
  return {.data = data, .rows = rows, .k = k, .dtype = dtype_, .isa = isa_};
}

ops::PackedLinear WeightPlan::layout_of(const std::vector<RowSlice>& parts) {
  const quant::LinearFormat& format = *format_of(parts.front());
  const int64_t k = parts.front().cols;
  ops::PackedLinear w{.k = k,
                      .dtype = dtype_,
                      .isa = isa_,
                      .storage = format.storage,
                      .group = std::max<int64_t>(1, format.group_of(k)),
                      .zeros = format.zeros || format.storage == quant::Storage::kCodes8};
  const auto extra = [&](Kind kind, int64_t bytes) {
    add_job(kind, {parts.front()}, arena_bytes_);
    return place(bytes);
  };
  if (format.static_input)
    w.input = reinterpret_cast<const float*>(extra(Kind::kInput, 2 * sizeof(float)));
  if (format.order)
    w.order = reinterpret_cast<const int32_t*>(
        extra(Kind::kOrder, k * static_cast<int64_t>(sizeof(int32_t))));
  return w;
}

const float* WeightPlan::own_bias(const std::vector<RowSlice>& parts) {
  std::vector<RowSlice> biases;
  bool any = false;
  for (const RowSlice& part : parts) {
    const quant::LinearFormat* format = format_of(part);
    const bool has = format != nullptr && format->bias;
    any = any || has;
    biases.push_back({.name = has ? std::string(layer_of(part.name)) + std::string(kBias) : "",
                      .rows = part.rows, .cols = 0, .take = part.take});
  }
  if (!any) return nullptr;
  const int64_t offset = arena_bytes_;
  const int64_t rows = add_job(Kind::kVector, std::move(biases), offset).rows;
  return reinterpret_cast<const float*>(place(rows * static_cast<int64_t>(sizeof(float))));
}

// Parts of one layout, or of float.
ops::PackedLinear WeightPlan::quantised_linear(std::vector<RowSlice> parts) {
  if (format_of(parts.front()) == nullptr) return float_linear(std::move(parts));
  ops::PackedLinear w = layout_of(parts);
  w.own_bias = own_bias(parts);
  const int64_t offset = arena_bytes_;
  Job& job = add_job(Kind::kLinear, std::move(parts), offset);
  w.rows = job.rows;
  job.packed = w;
  w.data = place(ops::packed_bytes(w));
  return w;
}

ops::PackedGated WeightPlan::gated(RowSlice gate, RowSlice up) {
  PHALANX_CHECK(gate.take == up.take && gate.cols == up.cols);
  const int64_t k = gate.cols;
  const int64_t rows = gate.take.size();
  const quant::LinearFormat* gate_format = format_of(gate);
  const quant::LinearFormat* up_format = format_of(up);
  const bool floats = gate_format == nullptr && up_format == nullptr;
  const bool together =
      gate_format != nullptr && up_format != nullptr && gate_format->packs_with(*up_format, k);
  if (!floats && !together) {
    ops::PackedGated both{.rows = rows};
    both.halves.push_back(quantised_linear({std::move(gate)}));
    both.halves.push_back(quantised_linear({std::move(up)}));
    both.own_gate_bias = both.halves[0].own_bias;
    both.own_up_bias = both.halves[1].own_bias;
    return both;
  }
  const int64_t padded = (rows + tensor::kPanelRows - 1) / tensor::kPanelRows * tensor::kPanelRows;
  ops::PackedGated result{.panels = {.k = k, .dtype = dtype_, .isa = isa_}, .rows = rows};
  if (together) {
    result.own_gate_bias = own_bias({gate});
    result.own_up_bias = own_bias({up});
    result.panels = layout_of({gate});
  }
  result.panels.rows = 2 * padded;
  const int64_t offset = arena_bytes_;
  for (const Kind kind : {Kind::kGate, Kind::kUp})
    add_job(kind, {kind == Kind::kGate ? std::move(gate) : std::move(up)}, offset).packed =
        result.panels;
  result.panels.data = place(rows == 0  ? 0
                             : together ? ops::packed_bytes(result.panels)
                                        : ops::packed_gated_bytes(rows, k, dtype_, isa_));
  return result;
}

MatrixView WeightPlan::rows(RowSlice part) {
  const int64_t offset = arena_bytes_;
  const int64_t count = part.take.size();
  const int64_t cols = part.cols;
  add_job(Kind::kRows, {std::move(part)}, offset);
  std::byte* data = place(count * cols * static_cast<int64_t>(tensor::dtype_bytes(dtype_)));
  return {.data = data, .dtype = dtype_, .rows = count, .cols = cols, .stride = cols};
}

const float* WeightPlan::vector(std::vector<RowSlice> parts, Values values) {
  PHALANX_CHECK(parts.front().cols == 0);
  // Biases of quantised layers are added by those layers: zeros stand for them here.
  bool any = false;
  for (RowSlice& part : parts) {
    const bool bias = part.name.ends_with(kBias) && formats_ != nullptr;
    const quant::LinearFormat* format = bias ? formats_->find(layer_of(part.name)) : nullptr;
    if (format != nullptr && (format->bias || format->folds_bias()))
      part.name.clear();
    else
      any = true;
  }
  if (!any) return nullptr;
  const int64_t offset = arena_bytes_;
  Job& job = add_job(Kind::kVector, std::move(parts), offset);
  job.values = values;
  return reinterpret_cast<const float*>(place(job.rows * static_cast<int64_t>(sizeof(float))));
}

std::set<std::string, std::less<>> WeightPlan::names() const {
  std::set<std::string, std::less<>> names;
  for (const Job& job : jobs_)
    for (size_t i = 0; i < job.parts.size(); ++i) {
      const RowSlice& part = job.parts[i];
      if (part.name.empty()) continue;
      if (job.formats[i] == nullptr) {
        names.insert(part.name);
        continue;
      }
      for (const quant::PartSpec& spec : quant::parts(*job.formats[i], part.rows, part.cols))
        names.insert(std::string(layer_of(part.name)) + spec.suffix);
    }
  return names;
}

const float* WeightPlan::norm_bias(const std::string& layer, int64_t width) {
  if (formats_ == nullptr || !formats_->norm_biases.contains(layer)) return nullptr;
  return vector({{layer + std::string(kBias), width, 0, {0, width}}});
}

void WeightPlan::verify_part(const Job& job, const RowSlice& part,
                             const quant::LinearFormat* format,
                             const weights::Checkpoint& checkpoint, Problems& problems) const {
  struct Wanted {
    std::string name;
    std::vector<DType> dtypes;
    std::vector<std::vector<int64_t>> shapes;
    std::string fix;
  };
  std::vector<Wanted> wanted;
  if (format != nullptr) {
    const std::string layer(layer_of(part.name));
    for (quant::PartSpec& spec : quant::parts(*format, part.rows, part.cols)) {
      Wanted w{.name = layer + spec.suffix, .dtypes = spec.dtypes, .shapes = {spec.shape},
               .fix = fmt::format("the tensors of this layer must be those of {}", format->name)};
      if (!spec.other_shape.empty()) w.shapes.push_back(spec.other_shape);
      if (spec.shape == std::vector<int64_t>{1}) {
        w.shapes.push_back({});
        w.shapes.push_back({1, 1});
      }
      wanted.push_back(std::move(w));
    }
    const std::string where = fmt::format("{}: layer {}", checkpoint.directory(), layer);
    const bool blocks = format->scheme == quant::Scheme::kFp8;
    if (format->group != 0 && part.cols % format->group != 0 && !blocks)
      problems.add({.what = "width that groups do not divide", .where = where,
                    .found = fmt::format("{} columns, groups of {}", part.cols, format->group),
                    .expected = "whole groups"});
    if (format->storage == quant::Storage::kInt8 && part.cols > ops::kMaxInt8K)
      problems.add({.what = "layer too wide for int8 sums", .where = where,
                    .found = fmt::format("{} columns", part.cols),
                    .expected = fmt::format("at most {}", ops::kMaxInt8K)});
    if (format->scheme == quant::Scheme::kAwq && part.rows % 8 != 0)
      problems.add({.what = "rows that do not fill words of eight", .where = where,
                    .found = fmt::format("{} rows", part.rows), .expected = "a multiple of 8"});
  } else {
    Wanted w{.name = part.name, .dtypes = {dtype_}, .shapes = {shape_of(part)},
             .fix = "let torch_dtype (or dtype) in config.json name the dtype of the weights"};
    if (job.kind == Kind::kVector || job.kind == Kind::kLinearF32)
      w.dtypes = {DType::kF32, DType::kF16, DType::kBF16};
    wanted.push_back(std::move(w));
  }
  for (const Wanted& w : wanted) {
    const weights::TensorEntry* entry = checkpoint.find(w.name);
    const std::string expected = weights::shape_text(w.shapes.front());
    if (entry == nullptr) {
      problems.add({.what = "tensor is absent",
                    .where = fmt::format("{}: tensor {}", checkpoint.directory(), w.name),
                    .expected = fmt::format("shape {}", expected),
                    .fix = "config.json and the weight files must belong to one checkpoint"});
      continue;
    }
    const std::string where = fmt::format("{}: tensor {}", checkpoint.path_of(*entry), w.name);
    if (std::find(w.shapes.begin(), w.shapes.end(), entry->shape) == w.shapes.end())
      problems.add({.what = "tensor of another shape", .where = where,
                    .found = weights::shape_text(entry->shape), .expected = expected,
                    .fix = "config.json and the weight files must belong to one checkpoint"});
    if (std::find(w.dtypes.begin(), w.dtypes.end(), entry->dtype) == w.dtypes.end())
      problems.add({.what = "tensor of another dtype", .where = where,
                    .found = std::string(tensor::dtype_name(entry->dtype)),
                    .expected = dtypes_text(w.dtypes), .fix = w.fix});
  }
}

void WeightPlan::verify(const weights::Checkpoint& checkpoint, Problems& problems) const {
  for (const Job& job : jobs_) {
    if (job.kind == Kind::kInput || job.kind == Kind::kOrder) continue;  // parts of another job
    for (size_t i = 0; i < job.parts.size(); ++i)
      if (!job.parts[i].name.empty())
        verify_part(job, job.parts[i], job.formats[i], checkpoint, problems);
  }
}

quant::Rows WeightPlan::read_quantised(const RowSlice& part, const quant::LinearFormat& format,
                                       Range rows, weights::WeightSource& source, Problems& problems,
                                       std::vector<int32_t>* order_out) {
  const std::string layer(layer_of(part.name));
  const auto specs = quant::parts(format, part.rows, part.cols);
  std::vector<std::vector<std::byte>> memory(specs.size());
  std::vector<quant::PartBytes> bytes;
  std::vector<int32_t> order;
  for (size_t i = 0; i < specs.size(); ++i) {
    const quant::PartSpec& spec = specs[i];
    const weights::TensorEntry& entry = source.ask(layer + spec.suffix);
    const Range units = spec.units(rows);
    const auto element = static_cast<int64_t>(tensor::dtype_bytes(entry.dtype));
    if (spec.axis == quant::PartSpec::Axis::kRows) {
      memory[i].resize(static_cast<size_t>(units.size() * entry.row_bytes()));
      source.read_rows(entry, units.begin, units.size(), memory[i].data());
    } else if (spec.axis == quant::PartSpec::Axis::kColumns) {
      memory[i].resize(static_cast<size_t>(units.size() * element * entry.rows()));
      source.read_columns(entry, units.begin * element, units.size() * element, memory[i].data());
    } else {
      memory[i].resize(static_cast<size_t>(entry.bytes));
      source.read_rows(entry, 0, entry.rows(), memory[i].data());
    }
    if (spec.role == quant::PartSpec::Role::kOrder) {
      Problems told_elsewhere;
      order = quant::read_order(format, part.cols, memory[i], layer, told_elsewhere);
      continue;
    }
    bytes.push_back({.role = spec.role, .dtype = entry.dtype, .bytes = memory[i]});
  }
  const weights::Checkpoint& checkpoint = source.checkpoint();
  const weights::TensorEntry& first = source.ask(layer + specs.front().suffix);
  if (order_out != nullptr) *order_out = order;
  return quant::assemble(format, part.cols, rows, bytes, order,
                         fmt::format("{}: layer {}", checkpoint.path_of(first), layer), problems);
}

void WeightPlan::load_vector(const Job& job, weights::WeightSource& source,
                             std::vector<std::byte>& buffer, Problems& problems) const {
  auto* out = reinterpret_cast<float*>(base_ + job.offset);
  for (const RowSlice& part : job.parts) {
    if (part.name.empty()) {
      std::fill(out, out + part.take.size(), 0.0F);
    } else {
      const weights::TensorEntry& entry = source.ask(part.name);
      buffer.resize(static_cast<size_t>(part.take.size() * entry.row_bytes()));
      source.read_rows(entry, part.take.begin, part.take.size(), buffer.data());
      widen(buffer.data(), entry.dtype, part.take.size(), out);
      check_values(job.values, {out, static_cast<size_t>(part.take.size())}, part.take.begin,
                   fmt::format("{}: tensor {}", source.checkpoint().path_of(entry), part.name),
                   problems);
    }
    out += part.take.size();
  }
}

namespace {

// use(part number, its rows, rows before them): the pieces of parts that hold taken rows
// [row_begin, row_begin + rows).
template <typename Use>
void for_parts(const std::vector<RowSlice>& parts, int64_t row_begin, int64_t rows, Use use) {
  int64_t part_begin = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t begin = std::max(row_begin, part_begin);
    const int64_t end = std::min(row_begin + rows, part_begin + parts[i].take.size());
    if (begin < end) {
      const int64_t first = parts[i].take.begin + begin - part_begin;
      use(i, Range{first, first + end - begin}, begin - row_begin);
    }
    part_begin += parts[i].take.size();
  }
}

}  // namespace

void WeightPlan::read_float(const Job& job, int64_t row_begin, int64_t rows,
                            weights::WeightSource& source, std::byte* out,
                            Problems& problems) const {
  const int64_t row_bytes = job.cols * static_cast<int64_t>(tensor::dtype_bytes(dtype_));
  for_parts(job.parts, row_begin, rows, [&](size_t i, Range take, int64_t before) {
    const RowSlice& part = job.parts[i];
    std::byte* to = out + before * row_bytes;
    if (job.formats[i] == nullptr) {
      source.read_rows(source.ask(part.name), take.begin, take.size(), to);
      return;
    }
    std::vector<int32_t> order;
    const quant::Rows quantised =
        read_quantised(part, *job.formats[i], take, source, problems, &order);
    std::vector<float> values(static_cast<size_t>(take.size() * job.cols));
    quant::dequantize(quantised, order, values.data());
    narrow(values.data(), static_cast<int64_t>(values.size()), dtype_, to);
  });
}

void WeightPlan::load_piece(const Piece& piece, weights::WeightSource& source,
                            std::vector<std::byte>& buffer, Problems& problems) const {
  const Job& job = *piece.job;
  std::byte* target = base_ + job.offset;
  if (job.kind == Kind::kVector) return load_vector(job, source, buffer, problems);
  if (job.kind == Kind::kLinearF32 || job.kind == Kind::kHeads)
    return load_widened(job, source, problems);
  if (job.kind == Kind::kInput || job.kind == Kind::kOrder) {
    const RowSlice& part = job.parts.front();
    const quant::LinearFormat& format = *job.formats.front();
    const std::string layer(layer_of(part.name));
    const std::string where = fmt::format("{}: layer {}", source.checkpoint().directory(), layer);
    std::vector<std::vector<std::byte>> memory;
    std::vector<quant::PartBytes> bytes;
    memory.reserve(8);
    for (const quant::PartSpec& spec : quant::parts(format, part.rows, part.cols)) {
      using Role = quant::PartSpec::Role;
      if (spec.role != Role::kInputScale && spec.role != Role::kInputZero &&
          spec.role != Role::kOrder)
        continue;
      const weights::TensorEntry& entry = source.ask(layer + spec.suffix);
      memory.emplace_back(static_cast<size_t>(entry.bytes));
      source.read_rows(entry, 0, entry.rows(), memory.back().data());
      bytes.push_back({.role = spec.role, .dtype = entry.dtype, .bytes = memory.back()});
      if (job.kind == Kind::kOrder && spec.role == Role::kOrder) {
        const auto order = quant::read_order(format, part.cols, memory.back(), where, problems);
        std::copy(order.begin(), order.end(), reinterpret_cast<int32_t*>(target));
      }
    }
    if (job.kind == Kind::kInput) {
      const quant::InputScale input = quant::read_input(bytes, where, problems);
      reinterpret_cast<float*>(target)[0] = input.scale;
      reinterpret_cast<float*>(target)[1] = input.offset;
    }
    return;
  }
  const int which = job.kind == Kind::kUp ? 1 : 0;
  if (job.packed.storage != quant::Storage::kFloat) {
    quant::Rows rows;
    for_parts(job.parts, piece.row_begin, piece.rows, [&](size_t i, Range take, int64_t) {
      quant::append(rows, read_quantised(job.parts[i], *job.formats[i], take, source, problems));
    });
    ops::pack_quantised(rows, piece.row_begin, job.rows, job.packed,
                        job.kind == Kind::kLinear ? 1 : 2, which, target);
    return;
  }
  const int64_t row_bytes = job.cols * static_cast<int64_t>(tensor::dtype_bytes(dtype_));
  std::byte* out = target + piece.row_begin * row_bytes;
  if (job.kind != Kind::kRows) {
    buffer.resize(static_cast<size_t>(piece.rows * row_bytes));
    out = buffer.data();
  }
  read_float(job, piece.row_begin, piece.rows, source, out, problems);
  const MatrixView rows{.data = out, .dtype = dtype_, .rows = piece.rows, .cols = job.cols,
                        .stride = job.cols};
  if (job.kind == Kind::kLinear)
    ops::pack_rows(rows, piece.row_begin, job.rows, target, isa_);
  else if (job.kind != Kind::kRows)
    ops::pack_gated_rows(rows, piece.row_begin, job.rows, which, target, isa_);
}

// Lets the disk begin with the weights of a piece.
void WeightPlan::announce(const Piece& piece, weights::WeightSource& source) {
  const Job& job = *piece.job;
  if (job.kind == Kind::kVector || job.kind == Kind::kInput || job.kind == Kind::kOrder) return;
  for_parts(job.parts, piece.row_begin, piece.rows, [&](size_t i, Range take, int64_t) {
    const RowSlice& part = job.parts[i];
    if (part.name.empty()) return;
    if (job.formats[i] == nullptr)
      return source.will_read_rows(source.ask(part.name), take.begin, take.size());
    for (const quant::PartSpec& spec : quant::parts(*job.formats[i], part.rows, part.cols)) {
      if (spec.axis != quant::PartSpec::Axis::kRows) continue;
      const Range units = spec.units(take);
      source.will_read_rows(source.ask(std::string(layer_of(part.name)) + spec.suffix),
                            units.begin, units.size());
    }
  });
}

int64_t WeightPlan::row_bytes_of(const Job& job) const {
  return std::max<int64_t>(1, job.cols) * static_cast<int64_t>(tensor::dtype_bytes(dtype_));
}

void WeightPlan::load(weights::WeightSource& source, ThreadPool& pool,
                      const std::function<void(int64_t, int64_t)>& progress,
                      const std::function<void()>& prepare) const {
  PHALANX_CHECK(base_ != nullptr);
  std::vector<Piece> pieces;
  for (const Job& job : jobs_) {
    for (size_t i = 0; i < job.parts.size(); ++i)
      if (!job.parts[i].name.empty() && job.formats[i] == nullptr)
        (void)source.ask(job.parts[i].name);
    int64_t step = job.rows;
    if (job.kind == Kind::kInput || job.kind == Kind::kOrder) {
      pieces.push_back({.job = &job, .row_begin = 0, .rows = job.rows});
      continue;
    }
    if (job.kind != Kind::kVector && job.kind != Kind::kLinearF32 && job.kind != Kind::kHeads) {
      step = std::max<int64_t>(1, kPieceBytes / row_bytes_of(job) / tensor::kPanelRows) *
             tensor::kPanelRows;
    }
    for (int64_t row = 0; row < job.rows; row += step)
      pieces.push_back({.job = &job, .row_begin = row, .rows = std::min(step, job.rows - row)});
  }
  // What the disk is asked for: neighbouring pieces together, and the number of the first one.
  std::vector<std::pair<size_t, Piece>> requests;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    if (!requests.empty() && requests.back().second.job == piece.job &&
        (requests.back().second.rows + piece.rows) * row_bytes_of(*piece.job) <= kDiskBytes)
      requests.back().second.rows += piece.rows;
    else
      requests.emplace_back(i, piece);
  }
  std::atomic<size_t> next{0};
  std::atomic<size_t> announced{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  Problems problems;  // of contents; guarded by mutex
  // Lets the disk begin with what comes after piece i.
  const auto ask = [&](size_t i) {
    for (;;) {
      const size_t first = announced.load(std::memory_order_relaxed);
      if (first >= requests.size() || requests[first].first >= i + kPiecesAhead) return;
      const size_t own = announced.fetch_add(1, std::memory_order_relaxed);
      if (own < requests.size()) announce(requests[own].second, source);
    }
  };
  ask(0);
  prepare();
  pool.run([&](int thread) {
    std::vector<std::byte> buffer;
    size_t i = 0;
    size_t end = 0;
    for (; !failed.load(std::memory_order_relaxed); ++i) {
      if (i == end) {
        i = next.fetch_add(kPiecesInTurn, std::memory_order_relaxed);
        end = std::min(i + kPiecesInTurn, pieces.size());
      }
      if (i >= pieces.size()) break;
      try {
        ask(i);
        Problems found;
        load_piece(pieces[i], source, buffer, found);
        if (!found.empty()) {
          const std::lock_guard lock(mutex);
          problems.add_all(found);
        }
      } catch (...) {
        failed.store(true, std::memory_order_relaxed);
        throw;
      }
      if (thread == 0 && progress) progress(source.bytes_read(), read_bytes_);
    }
  });
  problems.throw_if_any(
      fmt::format("checkpoint {} cannot be used", source.checkpoint().directory()));
  if (progress) progress(source.bytes_read(), read_bytes_);
}

}  // namespace phalanx::layers
