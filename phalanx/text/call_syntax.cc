#include "phalanx/text/call_syntax.h"

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"

namespace phalanx::text::syntax {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr int kMaxDepth = 64;
constexpr size_t kMaxTag = 512;  // bytes of a name within a tag

// Nothing if it is not JSON.
std::optional<OrderedJson> parse(std::string_view text) {
  try {
    (void)parse_json(text, "call", kMaxDepth);
    return OrderedJson::parse(text);
  } catch (const std::exception&) {  // not JSON, too deep, a number beyond double
    return std::nullopt;
  }
}

std::string write(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

std::optional<ToolCall> call_of(const OrderedJson& object) {
  if (!object.is_object()) return std::nullopt;
  const auto name = object.find("name");
  if (name == object.end() || !name->is_string()) return std::nullopt;
  ToolCall call{.name = name->get<std::string>(), .arguments = "{}"};
  if (!is_name(call.name)) return std::nullopt;
  for (const char* key : {"arguments", "parameters"}) {
    const auto found = object.find(key);
    if (found == object.end() || found->is_null()) continue;
    if (found->is_string()) {
      const auto inner = parse(found->get_ref<const std::string&>());
      if (!inner || !inner->is_object()) return std::nullopt;
      call.arguments = write(*inner);
    } else if (found->is_object()) {
      call.arguments = write(*found);
    } else {
      return std::nullopt;
    }
    break;
  }
  return call;
}

// Python's literals.
class PythonScan {
 public:
  explicit PythonScan(std::string_view text) : text_(text) {}

  Scan arguments(OrderedJson* out) {
    *out = OrderedJson::object();
    space();
    if (at_end()) return Scan::kMore;
    if (text_[at_] == ')') return ++at_, Scan::kGood;
    for (;;) {
      space();
      const size_t begin = at_;
      while (!at_end() && (std::isalnum(static_cast<unsigned char>(text_[at_])) != 0 || text_[at_] == '_')) ++at_;
      if (at_end()) return Scan::kMore;
      const std::string key(text_.substr(begin, at_ - begin));
      space();
      if (at_end()) return Scan::kMore;
      if (key.empty() || text_[at_] != '=') return Scan::kBad;
      ++at_;
      const Scan scan = value(&(*out)[key], 0);
      if (scan != Scan::kGood) return scan;
      space();
      if (at_end()) return Scan::kMore;
      const char c = text_[at_++];
      if (c == ')') return Scan::kGood;
      if (c != ',') return Scan::kBad;
    }
  }
  [[nodiscard]] size_t at() const { return at_; }

 private:
  [[nodiscard]] bool at_end() const { return at_ >= text_.size(); }
  void space() { at_ = skip_space(text_, at_); }

  Scan value(OrderedJson* out, int depth) {
    if (depth > kMaxDepth) return Scan::kBad;
    space();
    if (at_end()) return Scan::kMore;
    const char c = text_[at_];
    if (c == '\'' || c == '"') return string(out);
    if (c == '[' || c == '(') return list(c == '[' ? ']' : ')', out, depth);
    if (c == '{') return dict(out, depth);
    return word(out);
  }

  Scan string(OrderedJson* out) {
    const char quote = text_[at_++];
    std::string s;
    for (; !at_end(); ++at_) {
      const char c = text_[at_];
      if (c == quote) {
        ++at_;
        *out = s;
        return Scan::kGood;
      }
      if (c != '\\') {
        s += c;
        continue;
      }
      if (++at_; at_end()) return Scan::kMore;
      switch (text_[at_]) {
        case 'n': s += '\n'; break;
        case 't': s += '\t'; break;
        case 'r': s += '\r'; break;
        case '\\': case '\'': case '"': s += text_[at_]; break;
        default: s += '\\'; s += text_[at_];
      }
    }
    return Scan::kMore;
  }

  Scan list(char close, OrderedJson* out, int depth) {
    *out = OrderedJson::array();
    ++at_;
    for (;;) {
      space();
      if (at_end()) return Scan::kMore;
      if (text_[at_] == close) return ++at_, Scan::kGood;
      OrderedJson item;
      if (const Scan scan = value(&item, depth + 1); scan != Scan::kGood) return scan;
      out->push_back(std::move(item));
      space();
      if (at_end()) return Scan::kMore;
      if (text_[at_] == ',') ++at_;
      else if (text_[at_] != close) return Scan::kBad;
    }
  }

  Scan dict(OrderedJson* out, int depth) {
    *out = OrderedJson::object();
    ++at_;
    for (;;) {
      space();
      if (at_end()) return Scan::kMore;
      if (text_[at_] == '}') return ++at_, Scan::kGood;
      OrderedJson key;
      OrderedJson item;
      if (const Scan scan = value(&key, depth + 1); scan != Scan::kGood) return scan;
      space();
      if (at_end()) return Scan::kMore;
      if (!key.is_string() || text_[at_++] != ':') return Scan::kBad;
      if (const Scan scan = value(&item, depth + 1); scan != Scan::kGood) return scan;
      (*out)[key.get<std::string>()] = std::move(item);
      space();
      if (at_end()) return Scan::kMore;
      if (text_[at_] == ',') ++at_;
      else if (text_[at_] != '}') return Scan::kBad;
    }
  }

  Scan word(OrderedJson* out) {
    const size_t begin = at_;
    while (!at_end() && (std::isalnum(static_cast<unsigned char>(text_[at_])) != 0 ||
                         text_[at_] == '.' || text_[at_] == '-' || text_[at_] == '+'))
      ++at_;
    if (at_end()) return Scan::kMore;
    const std::string_view w = text_.substr(begin, at_ - begin);
    if (w == "True" || w == "true") *out = true;
    else if (w == "False" || w == "false") *out = false;
    else if (w == "None" || w == "null") *out = nullptr;
    else {
      const auto number = parse(w);
      if (!number || !number->is_number()) return Scan::kBad;
      *out = *number;
    }
    return Scan::kGood;
  }

  std::string_view text_;
  size_t at_ = 0;
};

// The type that a tool's schema gives a parameter; "string" if none.
std::string type_of(const std::map<std::string, std::string>& tools, const std::string& tool,
                    const std::string& parameter) {
  const auto found = tools.find(tool);
  if (found == tools.end() || found->second.empty()) return "string";
  const auto schema = OrderedJson::parse(found->second, nullptr, false);
  const auto pointer = OrderedJson::json_pointer("/properties");
  if (!schema.is_object() || !schema.contains(pointer)) return "string";
  const auto& properties = schema.at(pointer);
  if (!properties.is_object()) return "string";
  const auto it = properties.find(parameter);
  if (it == properties.end() || !it->is_object() || !it->contains("type")) return "string";
  const auto& type = (*it)["type"];
  if (type.is_string()) return type.get<std::string>();
  if (type.is_array() && std::find(type.begin(), type.end(), "string") == type.end()) return "any";
  return "string";
}

// A value as text becomes what its type says, and stays text where it does not fit.
OrderedJson typed(std::string_view text, const std::string& type) {
  if (type == "string") return std::string(text);
  const std::string_view bare = trimmed(text);
  if (type == "boolean" || type == "any") {
    if (bare == "True") return true;
    if (bare == "False") return false;
  }
  if (bare == "None") return nullptr;
  auto value = parse(bare);
  return value ? std::move(*value) : OrderedJson(std::string(text));
}

}  // namespace

Scan scan_json(std::string_view text, size_t* end) {
  std::vector<char> open;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      else if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      open.push_back(c == '{' ? '}' : ']');
      if (open.size() > kMaxDepth) return Scan::kBad;
    } else if (c == '}' || c == ']') {
      if (open.empty() || open.back() != c) return Scan::kBad;
      open.pop_back();
      if (open.empty()) {
        *end = i + 1;
        return Scan::kGood;
      }
    }
  }
  return Scan::kMore;
}

