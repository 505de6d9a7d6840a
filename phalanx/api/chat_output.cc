#include "phalanx/api/chat_output.h"

#include <random>

namespace phalanx::api {

std::string make_call_id() {
  static constexpr std::string_view kLetters =
      "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  thread_local std::mt19937_64 random{std::random_device{}()};
  std::string id = "call_";
  for (int i = 0; i < 8; ++i) id += kLetters[random() % kLetters.size()];
  return id;
}

ChatOutput::ChatOutput(const OutputFormat& format)
    : format_(format), parser_(format.calls, format.tools), counting_(format.reasoning) {
  if (format.reasoning)
    splitter_ = std::make_unique<text::ReasoningSplitter>(format.reasoning_start, format.reasoning_end);
}

void ChatOutput::count(const std::vector<TokenPiece>& tokens) {
  const auto& end = format_.reasoning_end_ids;
  for (const TokenPiece& token : tokens) {
    if (!counting_) return;
    ++reasoning_tokens_;
    if (end.empty()) continue;
    if (token.id != end[matched_]) matched_ = 0;
    if (token.id == end[matched_]) ++matched_;
    if (matched_ < end.size()) continue;
    counting_ = false;
    reasoning_tokens_ -= static_cast<int64_t>(end.size());  // the index of the end
  }
}

void ChatOutput::take(text::CallParser::Piece piece, ChatDelta* out) {
  out->content += piece.content;
  for (text::ToolCall& call : piece.calls) {
    if (!format_.parallel && calls_ > 0) return;
    out->calls.push_back({.index = calls_++, .id = make_call_id(), .call = std::move(call)});
  }
}

ChatDelta ChatOutput::push(std::string_view text, const std::vector<TokenPiece>& tokens, bool last) {
  ChatDelta out;
  count(tokens);
  std::string content(text);
  if (splitter_) {
    auto split = splitter_->push(text);
    out.reasoning = std::move(split.reasoning);
    content = std::move(split.content);
    if (last) {
      split = splitter_->finish();
      out.reasoning += split.reasoning;
      content += split.content;
    }
  }
  take(parser_.push(content), &out);
  if (last) take(parser_.finish(), &out);
  return out;
}

}  // namespace phalanx::api
