#include "phalanx/text/tool_calls.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "phalanx/text/call_syntax.h"

namespace phalanx::text {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr std::string_view kAssistant = "<|assistant|>";
constexpr std::string_view kPythonTag = "<|python_tag|>";
constexpr std::string_view kSep = "<｜tool▁sep｜>";
constexpr size_t kMaxHead = 256;  // bytes between a call's marker and its arguments

struct Named {
  std::string_view name;
  CallFormat format;
};
constexpr Named kNames[] = {
    {"llama", CallFormat::kLlamaJson},
    {"llama3", CallFormat::kLlamaJson},
    {"llama3_1", CallFormat::kLlamaJson},
    {"chatglm2_6b", CallFormat::kNone},
    {"chatglm_v2_6b", CallFormat::kNone},
    {"chatglm_v2", CallFormat::kNone},
    {"chatglm2", CallFormat::kNone},
    {"chatglm3_6b", CallFormat::kChatGlm3},
    {"chatglm_v3_6b", CallFormat::kChatGlm3},
    {"chatglm_v3", CallFormat::kChatGlm3},
    {"chatglm3", CallFormat::kChatGlm3},
    {"chatglm4_9b", CallFormat::kGlm4},
    {"chatglm_v4_9b", CallFormat::kGlm4},
    {"glm_4", CallFormat::kGlm4},
    {"glm_4_9b", CallFormat::kGlm4},
    {"deepseek_v2", CallFormat::kDeepSeekV3},
    {"deepseek_v3", CallFormat::kDeepSeekV3},
    {"deepseekv2", CallFormat::kDeepSeekV3},
    {"deepseekv3", CallFormat::kDeepSeekV3},
    {"deepseek_v31", CallFormat::kDeepSeekV31},
    {"deepseekv31", CallFormat::kDeepSeekV31},
    {"deepseek_v32", CallFormat::kDeepSeekV32},
    {"deepseekv32", CallFormat::kDeepSeekV32},
    {"qwen1_5", CallFormat::kQwen2},
    {"qwen_1_5", CallFormat::kQwen2},
    {"qwen2", CallFormat::kQwen2},
    {"qwen_2", CallFormat::kQwen2},
    {"qwen1_5_or_2", CallFormat::kQwen2},
    {"qwen_1_5_or_2", CallFormat::kQwen2},
    {"qwen2_5", CallFormat::kHermes},
    {"qwen_2_5", CallFormat::kHermes},
    {"qwen_auto", CallFormat::kQwenAuto},
    {"qwen3", CallFormat::kHermes},
    {"qwen3_moe", CallFormat::kHermes},
    {"hermes", CallFormat::kHermes},
    {"qwen3_coder", CallFormat::kQwen3Coder},
    {"qwen3coder", CallFormat::kQwen3Coder},
};

bool by_line(CallFormat format) {
  return format == CallFormat::kChatGlm3 || format == CallFormat::kGlm4;
}
bool whole_json(CallFormat format) {
  return format == CallFormat::kLlamaJson || format == CallFormat::kJsonList;
}

std::vector<std::string> begin_markers(CallFormat format) {
  switch (format) {
    case CallFormat::kDeepSeekV3:
    case CallFormat::kDeepSeekV31: return {"<｜tool▁call▁begin｜>"};
    case CallFormat::kDeepSeekV32: return {"<｜DSML｜invoke name=\""};
    case CallFormat::kQwen2: return {"✿FUNCTION✿:"};
    case CallFormat::kHermes: return {"<tool_call>"};
    case CallFormat::kQwenAuto: return {"<tool_call>", "✿FUNCTION✿:"};
    case CallFormat::kQwen3Coder: return {"<function="};
    default: return {};
  }
}

std::vector<std::string> silent_markers(CallFormat format) {
  switch (format) {
    case CallFormat::kDeepSeekV3:
    case CallFormat::kDeepSeekV31: return {"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"};
    case CallFormat::kDeepSeekV32: return {"<｜DSML｜function_calls>", "</｜DSML｜function_calls>"};
    case CallFormat::kQwen3Coder: return {"<tool_call>", "</tool_call>"};
    case CallFormat::kLlamaJson: return {std::string(kPythonTag)};
    case CallFormat::kChatGlm3:
    case CallFormat::kGlm4: return {std::string(kAssistant)};
    default: return {};
  }
}

}  // namespace

std::optional<CallFormat> call_format(std::string_view name) {
  for (const Named& named : kNames)
    if (named.name == name) return named.format;
  return std::nullopt;
}

