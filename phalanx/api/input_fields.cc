#include "phalanx/api/input_fields.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"

namespace phalanx::api {
namespace {
using nlohmann::json;
constexpr int64_t kMaxId = 1048576;
constexpr size_t kMaxIds = 1048576;
}  // namespace

std::string read_text_input(Fields& fields, const std::string& key, const ServiceOptions& options) {
  const json* input = fields.find(key);
  if (input == nullptr) throw Refused(fmt::format("Not found {}.", key));
  std::string text;
  if (input->is_string()) {
    text = input->get<std::string>();
  } else if (input->is_array()) {
    if (input->empty()) throw Refused("Inputs arr is empty");
    for (const json& part : *input) {
      const bool is_text = part.is_object() && part.contains("type") && part["type"] == "text" &&
                           part.contains("text") && part["text"].is_string();
      if (!is_text)
        throw Refused("The type of inputs is abnormal: this model takes parts of type text only");
      text += part["text"].get_ref<const std::string&>();
    }
  } else {
    throw Refused(fmt::format("{} must be string or array type.", key));
  }
  const int64_t units = utf16_units(text);
  const int64_t most = options.max_request_mb * 1024 * 1024;
  if (units < 1 || units > most)
    throw Refused(fmt::format("Inputs len not in (0, {}], but the length of inputs is {}", most, units));
  return text;
}

std::vector<int32_t> read_id_input(const json& value, const std::string& key) {
  if (!value.is_array()) throw Refused(fmt::format("{} must be array type.", key));
  if (value.empty() || value.size() > kMaxIds)
    throw Refused(fmt::format("Messages token length must be in (0, {}], but got {}. This could be "
                              "caused by invalid input format or empty content.",
                              kMaxIds, value.size()));
  std::vector<int32_t> ids;
  ids.reserve(value.size());
  for (const json& id : value) {
    if (!id.is_number_integer()) throw Refused(fmt::format("All elements of {} must be integers.", key));
    const bool fits = id.is_number_unsigned() ? id.get<uint64_t>() <= uint64_t{kMaxId}
                                              : id.get<int64_t>() >= 0;
    if (!fits)
      throw Refused(fmt::format("All elements of {} must be in [0, {}], got {}.", key, kMaxId, id.dump()));
    ids.push_back(static_cast<int32_t>(id.get<int64_t>()));
  }
  return ids;
}

const json& read_parameters(Fields& fields) {
  static const json kNone = json::object();
  const json* parameters = fields.find("parameters");
  if (parameters == nullptr) return kNone;
  if (!parameters->is_object()) throw Refused("parameters must be object type.");
  return *parameters;
}

}  // namespace phalanx::api
