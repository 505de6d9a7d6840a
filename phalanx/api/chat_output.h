#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/generate_service.h"
#include "phalanx/text/tool_calls.h"

namespace phalanx::api {

// How the text of a chat's answer is taken apart.
struct OutputFormat {
  bool reasoning = false;
  std::string reasoning_start, reasoning_end;
  std::vector<int32_t> reasoning_end_ids;
  text::CallFormat calls = text::CallFormat::kNone;
  std::string tools;       // JSON array of the offered ones
  bool parallel = true;    // false: calls after the first are dropped
};

struct NumberedCall {
  int index = 0;           // counts the calls of a choice
  std::string id;          // call_ and 8 letters or digits
  text::ToolCall call;
};

struct ChatDelta {
  std::string reasoning, content;
  std::vector<NumberedCall> calls;
  [[nodiscard]] bool empty() const { return reasoning.empty() && content.empty() && calls.empty(); }
};

// One choice's text on its way to a client. What comes out does not depend on how the text is cut.
class ChatOutput {
 public:
  explicit ChatOutput(const OutputFormat& format);
  // `last`: nothing comes after it.
  [[nodiscard]] ChatDelta push(std::string_view text, const std::vector<TokenPiece>& tokens, bool last);
  [[nodiscard]] bool any_call() const { return calls_ > 0; }
  [[nodiscard]] int64_t reasoning_tokens() const { return reasoning_tokens_; }

 private:
  void count(const std::vector<TokenPiece>& tokens);
  void take(text::CallParser::Piece piece, ChatDelta* out);

  const OutputFormat& format_;
  std::unique_ptr<text::ReasoningSplitter> splitter_;
  text::CallParser parser_;
  int calls_ = 0;
  bool counting_;
  size_t matched_ = 0;  // of reasoning_end_ids
  int64_t reasoning_tokens_ = 0;
};

// call_ and 8 letters or digits.
[[nodiscard]] std::string make_call_id();

}  // namespace phalanx::api
