#include "phalanx/weights/lora_files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>

#include "phalanx/base/check.h"

namespace phalanx::weights {
namespace {

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kA = ".lora_A.weight";
constexpr std::string_view kB = ".lora_B.weight";
constexpr size_t kMostTold = 2000;  // of tensors
constexpr int64_t kPieceBytes = 1 << 20;
constexpr const char* kMerge =
    "merge the adapter into its base model (PEFT's merge_and_unload) and serve that";

// Findings about tensors, of which very many are not all told.
class TensorProblems {
 public:
  TensorProblems(const std::string& path, Problems& problems) : path_(path), problems_(problems) {}
  ~TensorProblems() {
    if (count_ > kMostTold)
      problems_.add({.what = fmt::format("{} more problems of this kind", count_ - kMostTold),
                     .where = path_});
  }
  TensorProblems(const TensorProblems&) = delete;
  TensorProblems& operator=(const TensorProblems&) = delete;
  void add(std::string_view what, std::string_view tensor, std::string found, std::string expected,
           std::string fix = "") {
    if (++count_ > kMostTold) return;
    problems_.add({.what = std::string(what),
                   .where = fmt::format("{}: tensor {}", path_, tensor.substr(0, 300)),
                   .found = std::move(found),
                   .expected = std::move(expected),
                   .fix = std::move(fix)});
  }

