#include "phalanx/quant/format.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "phalanx/base/check.h"

namespace phalanx::quant {
namespace {

using Role = PartSpec::Role;
using Axis = PartSpec::Axis;

// Elements of a little-endian tensor, any alignment.
class Elements {
 public:
  explicit Elements(const PartBytes& part) : part_(part), bytes_(tensor::dtype_bytes(part.dtype)) {}
  [[nodiscard]] int64_t size() const { return static_cast<int64_t>(part_.bytes.size() / bytes_); }
  [[nodiscard]] float number(int64_t i) const {
    switch (part_.dtype) {
      case DType::kF32: return at<float>(i);
      case DType::kBF16: return tensor::bf16_to_f32(at<uint16_t>(i));
      case DType::kF16: return tensor::f16_to_f32(at<uint16_t>(i));
      case DType::kI8: return at<int8_t>(i);
      default: PHALANX_CHECK(!"a number"); return 0;
    }
  }
  template <typename T>
  [[nodiscard]] T at(int64_t i) const {
    PHALANX_CHECK(sizeof(T) == bytes_ && i >= 0 && i < size());
    T value;
    std::memcpy(&value, part_.bytes.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    return value;
  }

 private:
  const PartBytes& part_;
  size_t bytes_;
};

const PartBytes* find(std::span<const PartBytes> parts, Role role) {
  for (const PartBytes& part : parts)
    if (part.role == role) return &part;
  return nullptr;
}

const PartBytes& need(std::span<const PartBytes> parts, Role role) {
  const PartBytes* part = find(parts, role);
  PHALANX_CHECK(part != nullptr);
  return *part;
}

// Counts what is not finite; one problem per tensor and range.
class Finite {
 public:
  Finite(const std::string& where, const char* what) : where_(where), what_(what) {}
  float operator()(float v, int64_t row) {
    if (!std::isfinite(v)) {
      if (count_++ == 0) {
        first_ = v;
        row_ = row;
      }
      return 0;
    }
    return v;
  }
  void report(Problems& problems) const {
    if (count_ == 0) return;
    problems.add({.what = fmt::format("{} that is not a finite number", what_), .where = where_,
                  .found = fmt::format("{} of them, the first {} in row {}", count_, first_, row_),
                  .expected = "finite values",
                  .fix = "the file is damaged or the quantisation failed: make or fetch it again"});
  }

