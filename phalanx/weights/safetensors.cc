#include "phalanx/weights/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "phalanx/base/json.h"

namespace phalanx::weights {
namespace {

using nlohmann::json;
using tensor::DType;

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the public implementation's own limit
constexpr int kMaxDepth = 8;
constexpr size_t kMaxDimensions = 8;
constexpr std::string_view kTruncatedFix =
    "the file is damaged or its download was cut short; fetch it again";

constexpr std::array<std::pair<std::string_view, DType>, 11> kDTypes = {{{"F32", DType::kF32},
                                                                         {"F16", DType::kF16},
                                                                         {"BF16", DType::kBF16},
                                                                         {"I8", DType::kI8},
                                                                         {"U8", DType::kU8},
                                                                         {"I16", DType::kI16},
                                                                         {"I32", DType::kI32},
                                                                         {"I64", DType::kI64},
                                                                         {"F64", DType::kF64},
                                                                         {"F8_E4M3", DType::kF8E4M3},
                                                                         {"BOOL", DType::kBool}}};

bool read_all(int fd, int64_t offset, char* out, int64_t bytes) {
  while (bytes > 0) {
    const ssize_t n = ::pread(fd, out, static_cast<size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    out += n;
    offset += n;
    bytes -= n;
  }
  return true;
}

// nlohmann keeps the last of equal keys; the second of two tensors of one name must be refused.
std::vector<std::string> doubled_names(std::string_view text) {
  std::set<std::string> seen;
  std::vector<std::string> doubled;
  const json::parser_callback_t see = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::key && depth == 1) {
      const auto& name = parsed.get_ref<const std::string&>();
      if (!seen.insert(name).second) doubled.push_back(name);
    }
    return true;
  };
  [[maybe_unused]] const json parsed = json::parse(text, see);
  return doubled;
}

std::optional<int64_t> natural(const json& value) {
  if (value.is_number_unsigned()) {
    const auto u = value.get<uint64_t>();
    if (u <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      return static_cast<int64_t>(u);
  }
  return std::nullopt;
}

std::string clipped(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

// One entry of the header; nullopt after adding a problem. Offsets are relative to the data.
std::optional<TensorEntry> read_entry(const std::string& name, const json& value,
                                      const std::string& path, int64_t data_bytes,
                                      Problems& problems) {
  const std::string where = fmt::format("{}: tensor {}", path, name);
  const auto refuse = [&](std::string what, std::string found, std::string expected,
                          std::string_view fix = "") {
    problems.add({.what = std::move(what), .where = where, .found = std::move(found),
                  .expected = std::move(expected), .fix = std::string(fix)});
    return std::nullopt;
  };
  if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") ||
      !value.contains("data_offsets"))
    return refuse("not a tensor entry", clipped(value),
                  "an object with dtype, shape and data_offsets");
  TensorEntry entry{.name = name};
  const json& dtype = value["dtype"];
  const auto known = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const auto& pair) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == pair.first;
  });
  if (known == kDTypes.end()) {
    std::vector<std::string_view> names;
    for (const auto& pair : kDTypes) names.push_back(pair.first);
    return refuse("unknown dtype", clipped(dtype), fmt::format("one of {}", fmt::join(names, ", ")));
  }
  entry.dtype = known->second;
  const json& shape = value["shape"];
  if (!shape.is_array() || shape.size() > kMaxDimensions)
    return refuse("bad shape", clipped(shape),
                  fmt::format("an array of at most {} dimensions", kMaxDimensions));
  int64_t bytes = static_cast<int64_t>(tensor::dtype_bytes(entry.dtype));
  bool overflow = false;
  for (const json& dimension : shape) {
    const auto n = natural(dimension);
    if (!n) return refuse("bad shape", clipped(shape), "non-negative integers");
    entry.shape.push_back(*n);
    overflow = overflow || __builtin_mul_overflow(bytes, *n, &bytes);
  }
  if (overflow) return refuse("shape too large", clipped(shape), "a size below 2^63 bytes");
  const json& offsets = value["data_offsets"];
  const auto begin = offsets.is_array() && offsets.size() == 2 ? natural(offsets[0]) : std::nullopt;
  const auto end = begin ? natural(offsets[1]) : std::nullopt;
  if (!begin || !end || *end < *begin)
    return refuse("bad data_offsets", clipped(offsets), "[begin, end] with begin <= end");
  if (*end > data_bytes)
    return refuse("data_offsets outside the file", clipped(offsets),
                  fmt::format("at most {} (bytes after the header)", data_bytes), kTruncatedFix);
  if (*end - *begin != bytes)
    return refuse("size does not match the shape", fmt::format("{} bytes", *end - *begin),
                  fmt::format("{} bytes for {} of dtype {}", bytes, shape_text(entry.shape),
                              tensor::dtype_name(entry.dtype)));
  entry.offset = *begin;
  entry.bytes = bytes;
  return entry;
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::vector<TensorEntry> read_safetensors_header(int fd, const std::string& path,
                                                 Problems& problems) {
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    problems.add({.what = "not a regular file", .where = path});
    return {};
  }
  std::array<unsigned char, 8> length_bytes{};
  if (st.st_size < 8 || !read_all(fd, 0, reinterpret_cast<char*>(length_bytes.data()), 8)) {
    problems.add({.what = "too short for a safetensors file", .where = path,
                  .found = fmt::format("{} bytes", st.st_size), .expected = "at least 8 bytes",
                  .fix = std::string(kTruncatedFix)});
    return {};
  }
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | length_bytes[static_cast<size_t>(i)];
  const auto limit = static_cast<uint64_t>(std::min<int64_t>(kMaxHeaderBytes, st.st_size - 8));
  if (length > limit) {
    problems.add({.what = "safetensors header larger than the file or the limit", .where = path,
                  .found = fmt::format("{} bytes", length),
                  .expected = fmt::format("at most {} (file of {} bytes)", limit, st.st_size),
                  .fix = std::string(kTruncatedFix)});
    return {};
  }
  std::string text(length, '\0');
  if (!read_all(fd, 8, text.data(), static_cast<int64_t>(length))) {
    problems.add({.what = "cannot read the safetensors header", .where = path,
                  .found = std::strerror(errno)});
    return {};
  }
  json header;
  try {
    header = parse_json(text, path, kMaxDepth);
    for (const std::string& name : doubled_names(text))
      problems.add({.what = "tensor named twice in the header",
                    .where = fmt::format("{}: tensor {}", path, name)});
  } catch (const Error& e) {
    problems.add({.what = e.what(), .where = "safetensors header"});
    return {};
  }
  if (!header.is_object()) {
    problems.add({.what = "safetensors header is not a JSON object", .where = path,
                  .found = clipped(header)});
    return {};
  }

  const int64_t data_begin = 8 + static_cast<int64_t>(length);
  const int64_t data_bytes = st.st_size - data_begin;
  const size_t problems_before = problems.list().size();
  std::vector<TensorEntry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") continue;
    if (auto entry = read_entry(name, value, path, data_bytes, problems))
      entries.push_back(std::move(*entry));
  }
  if (problems.list().size() != problems_before) return entries;

  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  int64_t covered = 0;
  for (const TensorEntry& entry : entries) {
    if (entry.offset != covered)
      problems.add({.what = entry.offset < covered ? "data_offsets overlap the tensor before"
                                                   : "hole in the data before this tensor",
                    .where = fmt::format("{}: tensor {}", path, entry.name),
                    .found = fmt::format("begin {}", entry.offset),
                    .expected = fmt::format("begin {}", covered)});
    covered = std::max(covered, entry.offset + entry.bytes);
  }
  if (covered != data_bytes && problems.list().size() == problems_before)
    problems.add({.what = "bytes after the last tensor", .where = path,
                  .found = fmt::format("{} bytes of data", data_bytes),
                  .expected = fmt::format("{}", covered)});
  for (TensorEntry& entry : entries) entry.offset += data_begin;
  return entries;
}

}  // namespace phalanx::weights