CallFormat default_call_format(std::string_view type) {
  if (type == "llama") return CallFormat::kLlamaJson;
  if (type == "deepseek_v32") return CallFormat::kDeepSeekV32;
  if (type.starts_with("deepseek") || type == "kimi_k2") return CallFormat::kDeepSeekV3;
  if (type == "qwen2" || type == "qwen2_moe") return CallFormat::kQwenAuto;
  if (type.starts_with("qwen")) return CallFormat::kHermes;
  return CallFormat::kNone;
}

std::vector<std::string> call_format_names() {
  std::vector<std::string> names;
  for (const Named& named : kNames) names.emplace_back(named.name);
  return names;
}

CallParser::CallParser(CallFormat format, std::string_view tools_json)
    : format_(format), markers_(begin_markers(format)), silent_(silent_markers(format)) {
  if (tools_json.empty()) return;
  const auto tools = OrderedJson::parse(tools_json, nullptr, false);
  if (!tools.is_array()) return;
  for (const auto& tool : tools) {
    const auto function = tool.find("function");
    if (function == tool.end() || !function->is_object() || !function->contains("name")) continue;
    const auto& name = (*function)["name"];
    if (!name.is_string()) continue;
    const auto parameters = function->find("parameters");
    tools_[name.get<std::string>()] =
        parameters != function->end() ? parameters->dump() : std::string();
  }
}

// What stands at the begin of a text.
struct CallParser::Attempt {
  enum class Verdict { kMore, kBad, kGood } verdict = Verdict::kMore;
  size_t used = 0;  // bytes; bad: they are content
  std::vector<ToolCall> calls;

  static Attempt bad(size_t used) { return {Verdict::kBad, used, {}}; }
  static Attempt good(size_t used, ToolCall call) { return {Verdict::kGood, used, {std::move(call)}}; }
};

CallParser::Piece CallParser::push(std::string_view text) {
  Piece out;
  if (format_ == CallFormat::kNone) {
    out.content = text;
    return out;
  }
  held_ += text;
  advance(false, &out);
  return out;
}

CallParser::Piece CallParser::finish() {
  Piece out;
  advance(true, &out);
  if (!any_call_) out.content += space_;
  space_.clear();
  return out;
}

void CallParser::emit(std::string_view text, Piece* out) {
  for (const char c : text) {
    if (c == ' ' || c == '\n' || c == '\t' || c == '\r') {
      space_ += c;
      continue;
    }
    if (!any_call_) {
      out->content += space_;
      out->content += c;
    }
    space_.clear();
    at_start_ = false;
  }
}

void CallParser::advance(bool at_end, Piece* out) {
  for (;;) {
    if (!in_call_ && !skip_text(at_end, out)) return;
    Attempt attempt = this->attempt(held_);
    if (attempt.verdict == Attempt::Verdict::kMore) {
      if (!at_end) return;
      // A call that never ended.
      attempt = Attempt::bad(held_.size());
    }
    if (attempt.verdict == Attempt::Verdict::kGood) {
      any_call_ = true;
      space_.clear();
      std::move(attempt.calls.begin(), attempt.calls.end(), std::back_inserter(out->calls));
    } else {
      emit(std::string_view(held_).substr(0, attempt.used), out);
      at_start_ = false;
    }
    held_.erase(0, attempt.used);
    in_call_ = false;
  }
}

