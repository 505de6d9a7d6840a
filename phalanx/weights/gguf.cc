#include "phalanx/weights/gguf.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <set>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"

namespace phalanx::weights {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr int64_t kMaxHeaderBytes = 256 << 20;
constexpr uint64_t kMaxTensors = 1 << 20;
constexpr uint64_t kMaxListItems = 1 << 24;
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr size_t kReadAhead = 1 << 20;

enum ValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64
};

void read_exactly(int fd, const std::string& path, int64_t offset, std::span<std::byte> out) {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t n = ::pread(fd, out.data() + done, out.size() - done,
                              static_cast<off_t>(offset) + static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw Error(Code::kUnavailable,
                  fmt::format("cannot read {}: {}", path, std::strerror(errno)));
    if (n == 0)
      throw Error(Code::kDataLoss,
                  fmt::format("{}: the file became shorter while it was read, at byte {}", path,
                              offset + static_cast<int64_t>(done)));
    done += static_cast<size_t>(n);
  }
}

std::string_view kind_of(const GgufValue& value) {
  constexpr std::string_view kinds[] = {
      "an integer",         "a number",          "a text",
      "a list of integers", "a list of numbers", "a list of texts"};
  return kinds[value.index()];
}

}  // namespace

// Reads the header front to back; knows where it is, for messages.
class GgufHeaderReader {
 public:
  explicit GgufHeaderReader(GgufFile& file) : file_(file) {
    struct stat st {};
    if (::fstat(file_.fd_.get(), &st) != 0 || !S_ISREG(st.st_mode)) fail("not a regular file");
    size_ = st.st_size;
  }

  void read() {
    if (size_ < 24) fail(fmt::format("found {} bytes, expected a GGUF file (at least 24)", size_));
    const auto magic = scalar<uint32_t>("magic");
    if (magic != kMagic)
      fail(fmt::format("not a GGUF file: begins with 0x{:08x}, expected 0x{:08x} (\"GGUF\")", magic,
                       kMagic));
    const auto version = scalar<uint32_t>("version");
    if (version != 0 && (version & 0xffff) == 0)
      fail("a big-endian GGUF file; only little-endian ones are read");
    if (version != 2 && version != 3)
      fail(fmt::format("GGUF version {}, expected 2 or 3. Fix: convert the model again", version));
    const auto tensor_count = scalar<uint64_t>("tensor count");
    const auto value_count = scalar<uint64_t>("metadata count");
    // A tensor needs at least 8 + 4 + 8 + 4 + 8 bytes of header, a value 8 + 4 + 1.
    check_count(tensor_count, 32, "tensors");
    check_count(value_count, 13, "metadata values");
    if (tensor_count > kMaxTensors)
      fail(fmt::format("claims {} tensors, expected at most {}", tensor_count, kMaxTensors));
    for (uint64_t i = 0; i < value_count; ++i) read_value();
    read_tensors(tensor_count);
  }

 private:
  [[noreturn]] void fail(const std::string& what, Code code = Code::kInvalidArgument) const {
    throw Error(code, fmt::format("{}: {}", file_.path_, what));
  }

  int64_t left() const { return std::min(size_, kMaxHeaderBytes) - at_; }

  void check_count(uint64_t count, uint64_t bytes_each, std::string_view what) const {
    if (count > static_cast<uint64_t>(left()) / bytes_each)
      fail(fmt::format("claims {} {} at byte {}, but only {} bytes follow", count, what, at_,
                       left()));
  }

  std::span<const std::byte> take(uint64_t n, std::string_view what) {
    if (n > static_cast<uint64_t>(left()))
      fail(fmt::format("{} at byte {} needs {} bytes, but only {} follow in the header's bounds",
                       what, at_, n, left()));
    const auto length = static_cast<int64_t>(n);
    if (at_ < buffer_at_ || at_ + length > buffer_at_ + static_cast<int64_t>(buffer_.size())) {
      buffer_at_ = at_;
      buffer_.resize(
          static_cast<size_t>(std::min(size_ - at_, std::max<int64_t>(length, kReadAhead))));
      read_exactly(file_.fd_.get(), file_.path_, at_, buffer_);
    }
    const auto bytes =
        std::span<const std::byte>(buffer_).subspan(static_cast<size_t>(at_ - buffer_at_), n);
    at_ += length;
    return bytes;
  }