 private:
  const std::string& where_;
  const char* what_;
  int64_t count_ = 0;
  float first_ = 0;
  int64_t row_ = 0;
};

uint8_t nibble(uint32_t word, int64_t i) { return static_cast<uint8_t>(word >> (4 * i) & 15U); }

// AWQ's order of the eight columns within an int32.
constexpr int kAwqPlace[8] = {0, 4, 1, 5, 2, 6, 3, 7};

const std::vector<DType> kFloats = {DType::kF32, DType::kF16, DType::kBF16};

}  // namespace

bool LinearFormat::packs_with(const LinearFormat& other, int64_t k) const {
  return storage == other.storage && storage != Storage::kFloat && !static_input &&
         !other.static_input && !order && !other.order && group_of(k) == other.group_of(k) &&
         (storage == Storage::kInt8 || storage == Storage::kCodes8 || zeros == other.zeros);
}

const LinearFormat* Formats::find(std::string_view layer) const {
  const auto at = linears.find(layer);
  return at == linears.end() ? nullptr : &at->second;
}

std::string Formats::summary() const {
  std::map<std::string, int64_t> counts;
  for (const auto& [name, format] : linears) ++counts[format.name];
  if (counts.empty()) return "float";
  std::string text;
  for (const auto& [name, count] : counts)
    text += fmt::format("{}{} ({} layers)", text.empty() ? "" : ", ", name, count);
  if (!norm_biases.empty()) text += fmt::format(", {} norms with biases", norm_biases.size());
  return text;
}

std::vector<PartSpec> parts(const LinearFormat& f, int64_t n, int64_t k) {
  const int64_t groups = f.groups(k);
  const int64_t per_word = 32 / f.bits;
  const auto words = [&](int64_t count) { return (count + per_word - 1) / per_word; };
  const std::vector<DType> int8 = {DType::kI8};
  const std::vector<DType> int32 = {DType::kI32};
  const PartSpec weight{.role = Role::kCodes, .suffix = ".weight", .dtypes = int8, .shape = {n, k}};
  const PartSpec channel_scale =
      f.scalar_scale
          ? PartSpec{.role = Role::kScale, .suffix = ".weight_scale", .dtypes = kFloats,
                     .shape = {1}, .other_shape = {}, .axis = Axis::kWhole}
          : PartSpec{.role = Role::kScale, .suffix = ".weight_scale", .dtypes = kFloats,
                     .shape = {n, 1}, .other_shape = {n}};
  switch (f.scheme) {
    case Scheme::kFloat: return {};
    case Scheme::kMsW8A8:
      return {weight,
              {Role::kInputScale, ".input_scale", kFloats, {1}, {}, Axis::kWhole, 1},
              {Role::kInputZero, ".input_offset", kFloats, {1}, {}, Axis::kWhole, 1},
              {Role::kQuantBias, ".quant_bias", int32, {n}, {n, 1}, Axis::kRows, 1},
              {Role::kDeqScale, ".deq_scale", {DType::kF32, DType::kI64}, {n}, {n, 1}, Axis::kRows,
               1}};
    case Scheme::kMsW8A8Dynamic:
    case Scheme::kMsW8A16: {
      std::vector<PartSpec> result = {weight, channel_scale};
      if (f.zeros)
        result.push_back({Role::kZero, ".weight_offset", kFloats, {n, 1}, {n}, Axis::kRows, 1});
      return result;
    }
    case Scheme::kCtInt8:
    case Scheme::kCtWeightInt8: {
      PartSpec scale = channel_scale;
      if (f.group != 0) {
        scale.shape = {n, groups};
        scale.other_shape.clear();
      }
      std::vector<PartSpec> result = {weight, scale};
      if (f.zeros) {
        PartSpec zero = scale;
        zero.role = Role::kZero;
        zero.suffix = ".weight_zero_point";
        zero.dtypes = int8;
        result.push_back(zero);
      }
      if (f.static_input)
        result.push_back({Role::kInputScale, ".input_scale", kFloats, {1}, {}, Axis::kWhole, 1});
      if (f.static_input && f.input_zeros)
        result.push_back({Role::kInputZero, ".input_zero_point", int8, {1}, {}, Axis::kWhole, 1});
      return result;
    }
    case Scheme::kCtPacked: {
      std::vector<PartSpec> result = {
          {Role::kCodes, ".weight_packed", int32, {n, words(k)}, {}, Axis::kRows, 1},
          {Role::kScale, ".weight_scale", kFloats, {n, groups}, {}, Axis::kRows, 1}};
      if (f.zeros)
        result.push_back({Role::kZero, ".weight_zero_point", int32, {words(n), groups}, {},
                          Axis::kRows, per_word});
      if (f.order)
        result.push_back({Role::kOrder, ".weight_g_idx", int32, {k}, {}, Axis::kWhole, 1});
      return result;
    }
    case Scheme::kFp8:
      return {{Role::kCodes, ".weight", {DType::kF8E4M3}, {n, k}, {}, Axis::kRows, 1},
              f.group == 0
                  ? PartSpec{Role::kScale, ".weight_scale", kFloats, {n, 1}, {n}, Axis::kRows, 1}
                  : PartSpec{Role::kScale, ".weight_scale_inv", kFloats,
                             {(n + f.block_rows - 1) / f.block_rows, groups}, {}, Axis::kRows,
                             f.block_rows}};
    case Scheme::kAwq:
      return {{Role::kCodes, ".qweight", int32, {k, n / 8}, {}, Axis::kColumns, 8},
              {Role::kScale, ".scales", kFloats, {groups, n}, {}, Axis::kColumns, 1},
              {Role::kZero, ".qzeros", int32, {groups, n / 8}, {}, Axis::kColumns, 8}};
    case Scheme::kGptq: {
      std::vector<PartSpec> result = {
          {Role::kCodes, ".qweight", int32, {words(k), n}, {}, Axis::kColumns, 1},
          {Role::kScale, ".scales", kFloats, {groups, n}, {}, Axis::kColumns, 1},
          {Role::kZero, ".qzeros", int32, {groups, words(n)}, {}, Axis::kColumns, per_word}};
      if (f.order) result.push_back({Role::kOrder, ".g_idx", int32, {k}, {}, Axis::kWhole, 1});
      return result;
    }
  }
  return {};
}

float value_of(Storage storage, uint8_t code) {
  switch (storage) {
    case Storage::kCodes4: return static_cast<float>(code & 15) - 8.0F;
    case Storage::kCodes8: {
      const float v = static_cast<float>(code & 127) + 0.5F;
      return (code & 128) != 0 ? -v : v;
    }
    case Storage::kCodesFp8: {
      const int exponent = code >> 3 & 15;
      const int mantissa = code & 7;
      if (exponent == 15 && mantissa == 7) return std::nanf("");
      const float v = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                    : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
      return (code & 128) != 0 ? -v : v;
    }
    default: return static_cast<float>(static_cast<int8_t>(code));
  }
}

uint8_t code_of_int8(int8_t q) {
  const auto u = static_cast<uint8_t>(q);
  return q < 0 ? static_cast<uint8_t>(0x80U | (~u & 0x7fU)) : u;
}

std::vector<int32_t> read_order(const LinearFormat& f, int64_t k, std::span<const std::byte> g_idx,
                                const std::string& where, Problems& problems) {
  const PartBytes part{Role::kOrder, DType::kI32, g_idx};
  const Elements group_of(part);
  PHALANX_CHECK(group_of.size() == k);
  const int64_t groups = f.groups(k);
  std::vector<int64_t> count(static_cast<size_t>(groups));
  for (int64_t i = 0; i < k; ++i) {
    const auto g = group_of.at<int32_t>(i);
    if (g < 0 || g >= groups) {
      problems.add({.what = "group index out of range", .where = where,
                    .found = fmt::format("{} at column {}", g, i),
                    .expected = fmt::format("0 to {}", groups - 1)});
      return {};
    }
    ++count[static_cast<size_t>(g)];
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t expected = std::min(f.group_of(k), k - g * f.group_of(k));
    if (count[static_cast<size_t>(g)] != expected) {
      problems.add({.what = "group of another size", .where = where,
                    .found = fmt::format("{} columns in group {}", count[static_cast<size_t>(g)], g),
                    .expected = fmt::format("{} columns", expected)});
      return {};
    }
  }
  std::vector<int32_t> order(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) order[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return group_of.at<int32_t>(a) < group_of.at<int32_t>(b);
  });
  return order;
}

InputScale read_input(std::span<const PartBytes> parts, const std::string& where,
                      Problems& problems) {
  InputScale input{.scale = Elements(need(parts, Role::kInputScale)).number(0)};
  if (const PartBytes* zero = find(parts, Role::kInputZero)) input.offset = Elements(*zero).number(0);
  if (!std::isfinite(input.scale) || input.scale <= 0 || !std::isfinite(input.offset) ||
      std::fabs(input.offset) > 256)
    problems.add({.what = "scale of activations that cannot be used", .where = where,
                  .found = fmt::format("scale {}, offset {}", input.scale, input.offset),
                  .expected = "a positive scale and an offset of -128 to 127"});
  return input;
}

namespace {

// Codes of rows [0, count) as [count][k], before any reordering.
void read_codes(const LinearFormat& f, int64_t k, Range rows, const PartBytes& part, Rows& out) {
  const int64_t count = rows.size();
  const Elements elements(part);
  uint8_t* codes = out.codes.data();
  switch (f.scheme) {
    case Scheme::kAwq: {
      const int64_t first = rows.begin / 8;
      const int64_t columns = (rows.end + 7) / 8 - first;
      for (int64_t i = 0; i < k; ++i)
        for (int64_t r = 0; r < count; ++r) {
          const int64_t row = rows.begin + r;
          codes[r * k + i] =
              nibble(elements.at<uint32_t>(i * columns + row / 8 - first), kAwqPlace[row % 8]);
        }
      return;
    }
    case Scheme::kGptq: {
      const int64_t per_word = 32 / f.bits;
      const uint32_t mask = (1U << f.bits) - 1U;
      for (int64_t i = 0; i < k; ++i)
        for (int64_t r = 0; r < count; ++r) {
          const auto word = elements.at<uint32_t>(i / per_word * count + r);
          const auto q = static_cast<uint8_t>(word >> (f.bits * (i % per_word)) & mask);
          codes[r * k + i] = f.bits == 4 ? q : code_of_int8(static_cast<int8_t>(q - 128));
        }
      return;
    }
    case Scheme::kCtPacked: {
      const int64_t per_word = 32 / f.bits;
      const int64_t words = (k + per_word - 1) / per_word;
      const uint32_t mask = (1U << f.bits) - 1U;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < k; ++i) {
          const auto word = elements.at<uint32_t>(r * words + i / per_word);
          const auto q = static_cast<uint8_t>(word >> (f.bits * (i % per_word)) & mask);
          codes[r * k + i] = f.bits == 4 ? q : code_of_int8(static_cast<int8_t>(q - 128));
        }
      return;
    }
    default: break;
  }
  PHALANX_CHECK(elements.size() == count * k);
  if (count * k > 0) std::memcpy(codes, part.bytes.data(), static_cast<size_t>(count * k));
  if (out.storage == Storage::kCodes8)
    for (int64_t i = 0; i < count * k; ++i)
      codes[i] = code_of_int8(static_cast<int8_t>(codes[i]));
}

// Zero point of (row, group) as the checkpoint means it, in the numbers of its codes.
float zero_at(const LinearFormat& f, const Elements& zeros, Range rows, int64_t r, int64_t g,
              int64_t groups) {
  const int64_t row = rows.begin + r;
  const int64_t per_word = 32 / f.bits;
  const uint32_t mask = (1U << f.bits) - 1U;
  const int64_t first = rows.begin / per_word;
  switch (f.scheme) {
    case Scheme::kAwq: {
      const int64_t columns = (rows.end + 7) / 8 - first;
      return nibble(zeros.at<uint32_t>(g * columns + row / 8 - first), kAwqPlace[row % 8]);
    }
    case Scheme::kGptq: {
      const int64_t columns = (rows.end + per_word - 1) / per_word - first;
      const auto word = zeros.at<uint32_t>(g * columns + row / per_word - first);
      const auto stored = word >> (f.bits * (row % per_word)) & mask;
      return static_cast<float>(f.zeros_minus_one ? (stored + 1) & mask : stored);
    }
    case Scheme::kCtPacked: {
      const auto word = zeros.at<uint32_t>((row / per_word - first) * groups + g);
      return static_cast<float>(word >> (f.bits * (row % per_word)) & mask);
    }
    default: return zeros.number(zeros.size() == 1 ? 0 : r * groups + g);
  }
}

float scale_at(const LinearFormat& f, const Elements& scales, Range rows, int64_t r, int64_t g,
               int64_t groups) {
  if (f.scheme == Scheme::kAwq || f.scheme == Scheme::kGptq)
    return scales.number(g * rows.size() + r);
  if (f.scalar_scale) return scales.number(0);
  const int64_t unit = (rows.begin + r) / f.block_rows - rows.begin / f.block_rows;
  return scales.number(unit * groups + g);
}

// What the zero point of the codes' numbers is in the numbers of value_of.
float shift_of(const LinearFormat& f) {
  const bool unsigned_codes =
      f.scheme == Scheme::kAwq || f.scheme == Scheme::kGptq || f.scheme == Scheme::kCtPacked;
  if (f.storage == Storage::kCodes4) return -8.0F;
  if (f.storage == Storage::kCodes8) return kCodes8Zero - (unsigned_codes ? 128.0F : 0.0F);
  return 0;
}

}  // namespace