// Hands on text until a call may begin; true: held_ begins with it. False: more text is needed, or
// the text is at its end.
bool CallParser::skip_text(bool at_end, Piece* out) {
  for (;;) {
    if (held_.empty()) return false;
    // Where a call, or a mark to drop, begins first.
    size_t at = std::string::npos;
    size_t length = 0;
    bool silent = false;
    const auto look = [&](const std::vector<std::string>& marks, bool drop) {
      for (const std::string& mark : marks) {
        const size_t found = held_.find(mark);
        if (found >= at) continue;
        at = found;
        length = mark.size();
        silent = drop;
      }
    };
    look(markers_, false);
    look(silent_, true);
    if (whole_json(format_) && (at_start_ || any_call_)) {
      const size_t first = held_.find_first_not_of(" \t\r\n");
      if (first == std::string::npos) {
        emit(held_, out);
        held_.clear();
        return false;
      }
      const char open = format_ == CallFormat::kJsonList ? '[' : '{';
      const size_t opened = any_call_ ? held_.find(open) : first;
      if (opened < at && held_[opened] == open) {
        emit(std::string_view(held_).substr(0, opened), out);
        held_.erase(0, opened);
        return in_call_ = true;
      }
    }
    if (by_line(format_) && at_start_) {
      const size_t first = held_.find_first_not_of(" \t\r\n");
      if (first != std::string::npos && first < at) {
        const std::string_view rest = std::string_view(held_).substr(first);
        const size_t line = rest.find('\n');
        const std::string_view name = syntax::trimmed(rest.substr(0, line));
        if (line != std::string_view::npos && tools_.contains(std::string(name))) {
          emit(std::string_view(held_).substr(0, first), out);
          held_.erase(0, first);
          return in_call_ = true;
        }
        // A line that is not whole may become a tool's name.
        if (line == std::string_view::npos && !at_end &&
            std::any_of(tools_.begin(), tools_.end(),
                        [&](const auto& tool) { return tool.first.starts_with(name); }))
          return false;
        at_start_ = false;
        continue;
      }
      if (first == std::string::npos) {
        emit(held_, out);
        held_.clear();
        return false;
      }
    }
    if (at == std::string::npos) {
      const size_t keep = at_end ? 0
                                 : std::max(syntax::partial_suffix(held_, markers_),
                                            syntax::partial_suffix(held_, silent_));
      emit(std::string_view(held_).substr(0, held_.size() - keep), out);
      held_.erase(0, held_.size() - keep);
      return false;
    }
    emit(std::string_view(held_).substr(0, at), out);
    if (!silent) {
      held_.erase(0, at);
      return in_call_ = true;
    }
    held_.erase(0, at + length);
    at_start_ = true;
  }
}

CallParser::Attempt CallParser::attempt(std::string_view text) const {
  using Verdict = Attempt::Verdict;
  const auto from_object = [&](size_t open, size_t bad_used, std::string name) {
    size_t close = 0;
    switch (syntax::scan_json(text.substr(open), &close)) {
      case syntax::Scan::kMore: return Attempt{};
      case syntax::Scan::kBad: return Attempt::bad(bad_used);
      case syntax::Scan::kGood: break;
    }
    const std::string_view object = text.substr(open, close);
    auto call = name.empty() ? syntax::call_of_object(object)
                             : syntax::call_of_arguments(std::move(name), object);
    return call ? Attempt::good(open + close, std::move(*call)) : Attempt::bad(open + close);
  };
  // Where the arguments begin after the head; a ```json fence may stand before them.
  const auto find_object = [&](size_t from, size_t* open) {
    size_t at = from;
    for (int fences = 0;; ++fences) {
      at = syntax::skip_space(text, at);
      const std::string_view rest = text.substr(std::min(at, text.size()));
      if (rest.empty()) return Verdict::kMore;
      if (rest[0] == '{') {
        *open = at;
        return Verdict::kGood;
      }
      const std::string_view fence = "```json";
      if (fences > 0 || rest.substr(0, fence.size()) != fence.substr(0, rest.size()))
        return Verdict::kBad;
      if (rest.size() < fence.size()) return Verdict::kMore;
      at += fence.size();
    }
  };
  // The name between `from` and `mark`.
  const auto read_name = [&](size_t from, std::string_view mark, std::string* name, size_t* end) {
    const size_t at = text.find(mark, from);
    if (at == std::string_view::npos && text.size() - from <= kMaxHead + mark.size())
      return Verdict::kMore;
    if (at == std::string_view::npos || at - from > kMaxHead) return Verdict::kBad;
    *name = syntax::trimmed(text.substr(from, at - from));
    *end = at + mark.size();
    return syntax::is_name(*name) ? Verdict::kGood : Verdict::kBad;
  };
  const auto named = [&](size_t from, std::string_view mark, size_t marker) {
    std::string name;
    size_t end = 0;
    size_t open = 0;
    Verdict verdict = read_name(from, mark, &name, &end);
    if (verdict == Verdict::kGood) verdict = find_object(end, &open);
    if (verdict == Verdict::kMore) return Attempt{};
    if (verdict == Verdict::kBad) return Attempt::bad(marker);
    return from_object(open, marker, std::move(name));
  };
  const auto tagged = [&](const syntax::Tags& tags) {
    const size_t begin = markers_.front().size();
    size_t end = 0;
    ToolCall call;
    switch (syntax::scan_tagged_call(text.substr(begin), tags, tools_, &end, &call)) {
      case syntax::Scan::kMore: return Attempt{};
      case syntax::Scan::kBad: return Attempt::bad(begin);
      case syntax::Scan::kGood: break;
    }
    return Attempt::good(begin + end, std::move(call));
  };
  const auto marker = [&]() {
    for (const std::string& mark : markers_)
      if (text.starts_with(mark)) return mark.size();
    return size_t{0};
  };

  switch (format_) {
    case CallFormat::kLlamaJson: return from_object(0, 1, {});
    case CallFormat::kJsonList: {
      size_t close = 0;
      const auto scan = syntax::scan_json(text, &close);
      if (scan == syntax::Scan::kMore) return {};
      if (scan == syntax::Scan::kBad) return Attempt::bad(1);
      auto calls = syntax::calls_of_array(text.substr(0, close));
      if (!calls) return Attempt::bad(close);
      return {Verdict::kGood, close, std::move(*calls)};
    }
    case CallFormat::kHermes:
    case CallFormat::kQwenAuto:
    case CallFormat::kQwen2: {
      const size_t begin = marker();
      if (!text.starts_with("<tool_call>")) return named(begin, "✿ARGS✿:", begin);
      size_t open = 0;
      const Verdict verdict = find_object(begin, &open);
      if (verdict == Verdict::kMore) return {};
      if (verdict == Verdict::kBad) return Attempt::bad(begin);
      return from_object(open, begin, {});
    }
    case CallFormat::kDeepSeekV3: {
      const size_t begin = marker();
      const size_t sep = text.find(kSep, begin);
      if (sep == std::string_view::npos && text.size() - begin <= kMaxHead + kSep.size()) return {};
      if (sep == std::string_view::npos || sep - begin > kMaxHead) return Attempt::bad(begin);
      if (syntax::trimmed(text.substr(begin, sep - begin)) != "function") return Attempt::bad(begin);
      return named(sep + kSep.size(), "\n", begin);
    }
    case CallFormat::kDeepSeekV31: return named(marker(), kSep, marker());
    case CallFormat::kDeepSeekV32: return tagged(syntax::kDsml);
    case CallFormat::kQwen3Coder: return tagged(syntax::kXml);
    case CallFormat::kGlm4: return named(0, "\n", std::min(text.find('\n'), text.size()));
    case CallFormat::kChatGlm3: {
      const size_t line = text.find('\n');
      const size_t limit = text.find(kAssistant);
      const size_t begin = text.find("tool_call(", line);
      if (begin == std::string_view::npos || begin > limit)
        return limit == std::string_view::npos ? Attempt{} : Attempt::bad(limit);
      size_t close = 0;
      std::string arguments;
      switch (syntax::scan_python_call(text.substr(begin + 10), &close, &arguments)) {
        case syntax::Scan::kMore: return {};
        case syntax::Scan::kBad: return Attempt::bad(begin + 10);
        case syntax::Scan::kGood: break;
      }
      return Attempt::good(begin + 10 + close,
                           {std::string(syntax::trimmed(text.substr(0, line))), std::move(arguments)});
    }
    case CallFormat::kNone: break;
  }
  return Attempt::bad(text.size());
}