  template <typename T>
  T scalar(std::string_view what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  std::string string(std::string_view what) {
    const auto length = scalar<uint64_t>(what);
    const auto bytes = take(length, what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  int64_t integer(uint32_t type, std::string_view what) {
    switch (type) {
      case kUint8:
        return scalar<uint8_t>(what);
      case kInt8:
        return scalar<int8_t>(what);
      case kUint16:
        return scalar<uint16_t>(what);
      case kInt16:
        return scalar<int16_t>(what);
      case kUint32:
        return scalar<uint32_t>(what);
      case kInt32:
        return scalar<int32_t>(what);
      case kInt64:
        return scalar<int64_t>(what);
      case kBool: {
        const auto value = scalar<uint8_t>(what);
        if (value > 1) fail(fmt::format("{}: found {}, expected a boolean (0 or 1)", what, value));
        return value;
      }
      default: {
        const auto value = scalar<uint64_t>(what);
        if (value > static_cast<uint64_t>(INT64_MAX))
          fail(fmt::format("{}: found {}, expected at most {}", what, value, INT64_MAX));
        return static_cast<int64_t>(value);
      }
    }
  }

  void read_value() {
    const std::string key = string("metadata key");
    if (key.empty() || key.size() > 65535)
      fail(fmt::format("metadata key of {} bytes, expected 1 to 65535", key.size()));
    const auto type = scalar<uint32_t>(key);
    GgufValue value = type == kArray ? array(key) : single(type, key);
    if (!file_.metadata_.emplace(key, std::move(value)).second)
      fail(fmt::format("metadata key {} occurs twice", key));
  }

  GgufValue single(uint32_t type, const std::string& key) {
    if (type == kString) return string(key);
    if (type == kFloat32) return static_cast<double>(scalar<float>(key));
    if (type == kFloat64) return scalar<double>(key);
    if (type > kFloat64) fail(fmt::format("{}: unknown value type {}", key, type));
    return integer(type, key);
  }

  GgufValue array(const std::string& key) {
    constexpr uint64_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};
    const auto type = scalar<uint32_t>(key);
    const auto count = scalar<uint64_t>(key);
    if (type > kFloat64) fail(fmt::format("{}: list of unknown value type {}", key, type));
    if (type == kArray) fail(fmt::format("{}: lists of lists are not read", key));
    check_count(count, sizes[type], fmt::format("values of {}", key));
    if (count > kMaxListItems)
      fail(fmt::format("{}: list of {} values, expected at most {}", key, count, kMaxListItems));
    if (type == kString) {
      std::vector<std::string> list(count);
      for (std::string& item : list) item = string(key);
      return list;
    }
    if (type == kFloat32 || type == kFloat64) {
      std::vector<double> list(count);
      for (double& item : list)
        item = type == kFloat32 ? static_cast<double>(scalar<float>(key)) : scalar<double>(key);
      return list;
    }
    std::vector<int64_t> list(count);
    for (int64_t& item : list) item = integer(type, key);
    return list;
  }

  void read_tensors(uint64_t count) {
    const int64_t alignment = file_.integer("general.alignment", 32);
    if (alignment < 1 || alignment > static_cast<int64_t>(kMaxAlignment) ||
        !std::has_single_bit(static_cast<uint64_t>(alignment)))
      fail(fmt::format("general.alignment: found {}, expected a power of two up to {}", alignment,
                       kMaxAlignment));
    std::set<std::string> names;
    for (uint64_t i = 0; i < count; ++i) {
      file_.tensors_.push_back(read_tensor());
      const std::string& name = file_.tensors_.back().name;
      if (!names.insert(name).second) fail(fmt::format("tensor {} occurs twice", name));
    }
    const int64_t data = (at_ + alignment - 1) / alignment * alignment;
    for (GgufTensor& tensor : file_.tensors_) place(tensor, data, alignment);
    check_overlap();
  }

  GgufTensor read_tensor() {
    GgufTensor tensor;
    tensor.name = string("tensor name");
    if (tensor.name.empty() || tensor.name.size() > 255)
      fail(fmt::format("tensor name of {} bytes, expected 1 to 255", tensor.name.size()));
    const auto dimensions = scalar<uint32_t>(tensor.name);
    if (dimensions < 1 || dimensions > 4)
      fail(fmt::format("tensor {}: found {} dimensions, expected 1 to 4", tensor.name, dimensions));
    int64_t elements = 1;
    for (uint32_t i = 0; i < dimensions; ++i) {
      const auto size = scalar<uint64_t>(tensor.name);
      if (size < 1 || size > static_cast<uint64_t>(INT64_MAX) ||
          __builtin_mul_overflow(elements, static_cast<int64_t>(size), &elements) ||
          elements > INT64_MAX / 8)
        fail(fmt::format("tensor {}: dimension {} of {} elements cannot be", tensor.name, i, size));
      tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
    }
    const auto type = scalar<uint32_t>(tensor.name);
    if (!gguf_type_supported(type))
      fail(fmt::format(
               "tensor {} has the type {} ({}), which cannot be imported. Expected F32, F16, BF16, "
               "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K. Fix: take a file of another "
               "quantisation, such as Q8_0 or Q4_K_M",
               tensor.name, gguf_type_name(type), type),
           Code::kUnimplemented);
    tensor.type = static_cast<GgufType>(type);
    const GgufBlock block = gguf_block(tensor.type);
    if (tensor.row_elements() % block.elements != 0)
      fail(fmt::format("tensor {}: rows of {} elements, expected a multiple of {} for {}",
                       tensor.name, tensor.row_elements(), block.elements, gguf_type_name(type)));
    if (__builtin_mul_overflow(elements / block.elements, block.bytes, &tensor.bytes))
      fail(fmt::format("tensor {}: {} elements cannot be", tensor.name, elements));
    const auto offset = scalar<uint64_t>(tensor.name);
    if (offset > static_cast<uint64_t>(size_))
      fail(fmt::format("tensor {}: offset {} lies beyond the end of the file ({} bytes)",
                       tensor.name, offset, size_));
    tensor.offset = static_cast<int64_t>(offset);
    return tensor;
  }

  void place(GgufTensor& tensor, int64_t data, int64_t alignment) const {
    if (tensor.offset % alignment != 0)
      fail(fmt::format("tensor {}: offset {} is not a multiple of the alignment {}", tensor.name,
                       tensor.offset, alignment));
    tensor.offset += data;
    if (tensor.offset > size_ || tensor.bytes > size_ - tensor.offset)
      fail(fmt::format(
          "tensor {}: bytes {} to {} lie beyond the end of the file ({} bytes); the file is "
          "truncated. Fix: fetch it again",
          tensor.name, tensor.offset, tensor.offset + tensor.bytes, size_));
  }

  void check_overlap() const {
    std::vector<const GgufTensor*> sorted;
    for (const GgufTensor& tensor : file_.tensors_) sorted.push_back(&tensor);
    std::sort(sorted.begin(), sorted.end(),
              [](const GgufTensor* a, const GgufTensor* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < sorted.size(); ++i)
      if (sorted[i - 1]->offset + sorted[i - 1]->bytes > sorted[i]->offset)
        fail(fmt::format("tensors {} and {} overlap at byte {}", sorted[i - 1]->name,
                         sorted[i]->name, sorted[i]->offset));
  }

  GgufFile& file_;
  int64_t size_ = 0;
  int64_t at_ = 0;
  int64_t buffer_at_ = 0;
  std::vector<std::byte> buffer_;
};

int64_t GgufTensor::rows() const {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return rows;
}

GgufFile GgufFile::open(const std::string& path) {
  GgufFile file;
  file.path_ = path;
  file.fd_ = UniqueFd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.fd_.valid())
    throw Error(Code::kNotFound, fmt::format("cannot open {}: {}", path, std::strerror(errno)));
  GgufHeaderReader(file).read();
  return file;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  for (const GgufTensor& tensor : tensors_)
    if (tensor.name == name) return &tensor;
  return nullptr;
}

const GgufValue* GgufFile::find(const std::string& key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

void GgufFile::wrong_type(const std::string& key, const GgufValue* found,
                          std::string_view expected) const {
  throw Error(Code::kInvalidArgument,
              fmt::format("{}: metadata {}: found {}, expected {}", path_, key,
                          found ? kind_of(*found) : "nothing", expected));
}

int64_t GgufFile::integer(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr || !std::holds_alternative<int64_t>(*value))
    wrong_type(key, value, "an integer");
  return std::get<int64_t>(*value);
}

int64_t GgufFile::integer(const std::string& key, int64_t otherwise) const {
  return has(key) ? integer(key) : otherwise;
}

double GgufFile::number(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value != nullptr && std::holds_alternative<int64_t>(*value))
    return static_cast<double>(std::get<int64_t>(*value));
  if (value == nullptr || !std::holds_alternative<double>(*value))
    wrong_type(key, value, "a number");
  return std::get<double>(*value);
}

double GgufFile::number(const std::string& key, double otherwise) const {
  return has(key) ? number(key) : otherwise;
}

std::string GgufFile::text(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr || !std::holds_alternative<std::string>(*value))
    wrong_type(key, value, "a text");
  return std::get<std::string>(*value);
}

