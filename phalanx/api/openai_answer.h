#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "phalanx/api/openai.h"

// What chat and completions share. Only included by their .cc files.
namespace phalanx::api {

using OrderedJson = nlohmann::ordered_json;

[[nodiscard]] std::string dump(const OrderedJson& json);
[[nodiscard]] OrderedJson usage_json(const Usage& usage);
[[nodiscard]] OrderedJson finish_json(engine::FinishReason reason);

// All pieces of one choice.
struct Choice {
  std::string text;
  std::vector<TokenPiece> tokens;
  std::vector<engine::PromptLogprob> prompt;
  engine::FinishReason finish = engine::FinishReason::kNone;
  decltype(Piece::stop_reason) stop_reason;
};

// vLLM's prompt_logprobs: null for the first token, then {id: {logprob, rank, decoded_token}}.
[[nodiscard]] OrderedJson prompt_logprobs_json(const std::vector<engine::PromptLogprob>& prompt,
                                               const TextPort& text);

// The choices in the order to return them: as they are, or, where a prompt has several, its own by
// falling cumulative log-probability.
[[nodiscard]] std::vector<size_t> choice_order(const Outcome& outcome, int sequences);

// The parts of an answer that do not depend on the dialect: whole or as a stream of events, and how
// each fails. A dialect says how a choice looks.
class OpenAiAnswer : public Answer {
 public:
  explicit OpenAiAnswer(AnswerContext context);
  void start() override;
  void piece(const Piece& piece, const Usage& usage) override;
  void finish(const Outcome& outcome) override;
  void fail(const Refusal& refusal) override;

 protected:
  // The event that opens a choice's stream, if the dialect has one.
  virtual void open_choice(int choice) = 0;
  // The events of a piece, each one choice; none where nothing is to be shown.
  [[nodiscard]] virtual std::vector<OrderedJson> stream_choices(const Piece& piece) = 0;
  [[nodiscard]] virtual OrderedJson whole_choice(int index, const Choice& choice) = 0;
  [[nodiscard]] virtual const char* object(bool stream) const = 0;
  [[nodiscard]] virtual OrderedJson usage(const Usage& usage) const;

  [[nodiscard]] OrderedJson frame(bool stream) const;
  void send(const OrderedJson& event);

  const AnswerContext context_;

 private:
  bool started_ = false;
  std::vector<Choice> choices_;
  std::vector<bool> opened_;
  std::vector<std::string> full_texts_;
};

}  // namespace phalanx::api