// --- ReasoningSplitter -----------------------------------------------------------------------

ReasoningSplitter::ReasoningSplitter(std::string start, std::string end)
    : start_(std::move(start)), end_(std::move(end)) {}

ReasoningSplitter::Piece ReasoningSplitter::push(std::string_view text) {
  Piece out;
  held_ += text;
  if (state_ == State::kBegin) {
    const size_t first = held_.find_first_not_of(" \t\r\n");
    held_.erase(0, first);
    if (held_.empty()) return out;
    if (held_.size() < start_.size() && start_.starts_with(held_)) return out;
    if (!start_.empty() && held_.starts_with(start_)) {
      held_.erase(0, start_.size());
      start_.clear();
      return push({});  // again past the space after it
    }
    state_ = State::kReasoning;
  }
  if (state_ == State::kReasoning) {
    const size_t at = held_.find(end_);
    if (at == std::string::npos) {
      // The space at the end is dropped if the end comes after it.
      size_t decided = held_.size() - syntax::partial_suffix(held_, {end_});
      decided = decided == 0 ? 0 : held_.find_last_not_of(" \t\r\n", decided - 1) + 1;
      out.reasoning = held_.substr(0, decided);
      held_.erase(0, decided);
      return out;
    }
    out.reasoning = syntax::trimmed_right(std::string_view(held_).substr(0, at));
    held_.erase(0, at + end_.size());
    state_ = State::kAnswer;
  }
  if (!answered_) {
    held_.erase(0, held_.find_first_not_of(" \t\r\n"));
    answered_ = !held_.empty();
  }
  out.content = std::exchange(held_, {});
  return out;
}

ReasoningSplitter::Piece ReasoningSplitter::finish() {
  Piece out;
  if (state_ != State::kAnswer) out.reasoning = syntax::trimmed_right(held_);
  held_.clear();
  return out;
}

}  // namespace phalanx::text