Rows assemble(const LinearFormat& f, int64_t k, Range rows, std::span<const PartBytes> parts,
              std::span<const int32_t> order, const std::string& where, Problems& problems) {
  const int64_t count = rows.size();
  const int64_t groups = f.groups(k);
  Rows out{.storage = f.storage, .rows = count, .k = k, .group = f.group_of(k)};
  out.codes.resize(static_cast<size_t>(count * k));
  out.scale.resize(static_cast<size_t>(count * groups));
  read_codes(f, k, rows, need(parts, Role::kCodes), out);

  Finite finite_scale(where, "scale");
  Finite finite_zero(where, "zero point");
  if (f.scheme == Scheme::kMsW8A8) {
    const PartBytes& deq = need(parts, Role::kDeqScale);
    const Elements scales(deq);
    const Elements bias(need(parts, Role::kQuantBias));
    out.add.resize(static_cast<size_t>(count));
    for (int64_t r = 0; r < count; ++r) {
      // Packed: the low 32 bits are those of the f32.
      float scale = 0;
      if (deq.dtype == DType::kI64) {
        const auto low = static_cast<uint32_t>(scales.at<int64_t>(r));
        std::memcpy(&scale, &low, sizeof scale);
      } else {
        scale = scales.number(r);
      }
      out.scale[static_cast<size_t>(r)] = finite_scale(scale, rows.begin + r);
      out.add[static_cast<size_t>(r)] = bias.at<int32_t>(r);
    }
    finite_scale.report(problems);
    return out;
  }

  const Elements scales(need(parts, Role::kScale));
  const float shift = shift_of(f);
  const PartBytes* zero_part = f.zeros ? &need(parts, Role::kZero) : nullptr;
  if (f.zeros || f.storage == Storage::kCodes8) out.zero.resize(out.scale.size());
  for (int64_t r = 0; r < count; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const auto at = static_cast<size_t>(r * groups + g);
      out.scale[at] = finite_scale(scale_at(f, scales, rows, r, g, groups), rows.begin + r);
      if (zero_part != nullptr)
        out.zero[at] =
            finite_zero(zero_at(f, Elements(*zero_part), rows, r, g, groups), rows.begin + r) + shift;
      else if (!out.zero.empty())
        out.zero[at] = kCodes8Zero;
    }
  finite_scale.report(problems);
  finite_zero.report(problems);

  if (f.storage == Storage::kInt8) {
    out.add.resize(static_cast<size_t>(count));
    if (f.static_input) {
      // sum((x_q - offset) * (q - zero)), and the input's scale goes into the row's.
      Problems told_elsewhere;
      const InputScale input = read_input(parts, where, told_elsewhere);
      for (int64_t r = 0; r < count; ++r) {
        int64_t sum = 0;
        for (int64_t i = 0; i < k; ++i)
          sum += static_cast<int8_t>(out.codes[static_cast<size_t>(r * k + i)]);
        const int64_t offset = std::lrint(input.offset);
        int64_t add = -offset * sum;
        if (!out.zero.empty()) add += offset * k * std::lrint(out.zero[static_cast<size_t>(r)]);
        out.add[static_cast<size_t>(r)] = static_cast<int32_t>(add);
        out.scale[static_cast<size_t>(r)] *= input.scale;
      }
    }
  }
  if (!order.empty()) {
    std::vector<uint8_t> row(static_cast<size_t>(k));
    for (int64_t r = 0; r < count; ++r) {
      uint8_t* codes = out.codes.data() + r * k;
      for (int64_t i = 0; i < k; ++i) row[static_cast<size_t>(i)] = codes[order[static_cast<size_t>(i)]];
      std::memcpy(codes, row.data(), row.size());
    }
  }
  return out;
}

