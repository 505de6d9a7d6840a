#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace phalanx::text {

// How a family of models writes calls of functions. Reference: models-and-features sheet, chapter 3.
enum class CallFormat {
  kNone,          // never parsed
  kLlamaJson,     // the whole output is {"name": …, "parameters": {…}}, several separated by ';'
  kChatGlm3,      // NAME ⏎ … tool_call(key=value, …); parts separated by <|assistant|>
  kGlm4,          // NAME ⏎ {…}
  kDeepSeekV3,    // <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME ⏎ ```json ⏎ {…} ⏎ ```
  kDeepSeekV31,   // <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}
  kDeepSeekV32,   // <｜DSML｜invoke name="NAME"> <｜DSML｜parameter name="K" string="true">V</…>
  kQwen2,         // ✿FUNCTION✿: NAME ✿ARGS✿: {…}
  kHermes,        // <tool_call> {"name": …, "arguments": {…}} </tool_call>
  kQwenAuto,      // kQwen2 or kHermes, whichever comes
  kQwen3Coder,    // <tool_call> <function=NAME> <parameter=K> V </parameter> </function> </tool_call>
  kJsonList,      // [{"name": …, "parameters": {…}}, …]: what a forced call is constrained to
};

// By one of the registered names ("hermes", "deepseek_v31", …); nothing for an unknown one.
[[nodiscard]] std::optional<CallFormat> call_format(std::string_view name);
// The default of a family, by config.json's model_type.
[[nodiscard]] CallFormat default_call_format(std::string_view model_type);
// Every registered name.
[[nodiscard]] std::vector<std::string> call_format_names();

struct ToolCall {
  std::string name;
  std::string arguments;  // the JSON text of an object
};

// Finds calls in a text that comes in pieces, cut anywhere: the content and calls of all pieces
// together are a function of the whole text alone, so that streaming and not streaming agree.
// Content is the text before the first call, without the space in between; after the first call only
// further calls are handed out. What begins like a call and is not one is content. A call is handed
// out when it is complete. Not thread-safe.
class CallParser {
 public:
  // `tools_json`: the offered tools as in OpenAI's request; names decide for the formats without
  // markers, schemas the types of arguments that are written without them.
  CallParser(CallFormat format, std::string_view tools_json);

  struct Piece {
    std::string content;
    std::vector<ToolCall> calls;
  };
  [[nodiscard]] Piece push(std::string_view text);
  // The end of the text: what was held back.
  [[nodiscard]] Piece finish();
  [[nodiscard]] bool any_call() const { return any_call_; }

 private:
  struct Attempt;
  void advance(bool at_end, Piece* out);
  bool skip_text(bool at_end, Piece* out);
  void emit(std::string_view text, Piece* out);
  [[nodiscard]] Attempt attempt(std::string_view text) const;

  CallFormat format_;
  std::vector<std::string> markers_;         // with which a call begins
  std::vector<std::string> silent_;          // dropped wherever they stand
  std::map<std::string, std::string> tools_; // name to the JSON text of its parameters' schema
  std::string held_;
  std::string space_;                        // before what comes next, if that is content
  bool at_start_ = true;                     // of the text, or of a part after <|assistant|>
  bool in_call_ = false;
  bool any_call_ = false;
};

// Splits reasoning from the answer. Reasoning ends with `end`; `start` may stand at its begin or be
// absent. Without `end` everything is reasoning. Space around both texts is dropped. The result of all
// pieces does not depend on how the text was cut. Not thread-safe.
class ReasoningSplitter {
 public:
  ReasoningSplitter(std::string start, std::string end);
  struct Piece {
    std::string reasoning, content;
  };
  [[nodiscard]] Piece push(std::string_view text);
  [[nodiscard]] Piece finish();
  [[nodiscard]] bool reasoning() const { return state_ != State::kAnswer; }

 private:
  enum class State { kBegin, kReasoning, kAnswer };
  std::string start_, end_;
  State state_ = State::kBegin;
  bool answered_ = false;  // content has begun
  std::string held_;
};

}  // namespace phalanx::text
