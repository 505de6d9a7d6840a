#include "phalanx/api/openai.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

ServiceOptions options() {
  ServiceOptions options;
  options.model_name = "demo";
  options.vocab_size = 500;
  options.max_batch = 16;
  options.max_prefill_batch = 8;
  options.max_n = 4;
  return options;
}

// The body with `patch` laid over it.
std::string chat_body(const json& patch) {
  json body = {{"model", "demo"}, {"messages", json::array({{{"role", "user"}, {"content", "Hi"}}})}};
  body.merge_patch(patch);
  return body.dump();
}
std::string completion_body(const json& patch) {
  json body = {{"model", "demo"}, {"prompt", "Hi"}};
  body.merge_patch(patch);
  return body.dump();
}

template <typename Parse>
std::string refusal_of(Parse parse, const std::string& body, int status = 422) {
  try {
    (void)parse(body, options());
  } catch (const Refused& refused) {
    EXPECT_EQ(refused.refusal().status, status) << body;
    EXPECT_EQ(refused.refusal().error_type, "Input Validation Error");
    return refused.refusal().error;
  }
  return "accepted";
}

struct Case {
  json patch;
  std::string error;
};

// merge_patch cannot put a null, which counts as absent anyway.
const std::vector<Case>& common_cases() {
  static const std::vector<Case> cases = {
      {{{"model", nullptr}}, "Request contains not model or model null"},
      {{{"model", 1}}, "Request param model must be string"},
      {{{"model", ""}}, "Request param model must be not empty"},
      {{{"max_tokens", "x"}}, "Parameter max_tokens not number_integer"},
      {{{"max_tokens", 1.5}}, "Parameter max_tokens not number_integer"},
      {{{"max_tokens", 0}}, "Parameter max_tokens must be (0,2147483647], got 0"},
      {{{"max_tokens", 2147483648}}, "Parameter max_tokens must be (0,2147483647], got 2147483648"},
      {{{"max_tokens", 18446744073709551615u}},
       "Parameter max_tokens must be (0,2147483647], got 18446744073709551615"},
      {{{"max_completion_tokens", -1}},
       "Parameter max_completion_tokens must be (0,2147483647], got -1"},
      {{{"max_tokens", 5}, {"min_tokens", 6}}, "Parameter min_tokens must be in [0,5], got 6."},
      {{{"temperature", "hot"}}, "temperature must be float type."},
      {{{"temperature", -0.5}}, "Parameter temperature must be in (0.0,3.40282e+38], got -0.5."},
      {{{"temperature", 1e39}}, "Parameter temperature must be in (0.0,3.40282e+38], got 1e+39."},
      {{{"top_k", 0}}, "Parameter top_k must be in -1 || (0,2147483647], got 0"},
      {{{"top_k", -2}}, "Parameter top_k must be in -1 || (0,2147483647], got -2"},
      {{{"top_k", 1.5}}, "top_k must be integer type."},
      {{{"top_p", 0}}, "Parameter top_p must be in (0.0,1.0], got 0."},
      {{{"top_p", 1.1}}, "Parameter top_p must be in (0.0,1.0], got 1.1."},
      {{{"min_p", 2}}, "Parameter min_p must be in [0.0,1.0], got 2."},
      {{{"repetition_penalty", 0}}, "Parameter 'repetition_penalty' must be in (0.0, 2.0], got 0."},
      {{{"repetition_penalty", 2.5}}, "Parameter 'repetition_penalty' must be in (0.0, 2.0], got 2.5."},
      {{{"presence_penalty", 3}}, "Parameter presence_penalty not in [-2.0, 2.0], but got 3."},
      {{{"frequency_penalty", -3}}, "Parameter frequency_penalty should be in [-2.0, 2.0], got -3."},
      {{{"seed", -1}}, "Parameter seed must be in [0, 9223372036854775807], got -1."},
      {{{"seed", 9223372036854775808u}},
       "Parameter seed must be in [0, 9223372036854775807], got 9223372036854775808."},
      {{{"seed", "x"}}, "seed must be unsigned type."},
      {{{"stop", 1}}, "Input validation error: param stop must be string or list[string]"},
      {{{"stop", ""}}, "Input validation error: length of `stop` must be in [1, 32768], but got 0"},
      {{{"stop", {"a", 1}}},
       "Input validation error: `stop` must be list[string] if list, and item length in [1, 1024] with "
       "total <= 32768"},
      {{{"stop", {""}}},
       "Input validation error: `stop` must be list[string] if list, and item length in [1, 1024] with "
       "total <= 32768"},
      {{{"stop_token_ids", 1}}, "Parameter stop_token_ids not array"},
      {{{"stop_token_ids", {1.5}}}, "Parameter stop_token_ids not list[int]"},
      {{{"stop", "x"}, {"include_stop_str_in_output", 1}},
       "include_stop_str_in_output must be boolean type."},
      {{{"skip_special_tokens", 0}}, "skip_special_tokens must be boolean type."},
      {{{"ignore_eos", "no"}}, "ignore_eos must be boolean type."},
      {{{"n", 0}}, "Parameter [n] should be in [1, 8192], got 0. "},
      {{{"n", 17}, {"temperature", 1}},
       "The n parameter (17) exceeds 'max_batch_size' (16). Please reduce n or increase "
       "'max_batch_size' in config.json of mindie-service."},
      {{{"n", 5}, {"temperature", 1}},
       "The n parameter (5) exceeds 'maxN' (4). Please reduce n or increase 'maxN' in config.json of "
       "mindie-service."},
      {{{"best_of", 129}}, "Parameter [best_of] should be in [1, 128], got 129."},
      {{{"n", 3}, {"best_of", 2}, {"temperature", 1}},
       "best_of must be greater than or equal to n, but best_of is 2, n is 3."},
      {{{"best_of", 2}, {"stream", true}, {"temperature", 1}},
       "best_of must be equal to n in stream mode, but best_of is 2, n is None."},
      {{{"n", 2}},
       "best_of/n can not greater than 1 without using beam search when temperature is 0 or not set, "
       "but best_of is 2, n is 2."},
      {{{"use_beam_search", true}, {"max_tokens", 129}},
       "Please set the max_tokens to be not larger than 128 when the use_beam_search is on."},
      {{{"use_beam_search", true}, {"max_tokens", 5}, {"temperature", 1}},
       "Parameter temperature must be 0 or unset when use_beam_search is on: beams are chosen by "
       "probability, not drawn"},
      {{{"logit_bias", {{"x", 1}}}},
       "Parameter logit_bias has the key 'x', expected token ids from 0 to 499"},
      {{{"logit_bias", {{"500", 1}}}},
       "Parameter logit_bias has the key '500', expected token ids from 0 to 499"},
      {{{"logit_bias", {{"5", 101}}}}, "Parameter logit_bias.5 must be in [-100.0, 100.0], got 101."},
      {{{"logit_bias", {{"5", "a"}}}}, "logit_bias.5 must be float type."},
      {{{"logit_bias", 1}}, "logit_bias must be object type."},
      {{{"priority", 6}}, "Parameter priority must be in [1,5], got 6."},
      {{{"timeout", 0}},
       "Parameter timeout must be strictly positive and small than 65535 seconds, got 0."},
      {{{"stream", "yes"}}, "stream must be boolean type."},
      {{{"stream_options", true}}, "stream_options must be object type."},
      {{{"stream_options", {{"include_usage", true}}}},
       "Parameter stream_options needs stream to be true"},
      {{{"response_format", "json"}}, "Parameter response_format must be an object"},
      {{{"response_format", {{"a", 1}}}}, "Parameter response_format must contain 'type' field"},
      {{{"response_format", {{"type", 1}}}}, "Parameter response_format.type must be a string"},
      {{{"response_format", {{"type", "xml"}}}},
       "Parameter response_format.type must be 'json_object', 'json_schema' or 'text', got 'xml'"},
      {{{"response_format", {{"type", "json_schema"}}}},
       "Parameter response_format.json_schema is required when type is 'json_schema'"},
      {{{"response_format", {{"type", "json_schema"}, {"json_schema", {{"schema", json::object()}}}}}},
       "Parameter response_format.json_schema.name is required"},
      {{{"response_format", {{"type", "json_schema"}, {"json_schema", {{"name", "x"}}}}}},
       "Parameter response_format.json_schema.schema is required when type is 'json_schema'"},
      {{{"response_format",
         {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", {{"type", "text"}}}}}}}},
       "Invalid json_schema: unsupported type 'text' at '$'"},
      {{{"response_format",
         {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", {{"properties", 1}}}}}}}},
       "Invalid json_schema: 'properties' at '$' must be an object"},
      {{{"guided_regex", ""}}, "Parameter guided_regex must not be empty"},
      {{{"guided_choice", json::array()}}, "Parameter guided_choice must be a non-empty array of strings"},
      {{{"guided_regex", "a"}, {"guided_choice", {"a"}}},
       "Parameters guided_regex and guided_choice ask for two structures at once"},
      {{{"guided_json", "[1]"}}, "Parameter guided_json is not the JSON text of an object"},
      {{{"structured_outputs", {{"json", json::object()}, {"regex", "a"}}}},
       "Parameter structured_outputs asks for more than one structure"},
      {{{"guided_regex", "a"}, {"ignore_eos", true}},
       "ignore_eos cannot be combined with structured output, which decides where the text ends"},
  };
  return cases;
}

TEST(OpenAi, RefusesWrongParametersWithTheTextsOfTheSheet) {
  for (const Case& c : common_cases()) {
    EXPECT_EQ(refusal_of(parse_chat, chat_body(c.patch)), c.error) << c.patch;
    EXPECT_EQ(refusal_of(parse_completion, completion_body(c.patch)), c.error) << c.patch;
  }
}

TEST(OpenAi, RefusesWrongChats) {
  const auto message = [](const json& m) { return json{{"messages", json::array({m})}}; };
  const json tool = {{"type", "function"}, {"function", {{"name", "f"}}}};
  const auto with_tools = [&](json patch) {
    patch["tools"] = json::array({tool});
    return patch;
  };
  const std::vector<Case> cases = {
      {{{"model", "other"}}, "Model not found"},
      {{{"messages", nullptr}}, "Request param contains not messages or messages null"},
      {{{"messages", "Hi"}}, "Request param messages not arr or arr is empty"},
      {{{"messages", json::array()}}, "Request param messages not arr or arr is empty"},
      {message("Hi"), "Request param contains not role or role null"},
      {message({{"content", "Hi"}}), "Request param contains not role or role null"},
      {message({{"role", 1}, {"content", "Hi"}}), "role must be string type."},
      {message({{"role", "user"}}), "Request param contains not content or content null"},
      {message({{"role", "user"}, {"content", 7}}), "The type of inputs is abnormal"},
      {message({{"role", "user"}, {"content", json::array()}}), "Inputs arr is empty"},
      {message({{"role", "user"}, {"content", {"x"}}}), "The type of inputs is abnormal"},
      {message({{"role", "user"}, {"content", json::array({{{"type", "image_url"}}})}}),
       "messages[0].content[0] is of type \"image_url\", but this model takes text only"},
      {message({{"role", "user"}, {"content", ""}}),
       "Messages len not in (0, 41943040, but the length of inputs is 0"},
      {message({{"role", "assistant"}, {"content", ""}}),
       "Request param \"content\" should not be empty"},
      {message({{"role", "assistant"}, {"tool_calls", json::array({{{"type", "function"}}})}}),
       "Tool call param contains no id."},
      {message({{"role", "assistant"},
                {"tool_calls",
                 json::array({{{"id", "c"},
                               {"type", "function"},
                               {"function", {{"name", "f"}, {"arguments", json::object()}}}}})}}),
       "Tool call param function arguments expected to be a string"},
      {message({{"role", "tool"}, {"content", "x"}}),
       "Request param contains not tool_call_id or tool_call_id null while role is tool"},
      {message({{"role", "tool"}, {"content", "x"}, {"tool_call_id", ""}}),
       "Request param tool_call_id len should not be 0 while role is tool"},
      {with_tools(message({{"role", "robot"}, {"content", "x"}})),
       "Request param contains role must be system, assistant, user or tool"},
      {with_tools(message({{"role", "user"}, {"content", ""}})),
       "Request param content len should not be 0"},
      {{{"tools", "x"}}, "Tools not array"},
      {{{"tools", json::array({{{"type", "x"}}})}}, "Tool param not function type"},
      {{{"tools", json::array({{{"type", "function"}}})}},
       "Tool param invalid, tool function not exist"},
      {{{"tools", json::array({{{"type", "function"}, {"function", {{"name", "a b"}}}}})}},
       "The name of function must be a-z, A-Z, 0-9, common chinese characters, underscores and dash "
       "within max length of 64, unexpected function name: a b"},
      {with_tools({{"tool_choice", "maybe"}}),
       "Parameter tool_choice string not in [none, auto, required]"},
      {with_tools({{"tool_choice", 1}}), "Parameter tool_choice not string or object"},
      {{{"logprobs", 1}}, "logprobs must be boolean type."},
      {{{"logprobs", true}, {"top_logprobs", 21}}, "Parameter top logprobs must be in [0, 20], got 21."},
      {{{"logprobs", false}, {"top_logprobs", 2}},
       "Value error, when using top_logprobs, logprobs must be true or null in chat completions"},
      {{{"chat_template_kwargs", 1}}, "chat_template_kwargs must be a JSON object"},
      {{{"chat_template_kwargs", {{"enable_thinking", "x"}}}},
       "enable_thinking must be boolean, got string"},
      {{{"chat_template_kwargs", {{"enable_thinking", true}, {"thinking_budget", 0}}}},
       "Parameter thinking_budget must be in [1,2147483647], got 0"},
      {{{"chat_template", 1}}, "Parameter chat_template not string"},
  };
  for (const Case& c : cases)
    EXPECT_EQ(refusal_of(parse_chat, chat_body(c.patch)), c.error) << c.patch;
}

TEST(OpenAi, RefusesWrongCompletions) {
  const std::vector<Case> cases = {
      {{{"model", "other"}}, "Not found given model, please check modelName in config.file."},
      {{{"prompt", nullptr}}, "Contains not prompt or prompt null"},
      {{{"prompt", ""}}, "Prompt len not in (0, 41943040], but the length of inputs is 0"},
      {{{"prompt", 7}}, "The type of prompt is abnormal,prompt must be str or integer list."},
      {{{"prompt", json::array()}}, "Prompt array cannot be empty."},
      {{{"prompt", {1, "a"}}}, "All elements of the prompt array must be integers."},
      {{{"prompt", {1, 2.5}}}, "All elements of the prompt array must be integers."},
      {{{"prompt", {"a", 1}}}, "The type of prompt is abnormal,prompt must be str or integer list."},
      {{{"prompt", json::array({json::array()})}}, "Prompt array cannot be empty."},
      {{{"prompt", std::vector<std::string>(17, "a")}},
       "The request asks for 17 answers (17 prompts, 1 each), more than maxBatchSize 16"},
      {{{"logprobs", 6}}, "logprobs should be in range [0, 5], got 6."},
      {{{"logprobs", true}}, "logprobs must be unsigned type."},
      {{{"echo", true}, {"logprobs", 1}, {"use_beam_search", true}, {"n", 2}, {"max_tokens", 5}},
       "echo with logprobs cannot be used with beam search"},
      {{{"prompt_logprobs", 1}, {"use_beam_search", true}, {"n", 2}, {"max_tokens", 5}},
       "prompt_logprobs cannot be used with beam search"},
      {{{"suffix", "x"}}, "suffix is not supported by this endpoint"},
  };
  for (const Case& c : cases)
    EXPECT_EQ(refusal_of(parse_completion, completion_body(c.patch)), c.error) << c.patch;
}

TEST(OpenAi, RefusesWhatIsNoJsonObject) {
  const std::string bodies[] = {
      "",
      "{",
      "[]",
      "\"x\"",
      "nonsense",
      "{\"model\":\"demo\",\"prompt\":\"\xff\"}",              // not UTF-8
      "{\"model\":\"demo\",\"prompt\":\"\xc0\x80\"}",          // overlong
      "{\"model\":\"demo\",\"prompt\":\"\\ud800\"}",           // unpaired surrogate
      "{\"model\":\"demo\",\"prompt\":\"\\udc00x\"}",
      std::string("{\"model\":\"de\0mo\"}", 16),               // NUL
      "{\"model\":\"demo\",\"temperature\":1e999}",
      "{\"model\":\"demo\",\"x\":" + std::string(100000, '[') + std::string(100000, ']') + "}",
      "{\"model\":\"demo\",\"x\":[[[[[[[[[[1]]]]]]]]]]}",      // eleven levels
  };
  for (const auto& body : bodies) {
    EXPECT_EQ(refusal_of(parse_chat, body), "Failed to parse request context to json") << body;
    EXPECT_EQ(refusal_of(parse_completion, body), "Failed to parse request context to json") << body;
  }
}

TEST(OpenAi, ReadsAChat) {
  const ChatRequest chat = parse_chat(
      R"({"model":"demo","messages":[{"role":"system","content":"Be brief."},
          {"role":"user","content":[{"type":"text","text":"A"},{"type":"text","text":"B"}]}],
          "tools":[{"type":"function","function":{"name":"f","description":"d","a":1}},
                   {"type":"function","function":{"name":"查询"}}],
          "tool_choice":{"type":"function","function":{"name":"f"}},
          "max_tokens":9,"max_completion_tokens":7,"temperature":1,"top_k":9999,"top_p":0.5,"seed":5,
          "n":2,"stop":["x","yy"],"stop_token_ids":[3,-1,4294967296],"include_stop_str_in_output":true,
          "logprobs":true,"top_logprobs":3,"stream":true,"stream_options":{"include_usage":true},
          "min_tokens":2,"ignore_eos":true,"skip_special_tokens":false,
          "chat_template_kwargs":{"enable_thinking":false},"response_format":{"type":"text"},
          "user":"me","logit_bias":null,"metadata":{}})",
      options());
  EXPECT_EQ(chat.wishes.chat.messages,
            R"([{"role":"system","content":"Be brief."},{"role":"user","content":"AB"}])");
  EXPECT_EQ(chat.wishes.chat.tools,
            R"([{"type":"function","function":{"name":"f","description":"d","a":1}}])");
  EXPECT_EQ(chat.wishes.chat.kwargs, R"({"enable_thinking":false})");
  EXPECT_EQ(chat.ignored, (std::vector<std::string>{"metadata", "user"}));
  const SamplingFields& f = chat.fields;
  EXPECT_EQ(f.sampling.max_tokens, 7);
  EXPECT_EQ(f.sampling.min_tokens, 2);
  EXPECT_EQ(f.sampling.temperature, 1.0f);
  EXPECT_EQ(f.sampling.top_k, 500);  // the vocabulary
  EXPECT_EQ(f.sampling.top_p, 0.5f);
  EXPECT_EQ(f.sampling.seed, 5u);
  EXPECT_EQ(f.sampling.logprobs, 3);
  EXPECT_EQ(f.sampling.stop_token_ids, std::vector<int32_t>{3});
  EXPECT_EQ(f.stops, (std::vector<std::string>{"x", "yy"}));
  EXPECT_EQ(f.sequences, 2);
  EXPECT_TRUE(f.include_stop && f.stream && f.include_usage && f.ignore_eos && !f.skip_special);
}

TEST(OpenAi, FillsInTheModelsDefaults) {
  ServiceOptions with = options();
  const auto sampling = [&](const json& patch) {
    return parse_completion(completion_body(patch), with).fields.sampling;
  };
  EXPECT_EQ(sampling(json::object()).temperature, 0.0f);
  EXPECT_EQ(sampling(json::object()).max_tokens, 512);
  EXPECT_EQ(sampling({{"max_tokens", 100000}}).max_tokens, 512);
  EXPECT_EQ(sampling(json::object()).top_k, -1);
  with.defaults = {.temperature = 0.6f, .top_p = 0.9f, .repetition_penalty = 1.1f, .top_k = 20};
  EXPECT_EQ(sampling(json::object()).temperature, 0.6f);
  EXPECT_EQ(sampling(json::object()).top_p, 0.9f);
  EXPECT_EQ(sampling(json::object()).repetition_penalty, 1.1f);
  EXPECT_EQ(sampling(json::object()).top_k, 20);
  EXPECT_EQ(sampling({{"top_k", 50}}).top_k, 20);  // lowered silently
  EXPECT_EQ(sampling({{"top_k", -1}}).top_k, -1);
  EXPECT_EQ(sampling({{"temperature", 0}}).temperature, 0.0f);
  with.defaults.do_sample = false;
  EXPECT_EQ(sampling(json::object()).temperature, 0.0f);
}

TEST(OpenAi, ReadsPromptsOfEveryForm) {
  const auto prompts = [](const json& prompt) {
    return parse_completion(completion_body({{"prompt", prompt}}), options()).prompts;
  };
  EXPECT_EQ(std::get<std::string>(prompts("a")[0]), "a");
  EXPECT_EQ(std::get<std::vector<int32_t>>(prompts({1, 2})[0]), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(prompts({"a", "b"}).size(), 2u);
  const auto lists = prompts({{1}, {2, 3}});
  EXPECT_EQ(std::get<std::vector<int32_t>>(lists[1]), (std::vector<int32_t>{2, 3}));
  // Out of range: left to the check against the vocabulary.
  EXPECT_EQ(std::get<std::vector<int32_t>>(prompts({-5, 4294967296})[0]),
            (std::vector<int32_t>{-1, -1}));
}

}  // namespace
}  // namespace phalanx::api