void append(Rows& rows, Rows more) {
  if (rows.rows == 0) {
    rows = std::move(more);
    return;
  }
  PHALANX_CHECK(rows.storage == more.storage && rows.k == more.k && rows.group == more.group);
  // Rows without zero points beside rows with: kInt8 only, where zero means none.
  if (rows.zero.empty() != more.zero.empty()) {
    PHALANX_CHECK(rows.storage == Storage::kInt8);
    rows.zero.resize(rows.scale.size());
    more.zero.resize(more.scale.size());
  }
  const auto join = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  join(rows.codes, more.codes);
  join(rows.scale, more.scale);
  join(rows.zero, more.zero);
  join(rows.add, more.add);
  rows.rows += more.rows;
}

void dequantize(const Rows& rows, std::span<const int32_t> order, float* out) {
  const int64_t groups = rows.k == 0 ? 0 : (rows.k + rows.group - 1) / rows.group;
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t i = 0; i < rows.k; ++i) {
      const auto at = static_cast<size_t>(r * groups + i / rows.group);
      const float zero = rows.zero.empty() ? 0.0F : rows.zero[at];
      const int64_t column = order.empty() ? i : order[static_cast<size_t>(i)];
      out[r * rows.k + column] =
          rows.scale[at] *
          (value_of(rows.storage, rows.codes[static_cast<size_t>(r * rows.k + i)]) - zero);
    }
}

}  // namespace phalanx::quant
