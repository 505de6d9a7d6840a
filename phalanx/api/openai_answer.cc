#include "phalanx/api/openai_answer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

namespace phalanx::api {

std::string dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

OrderedJson usage_json(const Usage& usage) {
  OrderedJson json;
  json["prompt_tokens"] = usage.prompt_tokens;
  if (usage.cached_tokens > 0)
    json["prompt_tokens_details"] = OrderedJson{{"cached_tokens", usage.cached_tokens}};
  json["completion_tokens"] = usage.completion_tokens;
  json["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  return json;
}

OrderedJson finish_json(engine::FinishReason reason) {
  if (reason == engine::FinishReason::kStop) return "stop";
  if (reason == engine::FinishReason::kLength) return "length";
  return nullptr;
}

OrderedJson prompt_logprobs_json(const std::vector<engine::PromptLogprob>& prompt,
                                 const TextPort& text) {
  OrderedJson list = OrderedJson::array({nullptr});
  for (const engine::PromptLogprob& token : prompt) {
    OrderedJson entry = OrderedJson::object();
    const auto add = [&](int32_t id, float logprob, int64_t rank) {
      entry[std::to_string(id)] =
          OrderedJson{{"logprob", logprob}, {"rank", rank}, {"decoded_token", text.token_text(id)}};
    };
    add(token.token, token.logprob, token.rank);
    for (size_t i = 0; i < token.top.size(); ++i)
      add(token.top[i].token, token.top[i].logprob, static_cast<int64_t>(i) + 1);
    list.push_back(std::move(entry));
  }
  return list;
}

std::vector<size_t> choice_order(const Outcome& outcome, int sequences) {
  std::vector<size_t> order(outcome.cumulative_logprob.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (sequences < 2) return order;
  for (auto begin = order.begin(); begin != order.end(); begin += sequences)
    std::stable_sort(begin, begin + sequences, [&](size_t a, size_t b) {
      return outcome.cumulative_logprob[a] > outcome.cumulative_logprob[b];
    });
  return order;
}

OpenAiAnswer::OpenAiAnswer(AnswerContext context)
    : context_(std::move(context)),
      choices_(context_.stream ? 0 : static_cast<size_t>(context_.choices)),
      opened_(static_cast<size_t>(context_.choices)),
      full_texts_(opened_.size()) {}

OrderedJson OpenAiAnswer::frame(bool stream) const {
  OrderedJson json;
  json["id"] = context_.id;
  json["object"] = object(stream);
  json["created"] = context_.created;
  json["model"] = context_.model;
  return json;
}

OrderedJson OpenAiAnswer::usage(const Usage& usage) const { return usage_json(usage); }

void OpenAiAnswer::send(const OrderedJson& event) {
  context_.responder->write("data: " + dump(event) + "\n\n");
}

void OpenAiAnswer::start() {
  if (!context_.stream) return;
  started_ = true;
  context_.responder->start_stream(200, "text/event-stream", context_.headers);
}

void OpenAiAnswer::piece(const Piece& piece, const Usage& usage) {
  const auto index = static_cast<size_t>(piece.choice);
  if (!context_.stream) {
    Choice& choice = choices_[index];
    choice.text += piece.text;
    choice.tokens.insert(choice.tokens.end(), piece.tokens.begin(), piece.tokens.end());
    if (!piece.prompt.empty()) choice.prompt = piece.prompt;
    choice.finish = piece.finish;
    choice.stop_reason = piece.stop_reason;
    return;
  }
  if (!opened_[index]) {
    opened_[index] = true;
    open_choice(piece.choice);
  }
  const bool last = piece.finish != engine::FinishReason::kNone;
  if (context_.full_text) full_texts_[index] += piece.text;
  std::vector<OrderedJson> events = stream_choices(piece);
  for (size_t i = 0; i < events.size(); ++i) {
    OrderedJson event = frame(true);
    event["choices"] = OrderedJson::array({std::move(events[i])});
    const bool ends = last && i + 1 == events.size();
    if (ends && context_.full_text) event["full_text"] = full_texts_[index];
    if (ends || context_.continuous_usage) event["usage"] = this->usage(usage);
    send(event);
  }
}

void OpenAiAnswer::finish(const Outcome& outcome) {
  if (context_.stream) {
    if (context_.include_usage) {
      OrderedJson event = frame(true);
      event["choices"] = OrderedJson::array();
      event["usage"] = usage(outcome.usage);
      send(event);
    }
    context_.responder->write("data: [DONE]\n\n");
    context_.responder->end();
    return;
  }
  OrderedJson body = frame(false);
  OrderedJson choices = OrderedJson::array();
  for (const size_t i : choice_order(outcome, context_.beams ? 1 : context_.sequences))
    choices.push_back(whole_choice(static_cast<int>(choices.size()), choices_[i]));
  body["choices"] = std::move(choices);
  body["usage"] = usage(outcome.usage);
  context_.responder->respond({.status = 200, .body = dump(body), .headers = context_.headers});
}

void OpenAiAnswer::fail(const Refusal& refusal) {
  if (!started_) return context_.responder->respond(to_response(refusal));
  context_.responder->write("data: " + to_json(refusal) + "\n\n");
  context_.responder->end();
}

}  // namespace phalanx::api
