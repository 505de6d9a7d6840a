#include "phalanx/api/structure_fields.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"
#include "phalanx/base/error.h"
#include "phalanx/base/json.h"

namespace phalanx::api {
namespace {

using nlohmann::json;
using text::GrammarSpec;
using Kind = GrammarSpec::Kind;

const json* member(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

// `text` is empty where the schema stands in the request itself; see with_order().
GrammarSpec schema_spec(const json& schema) {
  check_schema(schema, "$");
  return {.kind = Kind::kJsonSchema, .text = {}};
}

// The properties of a schema come in the order in which the request has them, at `place`.
std::optional<GrammarSpec> with_order(std::optional<GrammarSpec> spec, std::string_view body,
                                      const char* place) {
  if (!spec || spec->kind != Kind::kJsonSchema) return spec;
  const auto ordered = nlohmann::ordered_json::parse(body);
  const auto& schema = ordered.at(nlohmann::ordered_json::json_pointer(place));
  spec->text = schema.is_string() ? schema.get<std::string>() : schema.dump();
  return spec;
}

GrammarSpec choice_spec(const json& choices, const std::string& name) {
  if (!choices.is_array() || choices.empty())
    throw Refused(fmt::format("Parameter {} must be a non-empty array of strings", name));
  json list = json::array();
  for (const json& choice : choices) {
    if (!choice.is_string() || choice.get_ref<const std::string&>().empty())
      throw Refused(fmt::format("Parameter {} must be a non-empty array of strings", name));
    list.push_back(choice);
  }
  return {.kind = Kind::kChoice, .text = list.dump()};
}

GrammarSpec text_spec(Kind kind, const json& value, const std::string& name) {
  if (!value.is_string()) throw Refused(fmt::format("{} must be string type.", name));
  if (value.get_ref<const std::string&>().empty())
    throw Refused(fmt::format("Parameter {} must not be empty", name));
  return {.kind = kind, .text = value.get<std::string>()};
}

GrammarSpec json_spec(const json& value, const std::string& name) {
  if (value.is_object()) return schema_spec(value);
  if (!value.is_string()) throw Refused(fmt::format("{} must be object type.", name));
  json parsed;
  try {
    parsed = parse_json(value.get_ref<const std::string&>(), name);
  } catch (const Error& error) {
    throw Refused(fmt::format("Parameter {} is not the JSON text of an object: {}", name, error.what()));
  }
  if (!parsed.is_object())
    throw Refused(fmt::format("Parameter {} is not the JSON text of an object", name));
  return schema_spec(parsed);
}

std::optional<GrammarSpec> response_format(const json& format) {
  if (!format.is_object()) throw Refused("Parameter response_format must be an object");
  const json* type = member(format, "type");
  if (type == nullptr) throw Refused("Parameter response_format must contain 'type' field");
  if (!type->is_string()) throw Refused("Parameter response_format.type must be a string");
  const auto& name = type->get_ref<const std::string&>();
  if (name == "text") return std::nullopt;
  if (name == "json_object") return GrammarSpec{.kind = Kind::kJsonObject, .text = {}};
  if (name != "json_schema")
    throw Refused(fmt::format("Parameter response_format.type must be 'json_object', 'json_schema' or "
                              "'text', got '{}'",
                              name));
  const std::string where = "Parameter response_format.json_schema";
  const json* outer = member(format, "json_schema");
  if (outer == nullptr) throw Refused(where + " is required when type is 'json_schema'");
  if (!outer->is_object()) throw Refused(where + " must be an object");
  const json* schema_name = member(*outer, "name");
  if (schema_name == nullptr) throw Refused(where + ".name is required");
  if (!schema_name->is_string()) throw Refused(where + ".name must be a string");
  const int64_t units = utf16_units(schema_name->get_ref<const std::string&>());
  if (units < 1 || units > 64) throw Refused(where + ".name must be 1-64 characters");
  const json* schema = member(*outer, "schema");
  if (schema == nullptr) throw Refused(where + ".schema is required when type is 'json_schema'");
  if (!schema->is_object()) throw Refused(where + ".schema must be an object");
  return schema_spec(*schema);
}

// {"json": …} | {"regex": …} | {"choice": …} | {"grammar": …} | {"json_object": true}
std::optional<GrammarSpec> structured_outputs(const json& value) {
  if (!value.is_object()) throw Refused("structured_outputs must be object type.");
  std::optional<GrammarSpec> found;
  for (const auto& [key, inner] : value.items()) {
    if (inner.is_null()) continue;
    const std::string name = "structured_outputs." + key;
    std::optional<GrammarSpec> one;
    if (key == "json") one = json_spec(inner, name);
    else if (key == "regex") one = text_spec(Kind::kRegex, inner, name);
    else if (key == "choice") one = choice_spec(inner, name);
    else if (key == "grammar") one = text_spec(Kind::kLark, inner, name);
    else if (key == "json_object" && inner.is_boolean()) {
      if (inner.get<bool>()) one = GrammarSpec{.kind = Kind::kJsonObject, .text = {}};
    } else {
      throw Refused(fmt::format("Parameter {} is not known; expected one of json, json_object, regex, "
                                "choice, grammar",
                                name));
    }
    if (one && found) throw Refused("Parameter structured_outputs asks for more than one structure");
    if (one) found = std::move(one);
  }
  return found;
}

std::optional<GrammarSpec> tgi_grammar(const json& value) {
  const json* type = value.is_object() ? member(value, "type") : nullptr;
  const json* inner = value.is_object() ? member(value, "value") : nullptr;
  if (type == nullptr || !type->is_string() || inner == nullptr)
    throw Refused("Parameter grammar must be an object with 'type' and 'value'");
  if (*type == "json" || *type == "json_schema") return json_spec(*inner, "grammar.value");
  if (*type == "regex") return text_spec(Kind::kRegex, *inner, "grammar.value");
  throw Refused(fmt::format("Parameter grammar.type must be 'json' or 'regex', got {}", type->dump()));
}

void check_type(const json& type, const std::string& path) {
  static constexpr const char* kTypes[] = {"string", "integer", "number", "boolean",
                                           "array",  "object",  "null"};
  const auto known = [&](const json& t) {
    for (const char* name : kTypes)
      if (t == name) return true;
    return false;
  };
  if (type.is_array()) {  // the original takes a single name only
    for (const json& t : type)
      if (!t.is_string() || !known(t))
        throw Refused(fmt::format("Invalid json_schema: unsupported type '{}' at '{}'",
                                  t.is_string() ? t.get<std::string>() : t.dump(), path));
    return;
  }
  if (!type.is_string())
    throw Refused(fmt::format("Invalid json_schema: 'type' at '{}' must be a string", path));
  if (!known(type))
    throw Refused(fmt::format("Invalid json_schema: unsupported type '{}' at '{}'",
                              type.get<std::string>(), path));
}

}  // namespace

void check_schema(const json& schema, const std::string& path) {
  if (!schema.is_object()) return;
  if (const json* type = member(schema, "type")) check_type(*type, path);
  if (const json* properties = member(schema, "properties")) {
    if (!properties->is_object())
      throw Refused(fmt::format("Invalid json_schema: 'properties' at '{}' must be an object", path));
    for (const auto& [name, inner] : properties->items()) {
      if (!inner.is_object() && !inner.is_boolean())
        throw Refused(fmt::format("Invalid json_schema: property '{}' at '{}' must be an object", name, path));
      check_schema(inner, fmt::format("{}.properties.{}", path, name));
    }
  }
  if (const json* items = member(schema, "items")) {
    if (!items->is_object() && !items->is_boolean() && !items->is_array())
      throw Refused(fmt::format("Invalid json_schema: 'items' at '{}' must be an object", path));
    check_schema(*items, path + ".items");
  }
  if (const json* required = member(schema, "required")) {
    bool strings = required->is_array();
    if (strings)
      for (const json& name : *required) strings = strings && name.is_string();
    if (!strings)
      throw Refused(fmt::format("Invalid json_schema: 'required' at '{}' must be an array of strings", path));
  }
}

std::optional<GrammarSpec> read_structure(Fields& fields, std::string_view body) {
  std::optional<GrammarSpec> found;
  std::string by;
  const auto take = [&](const char* name, auto&& read, const char* schema_at = nullptr) {
    const json* value = fields.find(name);
    if (value == nullptr) return;
    std::optional<GrammarSpec> one = with_order(read(*value), body, schema_at);
    if (one && found)
      throw Refused(fmt::format("Parameters {} and {} ask for two structures at once", by, name));
    if (one) {
      found = std::move(one);
      by = name;
    }
  };
  take("response_format", response_format, "/response_format/json_schema/schema");
  take("structured_outputs", structured_outputs, "/structured_outputs/json");
  take("guided_json", [](const json& v) { return json_spec(v, "guided_json"); }, "/guided_json");
  take("guided_regex", [](const json& v) { return text_spec(Kind::kRegex, v, "guided_regex"); });
  take("guided_choice", [](const json& v) { return choice_spec(v, "guided_choice"); });
  take("guided_grammar", [](const json& v) { return text_spec(Kind::kLark, v, "guided_grammar"); });
  return found;
}

std::optional<GrammarSpec> read_tgi_grammar(Fields& fields, std::string_view body) {
  const json* value = fields.find("grammar");
  if (value == nullptr) return std::nullopt;
  return with_order(tgi_grammar(*value), body, "/parameters/grammar/value");
}

}  // namespace phalanx::api
