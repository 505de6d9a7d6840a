#include "phalanx/text/grammar_size.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"

namespace phalanx::text {
namespace {

struct Size {
  int64_t repetitions = 0;
  int64_t bytes = 0;
  void add(const Size& other) {
    repetitions = std::min(repetitions + other.repetitions, kMaxRepetitions + 1);
    bytes = std::min(bytes + other.bytes, kMaxLexeme + 1);
  }
};

void check(const Size& size, std::string_view what) {
  if (size.repetitions > kMaxRepetitions)
    throw Error(Code::kInvalidArgument, fmt::format("{}: more than {} repetitions (? * + ~ {{)", what,
                                                    kMaxRepetitions));
  if (size.bytes > kMaxLexeme)
    throw Error(Code::kInvalidArgument, fmt::format("{}: longer than {} bytes", what, kMaxLexeme));
}

bool repeats(char c) { return c == '?' || c == '*' || c == '+' || c == '{' || c == '~'; }

Size size_of_regex(std::string_view regex) {
  Size size{.repetitions = 0, .bytes = static_cast<int64_t>(regex.size())};
  for (size_t i = 0; i < regex.size(); ++i) {
    if (regex[i] == '\\') ++i;
    else if (repeats(regex[i]) && regex[i] != '~') ++size.repetitions;
  }
  return size;
}

// Patterns anywhere in a schema.
class Patterns final : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return true; }
  bool end_object() override { return true; }
  bool start_array(std::size_t) override { return true; }
  bool end_array() override { return true; }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception&) override {
    return false;
  }
  // Keys too: those of patternProperties are patterns, and no other has thousands of them.
  bool key(string_t& text) override { return string(text); }
  bool string(string_t& text) override {
    check(size_of_regex(text), "pattern");
    return true;
  }
};

class Lark {
 public:
  explicit Lark(std::string_view text) : text_(text) {}

  void run() {
    while (at_ < text_.size()) step();
    for (const auto& [name, terminal] : terminals_) check(total(name), "terminal " + name.substr(0, 64));
  }

 private:
  struct Terminal {
    Size own;
    std::vector<std::string> uses;
    enum { kNew, kOpen, kDone } state = kNew;
  };

  static bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }
  static bool is_terminal(std::string_view name) {
    const size_t first = name.find_first_not_of('_');
    return first != std::string_view::npos && std::isupper(static_cast<unsigned char>(name[first])) != 0;
  }

  void step() {
    const char c = text_[at_];
    if (text_.substr(at_).starts_with("//")) {
      at_ = std::min(text_.find('\n', at_), text_.size());
    } else if (c == '"' || c == '/') {
      const size_t begin = ++at_;
      for (; at_ < text_.size() && text_[at_] != c; ++at_)
        if (text_[at_] == '\\') ++at_;
      at_ = std::min(at_, text_.size());
      const std::string_view inner = text_.substr(begin, at_ - begin);
      Size size{.repetitions = 0, .bytes = static_cast<int64_t>(inner.size())};
      if (c == '/') size = size_of_regex(inner);
      check(size, "expression");
      if (current_ != nullptr) current_->own.add(size);
      ++at_;
    } else if (text_.substr(at_).starts_with("%json")) {
      skip_json();
    } else if (is_name(c)) {
      name();
    } else {
      if (current_ != nullptr && repeats(c)) current_->own.add({.repetitions = 1, .bytes = 0});
      ++at_;
    }
  }

  void name() {
    const size_t begin = at_;
    while (at_ < text_.size() && is_name(text_[at_])) ++at_;
    const std::string_view found = text_.substr(begin, at_ - begin);
    // Defined where a colon follows, perhaps after a priority or attributes.
    size_t next = at_;
    if (next < text_.size() && text_[next] == '.')
      for (++next; next < text_.size() && (is_name(text_[next]) || text_[next] == '-'); ++next) continue;
    if (next < text_.size() && text_[next] == '[') {
      const size_t close = text_.find(']', next);
      if (close != std::string_view::npos && text_.substr(close + 1, 2).find(':') != std::string_view::npos)
        next = close + 1;
    }
    while (next < text_.size() && (text_[next] == ' ' || text_[next] == '\t')) ++next;
    if (next < text_.size() && text_[next] == ':') {
      at_ = next + 1;
      current_ = is_terminal(found) ? &terminals_[std::string(found)] : nullptr;
    } else if (current_ != nullptr && is_terminal(found)) {
      current_->uses.emplace_back(found);
    }
  }

  void skip_json() {
    int depth = 0;
    bool quoted = false;
    for (at_ = std::min(text_.find('{', at_), text_.size()); at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (quoted && c == '\\') ++at_;
      else if (c == '"') quoted = !quoted;
      else if (!quoted && c == '{') ++depth;
      else if (!quoted && c == '}' && --depth == 0) break;
    }
    if (at_ < text_.size()) ++at_;
  }

  const Size& total(const std::string& name) {
    static const Size kNothing;
    const auto found = terminals_.find(name);
    if (found == terminals_.end() || found->second.state == Terminal::kOpen) return kNothing;
    Terminal& terminal = found->second;
    if (terminal.state == Terminal::kNew) {
      terminal.state = Terminal::kOpen;
      for (const std::string& used : terminal.uses) terminal.own.add(total(used));
      terminal.state = Terminal::kDone;
    }
    return terminal.own;
  }

  std::string_view text_;
  size_t at_ = 0;
  std::map<std::string, Terminal> terminals_;
  Terminal* current_ = nullptr;
};

}  // namespace

void check_lexemes(const GrammarSpec& spec) {
  if (spec.kind == GrammarSpec::Kind::kRegex) check(size_of_regex(spec.text), "expression");
  if (spec.kind == GrammarSpec::Kind::kLark) Lark(spec.text).run();
  if (spec.kind == GrammarSpec::Kind::kJsonSchema) {
    Patterns patterns;
    (void)nlohmann::json::sax_parse(spec.text, &patterns);
  }
}

}  // namespace phalanx::text