std::string GgufFile::text(const std::string& key, const std::string& otherwise) const {
  return has(key) ? text(key) : otherwise;
}

std::vector<std::string> GgufFile::texts(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  if (!std::holds_alternative<std::vector<std::string>>(*value))
    wrong_type(key, value, "a list of texts");
  return std::get<std::vector<std::string>>(*value);
}

std::vector<int64_t> GgufFile::integers(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  if (!std::holds_alternative<std::vector<int64_t>>(*value))
    wrong_type(key, value, "a list of integers");
  return std::get<std::vector<int64_t>>(*value);
}

std::vector<double> GgufFile::numbers(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return {};
  if (std::holds_alternative<std::vector<int64_t>>(*value)) {
    const auto& list = std::get<std::vector<int64_t>>(*value);
    return {list.begin(), list.end()};
  }
  if (!std::holds_alternative<std::vector<double>>(*value))
    wrong_type(key, value, "a list of numbers");
  return std::get<std::vector<double>>(*value);
}

void GgufFile::read_rows(const GgufTensor& tensor, int64_t first, std::span<float> out) const {
  const int64_t row = tensor.row_elements();
  const int64_t count = static_cast<int64_t>(out.size()) / row;
  PHALANX_CHECK(count * row == static_cast<int64_t>(out.size()));
  PHALANX_CHECK(first >= 0 && first <= tensor.rows() - count);
  const GgufBlock block = gguf_block(tensor.type);
  const int64_t row_bytes = row / block.elements * block.bytes;
  std::vector<std::byte> stored(static_cast<size_t>(count * row_bytes));
  read_exactly(fd_.get(), path_, tensor.offset + first * row_bytes, stored);
  gguf_dequantize(tensor.type, stored, out);
}

}  // namespace phalanx::weights
