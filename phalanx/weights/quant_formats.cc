#include "phalanx/weights/quant_formats.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <set>

#include "phalanx/base/json.h"
#include "phalanx/weights/checkpoint.h"

namespace phalanx::weights {
namespace {

using nlohmann::json;
using quant::LinearFormat;
using quant::Scheme;
using quant::Storage;
using tensor::DType;

constexpr const char* kSupported =
    "msModelSlim W8A8, W8A8_DYNAMIC, W8A8_MIX, W8A16; compressed-tensors int-quantized (8 bits) and "
    "pack-quantized (4 or 8 bits), float-quantized (weights); fp8 in blocks; awq; gptq";

struct Reader {
  std::string config_path;
  const Checkpoint& checkpoint;
  quant::Formats& formats;
  Problems& problems;

  void refuse(std::string what, const std::string& where, std::string found,
              std::string expected = kSupported, std::string fix = "use another checkpoint") const {
    problems.add({.what = std::move(what), .where = where, .found = std::move(found),
                  .expected = std::move(expected), .fix = std::move(fix)});
  }
  [[nodiscard]] bool has(const std::string& name) const { return checkpoint.find(name) != nullptr; }
  [[nodiscard]] std::string where(const std::string& tensor) const {
    const TensorEntry* entry = checkpoint.find(tensor);
    return fmt::format("{}: tensor {}",
                       entry == nullptr ? checkpoint.directory() : checkpoint.path_of(*entry), tensor);
  }
  void add(const std::string& layer, LinearFormat format, const char* scale) const {
    format.bias = has(layer + ".bias") && !format.folds_bias();
    if (const TensorEntry* entry = checkpoint.find(layer + scale)) format.scale_dtype = entry->dtype;
    formats.linears.emplace(layer, std::move(format));
  }
};

bool is_float(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

// Layers with a tensor of this suffix and one of these dtypes.
std::vector<std::string> layers_with(const Checkpoint& checkpoint, std::string_view suffix,
                                     std::initializer_list<DType> dtypes) {
  std::vector<std::string> layers;
  for (const auto& [name, entry] : checkpoint.tensors())
    if (name.ends_with(suffix) &&
        std::find(dtypes.begin(), dtypes.end(), entry.dtype) != dtypes.end())
      layers.push_back(name.substr(0, name.size() - suffix.size()));
  return layers;
}

std::string text_at(const json& object, const char* key, const std::string& absent = "") {
  return object.is_object() && object.contains(key) && object[key].is_string()
             ? object[key].get<std::string>()
             : absent;
}
std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}
int64_t integer_at(const json& object, const char* key, int64_t absent) {
  return object.is_object() && object.contains(key) && object[key].is_number_integer()
             ? object[key].get<int64_t>()
             : absent;
}
bool flag_at(const json& object, const char* key, bool absent) {
  return object.is_object() && object.contains(key) && object[key].is_boolean()
             ? object[key].get<bool>()
             : absent;
}
std::string dumped(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

// --- msModelSlim -----------------------------------------------------------------------------

std::optional<LinearFormat> ms_format(const std::string& type) {
  if (type == "W8A8")
    return LinearFormat{.scheme = Scheme::kMsW8A8, .storage = Storage::kInt8, .static_input = true,
                        .name = type};
  if (type == "W8A8_DYNAMIC")
    return LinearFormat{.scheme = Scheme::kMsW8A8Dynamic, .storage = Storage::kInt8, .name = type};
  // PDMIX holds W8A8_DYNAMIC's tensors and W8A8's. Here the first serve prompts and generated tokens
  // alike, so that a token's bits do not depend on how it came into its sequence.
  if (type == "W8A8_MIX")
    return LinearFormat{.scheme = Scheme::kMsW8A8Dynamic, .storage = Storage::kInt8,
                        .name = "W8A8_MIX (PDMIX, as W8A8_DYNAMIC)"};
  if (type == "W8A16")
    return LinearFormat{.scheme = Scheme::kMsW8A16, .storage = Storage::kCodes8, .name = type};
  return std::nullopt;
}

// "C8", or nothing.
void read_kv_type(const Reader& r, const std::string& where, const std::string& type) {
  if (type.empty()) return;
  if (lower(type) != "c8")
    return r.refuse("quantised KV cache without kernels", where, type,
                    "C8 (int8, scales per channel)");
  r.formats.kv_int8 = true;
  for (const auto& [name, entry] : r.checkpoint.tensors())
    r.formats.kv_offsets = r.formats.kv_offsets || name.ends_with(".kv_cache_offset");
}

void read_description(const Reader& r, const std::string& path, const json& description) {
  r.formats.source = "msModelSlim";
  std::set<std::string> unknown;
  for (const auto& [name, value] : description.items()) {
    if (!name.ends_with(".weight") || !value.is_string()) continue;
    const auto type = value.get<std::string>();
    const std::string layer = name.substr(0, name.size() - 7);
    const TensorEntry* entry = r.checkpoint.find(name);
    const bool stored_float = entry != nullptr && is_float(entry->dtype);
    if (type == "FLOAT") {
      if (entry != nullptr && !stored_float)
        r.refuse("the description contradicts the tensor", r.where(name),
                 std::string(tensor::dtype_name(entry->dtype)),
                 fmt::format("a float tensor, as {} says", path),
                 "the description and the weight files must belong to one checkpoint");
      continue;
    }
    auto format = ms_format(type);
    if (!format) {
      unknown.insert(type);
      continue;
    }
    // Described as quantised and stored as float: float (layers that were rolled back).
    if (entry == nullptr || stored_float) continue;
    if (entry->dtype != DType::kI8) {
      r.refuse("the description contradicts the tensor", r.where(name),
               std::string(tensor::dtype_name(entry->dtype)),
               fmt::format("i8, as {} says with {}", path, type),
               "the description and the weight files must belong to one checkpoint");
      continue;
    }
    format->zeros = !format->static_input && r.has(layer + ".weight_offset");
    r.add(layer, *format, format->static_input ? ".deq_scale" : ".weight_scale");
  }
  for (const std::string& type : unknown)
    r.refuse("number format without kernels", path, type, kSupported,
             "quantise with --quant_type w8a8 or w8a8_dynamic");
  for (const std::string& layer : layers_with(r.checkpoint, ".weight", {DType::kI8}))
    if (!description.contains(layer + ".weight"))
      r.refuse("int8 tensor that the description does not name", r.where(layer + ".weight"), "i8",
               fmt::format("its type in {}", path),
               "the description and the weight files must belong to one checkpoint");
  for (const auto& [name, entry] : r.checkpoint.tensors())
    if (name.ends_with("norm.bias")) r.formats.norm_biases.insert(name.substr(0, name.size() - 5));
  for (const char* key : {"kv_cache_type", "kv_quant_type"})
    read_kv_type(r, path + ": " + key, text_at(description, key));
  const std::string fa = text_at(description, "fa_quant_type");
  if (!fa.empty()) r.refuse("quantised attention without kernels", path, fa, "no fa_quant_type");
}

// --- compressed-tensors ----------------------------------------------------------------------

// Names of layers, whole or their end, and regular expressions ("re:...") of a list in config.json.
// Expressions run in time that grows with the product of their size and the name's (libstdc++'s
// polynomial mode; without it one of 30 characters can take years), and are short.
class LayerPatterns {
 public:
  static constexpr size_t kMostCharacters = 4000;  // of all expressions
  static constexpr size_t kMostPatterns = 100'000;

  // Adds a problem for each expression that cannot be used. Something other than a list: no names.
  LayerPatterns(const Reader& r, const std::string& where, const json& patterns) {
    if (!patterns.is_array()) return;
    if (patterns.size() > kMostPatterns) {
      r.refuse("too many names of layers", where, std::to_string(patterns.size()),
               fmt::format("at most {}", kMostPatterns));
      return;
    }
    size_t characters = 0;
    for (const json& pattern : patterns) {
      if (!pattern.is_string()) continue;
      const auto text = pattern.get<std::string>();
      if (!text.starts_with("re:")) {
        names_.insert(text);
        continue;
      }
      try {
        characters += text.size();
        if (characters > kMostCharacters) throw std::regex_error(std::regex_constants::error_space);
        expressions_.emplace_back(text.substr(3), std::regex_constants::ECMAScript |
                                                      std::regex_constants::__polynomial);
      } catch (const std::regex_error& e) {
        r.refuse("expression that cannot be used", where, dumped(pattern),
                 fmt::format("regular expressions of at most {} characters in all, without back "
                             "references",
                             kMostCharacters),
                 "correct quantization_config of config.json");
      }
    }
  }
  [[nodiscard]] bool match(const std::string& layer) const {
    // "a.b.c" is named by itself, "b.c" and "c".
    for (size_t at = 0;; ++at) {
      if (names_.contains(layer.substr(at))) return true;
      at = layer.find('.', at);
      if (at == std::string::npos) break;
    }
    return std::any_of(expressions_.begin(), expressions_.end(), [&](const std::regex& e) {
      return std::regex_search(layer, e, std::regex_constants::match_continuous);
    });
  }
  [[nodiscard]] bool names(const std::string& text) const { return names_.contains(text); }

 private:
  std::set<std::string> names_;
  std::vector<std::regex> expressions_;
};

// One entry of config_groups as a format; nullopt after adding a problem.
std::optional<LinearFormat> ct_group(const Reader& r, const std::string& where, const json& group,
                                     const std::string& format_name) {
  const json weights = group.value("weights", json());
  const json input = group.value("input_activations", json());
  const std::string type = text_at(weights, "type", "int");
  const std::string strategy = text_at(weights, "strategy");
  const int64_t bits = integer_at(weights, "num_bits", 0);
  const bool symmetric = flag_at(weights, "symmetric", true);
  const std::string kind = fmt::format("{} {} bits {}", type, bits, strategy);
  LinearFormat f{.bits = static_cast<int>(bits), .zeros = !symmetric};
  // "weight" and "static" sort the columns before they are cut into groups, which nobody sees later.
  const std::string actorder = lower(text_at(weights, "actorder"));
  f.order = actorder == "group" || actorder == "dynamic" || flag_at(weights, "actorder", false);
  if (strategy == "group") {
    f.group = integer_at(weights, "group_size", 0);
    if (f.group < 16 || f.group % 16 != 0) {
      r.refuse("group size without kernels", where + ".weights.group_size",
               std::to_string(f.group), "a multiple of 16");
      return std::nullopt;
    }
  } else if (strategy == "tensor") {
    f.scalar_scale = true;
  } else if (strategy != "channel") {
    r.refuse("number format without kernels", where + ".weights.strategy", kind);
    return std::nullopt;
  }
  const std::string g = f.group != 0 ? fmt::format(" g{}", f.group) : "";
  if (type == "float" && bits == 8 && symmetric && strategy == "channel" && input.is_null()) {
    f.scheme = Scheme::kFp8;
    f.storage = Storage::kCodesFp8;
    f.name = "fp8 weights (float-quantized)";
    return f;
  }
  if (type == "int" && format_name == "pack-quantized" && (bits == 4 || bits == 8) &&
      strategy != "tensor" && input.is_null()) {
    f.scheme = Scheme::kCtPacked;
    f.storage = bits == 4 ? Storage::kCodes4 : Storage::kCodes8;
    f.name = fmt::format("W{}A16{} (pack-quantized)", bits, g);
    return f;
  }
  if (type == "int" && bits == 8 && format_name == "int-quantized" && input.is_null() && !f.order) {
    f.scheme = Scheme::kCtWeightInt8;
    f.storage = Storage::kCodes8;
    f.name = fmt::format("W8A16{} (int-quantized)", g);
    return f;
  }
  if (type == "int" && bits == 8 && format_name == "int-quantized" && strategy != "group" && !f.order &&
      input.is_object() && integer_at(input, "num_bits", 0) == 8 &&
      text_at(input, "type", "int") == "int") {
    const bool dynamic = flag_at(input, "dynamic", false);
    const std::string per = text_at(input, "strategy", dynamic ? "token" : "tensor");
    const bool input_symmetric = flag_at(input, "symmetric", true);
    if (per == (dynamic ? "token" : "tensor") && (input_symmetric || !dynamic)) {
      f.scheme = Scheme::kCtInt8;
      f.storage = Storage::kInt8;
      f.static_input = !dynamic;
      f.input_zeros = !input_symmetric;
      f.name = fmt::format("W8A8 {} (int-quantized)", dynamic ? "dynamic" : "static");
      return f;
    }
  }
  r.refuse("number format without kernels", where,
           fmt::format("{}: weights {}, activations {}", format_name, dumped(weights), dumped(input)));
  return std::nullopt;
}

void read_compressed_tensors(const Reader& r, const json& q) {
  r.formats.source = "compressed-tensors";
  const std::string where = r.config_path + ": quantization_config";
  if (q.contains("kv_cache_scheme") && !q["kv_cache_scheme"].is_null())
    r.refuse("quantised KV cache without kernels", where + ".kv_cache_scheme",
             dumped(q["kv_cache_scheme"]), "null");
  if (q.contains("sparsity_config") && q["sparsity_config"].is_object() &&
      text_at(q["sparsity_config"], "format", "dense") != "dense")
    r.refuse("sparse weights without kernels", where + ".sparsity_config",
             dumped(q["sparsity_config"]), "dense weights");
  if (!q.contains("config_groups") || !q["config_groups"].is_object()) {
    r.refuse("key missing", where + ".config_groups", "", "an object");
    return;
  }
  struct Group {
    LayerPatterns targets;
    std::optional<LinearFormat> format;
  };
  std::vector<Group> groups;
  const std::string format_name = text_at(q, "format");
  for (const auto& [name, group] : q["config_groups"].items()) {
    if (!group.is_object()) {
      r.refuse("not an object", where + ".config_groups." + name, dumped(group), "an object");
      continue;
    }
    groups.push_back({LayerPatterns(r, where + ".config_groups." + name + ".targets",
                                    group.value("targets", json::array())),
                      ct_group(r, where + ".config_groups." + name, group,
                               text_at(group, "format", format_name))});
  }
  const LayerPatterns ignored(r, where + ".ignore", q.value("ignore", json()));
  std::set<std::string> layers;
  for (const std::string& l : layers_with(r.checkpoint, ".weight", {DType::kI8, DType::kF8E4M3}))
    layers.insert(l);
  for (const std::string& l : layers_with(r.checkpoint, ".weight_packed", {DType::kI32}))
    layers.insert(l);
  for (const std::string& layer : layers) {
    const std::string tensor = layer + (r.has(layer + ".weight_packed") ? ".weight_packed" : ".weight");
    if (ignored.match(layer)) {
      r.refuse("the description contradicts the tensor", r.where(tensor), "a quantised tensor",
               fmt::format("a float tensor: {}.ignore names it", where));
      continue;
    }
    const Group* chosen = nullptr;
    for (const Group& group : groups)
      if (chosen == nullptr && group.targets.match(layer)) chosen = &group;
    for (const Group& group : groups)
      if (chosen == nullptr && group.targets.names("Linear")) chosen = &group;
    if (chosen == nullptr) {
      r.refuse("quantised tensor of no group", r.where(tensor), tensor,
               fmt::format("a group of {}.config_groups whose targets name it", where));
      continue;
    }
    if (!chosen->format) continue;
    LinearFormat format = *chosen->format;
    const TensorEntry* entry = r.checkpoint.find(tensor);
    const bool packed = format.scheme == Scheme::kCtPacked;
    const DType dtype = packed ? DType::kI32
                        : format.scheme == Scheme::kFp8 ? DType::kF8E4M3
                                                        : DType::kI8;
    if (packed != tensor.ends_with("_packed") || entry->dtype != dtype) {
      r.refuse("the description contradicts the tensor", r.where(tensor),
               std::string(tensor::dtype_name(entry->dtype)),
               fmt::format("{} as {} says", format.name, where),
               "config.json and the weight files must belong to one checkpoint");
      continue;
    }
    format.order = packed && (format.order || r.has(layer + ".weight_g_idx"));
    r.add(layer, format, ".weight_scale");
  }
}

// --- fp8, awq, gptq --------------------------------------------------------------------------

void read_fp8(const Reader& r, const json& q) {
  r.formats.source = "fp8";
  const std::string where = r.config_path + ": quantization_config.weight_block_size";
  const json block = q.value("weight_block_size", json());
  if (!block.is_array() || block.size() != 2 || !block[0].is_number_integer() ||
      !block[1].is_number_integer() || block[0].get<int64_t>() < 1 ||
      block[1].get<int64_t>() < 16 || block[1].get<int64_t>() % 16 != 0) {
    r.refuse("fp8 without blocks of known size", where, dumped(block),
             "two numbers such as [128, 128], the second a multiple of 16");
    return;
  }
  for (const std::string& layer : layers_with(r.checkpoint, ".weight", {DType::kF8E4M3}))
    r.add(layer,
          {.scheme = Scheme::kFp8,
           .storage = Storage::kCodesFp8,
           .group = block[1].get<int64_t>(),
           .block_rows = block[0].get<int64_t>(),
           .name = fmt::format("fp8 blocks {}x{}", block[0].get<int64_t>(), block[1].get<int64_t>())},
          ".weight_scale_inv");
}

void read_awq_or_gptq(const Reader& r, const json& q, bool awq) {
  r.formats.source = awq ? "awq" : "gptq";
  const std::string where = r.config_path + ": quantization_config";
  const int64_t bits = integer_at(q, "bits", integer_at(q, "w_bit", 4));
  const int64_t group = integer_at(q, "group_size", integer_at(q, "q_group_size", 128));
  if (bits != 4 && (awq || bits != 8)) {
    r.refuse("number of bits without kernels", where + ".bits", std::to_string(bits),
             awq ? "4" : "4 or 8");
    return;
  }
  if (group != -1 && (group < 16 || group % 16 != 0)) {
    r.refuse("group size without kernels", where + ".group_size", std::to_string(group),
             "-1 or a multiple of 16");
    return;
  }
  const std::string version = lower(text_at(q, "version", "gemm"));
  if (awq && version != "gemm") {
    r.refuse("awq layout without kernels", where + ".version", version, "gemm");
    return;
  }
  if (awq && !flag_at(q, "zero_point", true)) {
    r.refuse("awq without zero points", where + ".zero_point", "false", "true");
    return;
  }
  const std::string layout = lower(text_at(q, "checkpoint_format", "gptq"));
  if (!awq && layout != "gptq" && layout != "gptq_v2") {
    r.refuse("gptq layout without kernels", where + ".checkpoint_format", layout, "gptq or gptq_v2");
    return;
  }
  const std::string g = group > 0 ? fmt::format(" g{}", group) : "";
  for (const std::string& layer : layers_with(r.checkpoint, ".qweight", {DType::kI32})) {
    LinearFormat f{.scheme = awq ? Scheme::kAwq : Scheme::kGptq,
                   .storage = bits == 4 ? Storage::kCodes4 : Storage::kCodes8,
                   .bits = static_cast<int>(bits),
                   .group = group > 0 ? group : 0,
                   .zeros = true};
    f.order = !awq && flag_at(q, "desc_act", false);
    f.zeros_minus_one = !awq && layout == "gptq";
    f.name = fmt::format("{} int{}{}{}", awq ? "awq" : "gptq", bits, g, f.order ? " act-order" : "");
    r.add(layer, f, ".scales");
  }
}

bool exists(const std::string& path) {
  struct stat st {};
  return ::stat(path.c_str(), &st) == 0;
}

std::string description_path(const std::string& directory, const std::string& quantize) {
  std::vector<std::string> names = {"quant_model_description.json"};
  if (!quantize.empty()) names.push_back("quant_model_description_" + quantize + ".json");
  if (quantize == "w8a8_dynamic" || quantize == "w8a8_pdmix" || quantize == "w8a8_mix")
    names.emplace_back("quant_model_description_w8a8.json");
  for (const std::string& name : names)
    if (exists(directory + "/" + name)) return directory + "/" + name;
  return "";
}

}  // namespace

std::shared_ptr<const quant::Formats> read_quant_formats(const std::string& directory,
                                                         Problems& problems) {
  const std::string config_path = directory + "/config.json";
  const json config = read_json_file(config_path);
  if (!config.is_object()) return nullptr;  // told by the family's reader
  std::string quantize;
  for (const char c : text_at(config, "quantize"))
    if (std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_')
      quantize += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  const std::string description = description_path(directory, quantize);
  json q = config.value("quantization_config", config.value("compression_config", json()));
  const std::string method = lower(text_at(q, "quant_method"));
  if (description.empty() && quantize.empty() && !q.is_object()) return nullptr;

  Problems found;
  const Checkpoint checkpoint(directory, found);
  if (!found.empty()) {
    problems.add_all(found);
    return nullptr;
  }
  auto formats = std::make_shared<quant::Formats>();
  const Reader r{config_path, checkpoint, *formats, found};
  if (!description.empty()) {
    const json text = read_json_file(description, 256 << 20);
    if (text.is_object())
      read_description(r, description, text);
    else
      r.refuse("not an object", description, dumped(text), "an object from tensor names to types");
  } else if (method == "compressed-tensors") {
    read_compressed_tensors(r, q);
  } else if (method == "fp8") {
    read_fp8(r, q);
  } else if (method == "awq" || method == "gptq") {
    read_awq_or_gptq(r, q, method == "awq");
  } else if (!method.empty()) {
    r.refuse("number format without kernels", config_path + ": quantization_config.quant_method",
             method);
  } else if (!quantize.empty()) {
    r.refuse("description of the quantisation missing", directory,
             "no quant_model_description.json",
             fmt::format("quant_model_description.json or quant_model_description_{}.json, since "
                         "config.json says \"quantize\": \"{}\"",
                         quantize, quantize),
             "fetch the file");
  }
  read_kv_type(r, config_path + ": quantization_config.kv_quant_type", text_at(q, "kv_quant_type"));
  if (found.empty() && formats->linears.empty() && !method.empty())
    r.refuse("no quantised tensors found", directory,
             fmt::format("{} tensors, none of them {}", checkpoint.tensors().size(), method),
             fmt::format("tensors as quantization_config of {} describes them", config_path),
             "config.json and the weight files must belong to one checkpoint");
  problems.add_all(found);
  if (formats->linears.empty() && !formats->kv_int8) return nullptr;
  return formats;
}

}  // namespace phalanx::weights