 private:
  const std::string& path_;
  Problems& problems_;
  size_t count_ = 0;
};

struct TensorName {
  std::string_view module;
  bool b = false;
};

std::optional<TensorName> name_of(std::string_view tensor) {
  if (!tensor.starts_with(kPrefix)) return {};
  tensor.remove_prefix(kPrefix.size());
  const bool b = tensor.ends_with(kB);
  if (!b && !tensor.ends_with(kA)) return {};
  tensor.remove_suffix(kA.size());
  return TensorName{tensor, b};
}

// What a tensor is that is neither lora_A nor lora_B of a layer.
std::string_view kind_of(std::string_view tensor) {
  if (tensor.find("lora_embedding") != std::string_view::npos)
    return "an adapter of the embeddings";
  if (tensor.find("lora_magnitude") != std::string_view::npos) return "a part of DoRA";
  if (tensor.ends_with(".bias")) return "a trained bias";
  if (tensor.find("modules_to_save") != std::string_view::npos ||
      (tensor.find("lora_") == std::string_view::npos && tensor.ends_with(".weight")))
    return "a whole trained weight";
  return "a name that PEFT does not give";
}

// All of [offset, + bytes).
void read_exactly(int fd, const std::string& path, int64_t offset, int64_t bytes, std::byte* out) {
  while (bytes > 0) {
    const ssize_t n = ::pread(fd, out, static_cast<size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw Error(Code::kUnavailable,
                  fmt::format("{}: cannot read: {}", path, std::strerror(errno)));
    if (n == 0)
      throw Error(Code::kDataLoss,
                  fmt::format("{}: file ends at {}, expected {} more bytes. Fix: the file changed "
                              "while it was read; restore it and load the adapter again",
                              path, offset, bytes));
    out += n;
    offset += n;
    bytes -= n;
  }
}

}  // namespace

LoraFiles::LoraFiles(const std::string& directory, std::span<const AdaptedModule> modules,
                     const std::function<std::string(std::string_view)>& why_not, int64_t max_rank,
                     Problems& problems)
    : directory_(directory),
      config_path_(directory + "/adapter_config.json"),
      path_(directory + "/adapter_model.safetensors") {
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    problems.add({.what = "no adapter",
                  .where = directory,
                  .found = std::filesystem::exists(directory, error) ? "no directory" : "nothing",
                  .expected = "a directory with adapter_config.json and adapter_model.safetensors",
                  .fix =
                      "give the directory that PEFT's save_pretrained wrote, on every node at the "
                      "same path"});
    return;
  }
  const AdapterConfig config(config_path_, problems);
  fd_.reset(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd_.valid()) {
    const bool pickled = std::filesystem::exists(directory + "/adapter_model.bin", error);
    problems.add(
        {.what = "cannot open the adapter's weights",
         .where = path_,
         .found = pickled ? "adapter_model.bin, which is Python code" : std::strerror(errno),
         .expected = "a safetensors file",
         .fix = "save the adapter with PEFT's save_pretrained(..., safe_serialization=True)"});
    return;
  }
  std::vector<TensorEntry> entries = read_safetensors_header(fd_.get(), path_, problems);
  if (problems.empty())
    add_tensors(std::move(entries), config, modules, why_not, max_rank, problems);
}

void LoraFiles::add_tensors(std::vector<TensorEntry> entries, const AdapterConfig& config,
                            std::span<const AdaptedModule> modules,
                            const std::function<std::string(std::string_view)>& why_not,
                            int64_t max_rank, Problems& problems) {
  TensorProblems told(path_, problems);
  std::map<std::string_view, const AdaptedModule*> known;
  for (const AdaptedModule& module : modules) known.emplace(module.name, &module);
  std::map<std::string, TensorEntry, std::less<>> a, b;  // by module
  for (TensorEntry& entry : entries) {
    const std::string tensor = entry.name;
    const auto name = name_of(tensor);
    if (!name) {
      told.add("tensor that cannot be served", tensor, std::string(kind_of(tensor)),
               "base_model.model.<layer>.lora_A.weight or lora_B.weight", kMerge);
      continue;
    }
    if (!known.contains(name->module)) {
      told.add("layer that cannot be adapted", tensor, why_not(name->module),
               "a linear layer of attention or MLP of this model", kMerge);
      continue;
    }
    if (!config.targets(name->module)) {
      told.add("tensor of a layer that is not adapted", tensor,
               fmt::format("target_modules {}", config.targets_text()),
               "a layer that target_modules names", "restore adapter_config.json of this adapter");
      continue;
    }
    if (entry.dtype != tensor::DType::kF32 && entry.dtype != tensor::DType::kF16 &&
        entry.dtype != tensor::DType::kBF16) {
      told.add("dtype that cannot be used", tensor, std::string(tensor::dtype_name(entry.dtype)),
               "f32, f16 or bf16", "save the adapter in one of these");
      continue;
    }
    (name->b ? b : a).emplace(std::string(name->module), std::move(entry));
  }
  for (const AdaptedModule& module : modules) {
    if (!config.targets(module.name)) continue;
    const int64_t rank = config.rank_of(module.name, problems);
    const std::string stem = std::string(kPrefix) + module.name;
    if (rank > max_rank)
      told.add("rank above the limit", stem, std::to_string(rank),
               fmt::format("at most {} (maxLoraRank)", max_rank),
               "raise maxLoraRank, or use an adapter of lower rank");
    const auto check = [&](const auto& map, std::string_view suffix,
                           const std::vector<int64_t>& shape) -> const TensorEntry* {
      const auto at = map.find(module.name);
      if (at == map.end()) {
        told.add("tensor missing", stem + std::string(suffix), "nothing", shape_text(shape),
                 "fetch the adapter again, or restore its adapter_config.json");
        return nullptr;
      }
      if (at->second.shape == shape) return &at->second;
      told.add("tensor of another shape", stem + std::string(suffix), shape_text(at->second.shape),
               fmt::format("{} (rank {})", shape_text(shape), rank),
               "use the adapter with the base model that it was trained with");
      return nullptr;
    };
    const TensorEntry* first = check(a, kA, {rank, module.k});
    const TensorEntry* second = check(b, kB, {module.rows, rank});
    if (first == nullptr || second == nullptr) continue;
    max_rank_ = std::max(max_rank_, rank);
    pairs_.emplace(module.name, Pair{.a = *first,
                                     .b = *second,
                                     .rank = rank,
                                     .scale = config.scale_of(module.name, problems)});
  }
  if (pairs_.empty() && problems.empty())
    problems.add({.what = "adapter that adapts nothing",
                  .where = config_path_,
                  .found = fmt::format("target_modules {}", config.targets_text()),
                  .expected = "names of linear layers of this model",
                  .fix = "use the adapter with the base model that it was trained with"});
}

const LoraFiles::Pair* LoraFiles::find(std::string_view module) const {
  const auto at = pairs_.find(module);
  return at == pairs_.end() ? nullptr : &at->second;
}

void LoraFiles::read_rows(const TensorEntry& entry, int64_t row_begin, int64_t rows,
                          std::byte* out) const {
  PHALANX_CHECK(row_begin >= 0 && rows >= 0 && row_begin + rows <= entry.rows());
  read_exactly(fd_.get(), path_, entry.offset + row_begin * entry.row_bytes(),
               rows * entry.row_bytes(), out);
}

void LoraFiles::for_bytes(const std::function<void(std::string_view)>& use) const {
  std::string piece;
  const UniqueFd config(::open(config_path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  for (const int fd : {config.get(), fd_.get()}) {
    int64_t offset = 0;
    for (;;) {
      piece.resize(static_cast<size_t>(kPieceBytes));
      const ssize_t n = ::pread(fd, piece.data(), piece.size(), offset);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0)
        throw Error(Code::kUnavailable,
                    fmt::format("{}: cannot read: {}", directory_, std::strerror(errno)));
      if (n == 0) break;
      use(std::string_view(piece).substr(0, static_cast<size_t>(n)));
      offset += n;
    }
  }
}

}  // namespace phalanx::weights