std::optional<ToolCall> call_of_object(std::string_view object) {
  const auto json = parse(object);
  return json ? call_of(*json) : std::nullopt;
}

std::optional<ToolCall> call_of_arguments(std::string name, std::string_view object) {
  const auto json = parse(object);
  if (!json || !json->is_object()) return std::nullopt;
  return ToolCall{.name = std::move(name), .arguments = write(*json)};
}

std::optional<std::vector<ToolCall>> calls_of_array(std::string_view array) {
  const auto json = parse(array);
  if (!json || !json->is_array() || json->empty()) return std::nullopt;
  std::vector<ToolCall> calls;
  for (const auto& object : *json) {
    auto call = call_of(object);
    if (!call) return std::nullopt;
    calls.push_back(std::move(*call));
  }
  return calls;
}

Scan scan_python_call(std::string_view text, size_t* end, std::string* arguments) {
  PythonScan scan(text);
  OrderedJson json;
  const Scan verdict = scan.arguments(&json);
  *end = scan.at();
  if (verdict == Scan::kGood) *arguments = write(json);
  return verdict;
}

Scan scan_tagged_call(std::string_view text, const Tags& tags,
                      const std::map<std::string, std::string>& tools, size_t* end, ToolCall* call) {
  // The text up to `mark`; a name is short.
  const auto until = [&](size_t from, std::string_view mark, size_t most, std::string_view* out) {
    const size_t at = text.find(mark, from);
    if (at == std::string_view::npos)
      return most > 0 && text.size() - from > most + mark.size() ? Scan::kBad : Scan::kMore;
    if (most > 0 && at - from > most) return Scan::kBad;
    *out = text.substr(from, at - from);
    return Scan::kGood;
  };
  std::string_view name;
  if (const Scan scan = until(0, tags.name_end, kMaxTag, &name); scan != Scan::kGood) return scan;
  size_t at = name.size() + tags.name_end.size();
  name = trimmed(name);
  if (!is_name(name)) return Scan::kBad;
  call->name = name;
  OrderedJson arguments = OrderedJson::object();
  for (;;) {
    at = skip_space(text, at);
    const std::string_view rest = text.substr(at);
    if (rest.starts_with(tags.call_end)) {
      *end = at + tags.call_end.size();
      call->arguments = write(arguments);
      return Scan::kGood;
    }
    if (!rest.starts_with(tags.parameter)) {
      const bool may_become = tags.call_end.starts_with(rest) || tags.parameter.starts_with(rest);
      return may_become ? Scan::kMore : Scan::kBad;
    }
    at += tags.parameter.size();
    std::string_view key;
    if (const Scan scan = until(at, tags.parameter_name_end, kMaxTag, &key); scan != Scan::kGood) return scan;
    at += key.size() + tags.parameter_name_end.size();
    bool is_string = false;
    if (tags.says_string) {
      const size_t quote = key.find('"');
      const std::string_view rule = quote == std::string_view::npos ? key : trimmed(key.substr(quote + 1));
      if (rule != "string=\"true\"" && rule != "string=\"false\"") return Scan::kBad;
      is_string = rule == "string=\"true\"";
      key = key.substr(0, quote);
    }
    key = trimmed(key);
    if (key.empty()) return Scan::kBad;
    std::string_view value;
    if (const Scan scan = until(at, tags.parameter_end, 0, &value); scan != Scan::kGood) return scan;
    at += value.size() + tags.parameter_end.size();
    const std::string own(key);
    if (tags.says_string) {
      arguments[own] = typed(value, is_string ? "string" : "any");
    } else {
      // The newlines belong to the tags.
      if (value.starts_with('\n')) value.remove_prefix(1);
      if (value.ends_with('\n')) value.remove_suffix(1);
      arguments[own] = typed(value, type_of(tools, call->name, own));
    }
  }
}

bool is_name(std::string_view name) {
  return !name.empty() && name.size() <= 256 && std::all_of(name.begin(), name.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return std::isalnum(byte) != 0 || c == '_' || c == '-' || c == '.' || byte >= 0x80;
  });
}

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  return first == std::string_view::npos ? std::string_view() : trimmed_right(text.substr(first));
}

std::string_view trimmed_right(std::string_view text) {
  return text.substr(0, text.find_last_not_of(" \t\r\n") + 1);
}

size_t skip_space(std::string_view text, size_t at) {
  while (at < text.size() && (text[at] == ' ' || text[at] == '\t' || text[at] == '\r' || text[at] == '\n')) ++at;
  return at;
}

size_t partial_suffix(std::string_view text, const std::vector<std::string>& marks) {
  size_t longest = 0;
  for (const std::string& mark : marks)
    for (size_t n = std::min(text.size(), mark.size() - 1); n > longest; --n)
      if (text.ends_with(std::string_view(mark).substr(0, n))) {
        longest = n;
        break;
      }
  return longest;
}

}  // namespace phalanx::text::syntax
