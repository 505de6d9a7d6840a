#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <regex>

#include "phalanx/api/testing.h"

// Every dialect but OpenAI's, byte for byte where the sheet gives the bytes.
namespace phalanx::api {
namespace {

using nlohmann::json;
using testing::fetch;
using testing::Instance;
using testing::post;
using testing::Reply;

// With times replaced.
std::string settled(std::string body) {
  body = std::regex_replace(body, std::regex("_time\":[0-9]+"), "_time\":0");
  return std::regex_replace(body, std::regex("(created_at\":|_cost\":)[0-9]+"), "$010");
}

TEST(Vllm, AnswersWithPromptSpaceAndText) {
  Instance instance;
  EXPECT_EQ(post(instance.port, "/generate", R"({"prompt":"Hello","max_tokens":16})").body,
            R"({"text":["Hello Hello."]})");
  const std::string parts =
      R"({"prompt":[{"type":"text","text":"A"},{"type":"text","text":"B"}],"max_tokens":2})";
  EXPECT_EQ(post(instance.port, "/generate", parts).body, R"({"text":["A He"]})");
  const Reply two =
      post(instance.port, "/generate", R"({"prompt":"x","n":2,"temperature":1,"seed":3,"max_tokens":1})");
  EXPECT_EQ(two.body, R"({"text":["x H","x H"]})");
  EXPECT_EQ(instance.engine.requests.back().sampling.seed, 4u);
}

TEST(Vllm, StreamsChunksThatEndInNul) {
  Instance instance;
  const Reply reply =
      post(instance.port, "/generate", R"({"prompt":"x","stream":true,"max_tokens":2})");
  EXPECT_EQ(reply.body, std::string("{\"text\":[\"H\"]}\0{\"text\":[\"e\"]}\0", 30));
  EXPECT_EQ(post(instance.port, "/generate", R"({"prompt":"x","use_beam_search":true})").body,
            R"({"error":"use_beam_search is not supported by this endpoint","error_type":"Input Validation Error"})");
}

TEST(Generate, NeedsPromptOrInputs) {
  Instance instance;
  for (const char* body : {"{}", "nonsense", "[]"}) {
    const Reply reply = post(instance.port, "/generate", body);
    EXPECT_EQ(reply.status, 422);
    EXPECT_NE(reply.body.find("inputs or prompt is necessary"), std::string::npos) << reply.body;
  }
}

TEST(Tgi, AnswersAsTheSheetShows) {
  Instance instance;
  EXPECT_EQ(post(instance.port, "/generate", R"({"inputs":"Hi","parameters":{"max_new_tokens":3}})").body,
            R"({"generated_text":"Hel"})");
  EXPECT_EQ(post(instance.port, "/", R"({"inputs":"Hi","parameters":{"max_new_tokens":3}})").body,
            R"([{"generated_text":"Hel"}])");
  EXPECT_EQ(post(instance.port, "/generate",
                 R"({"inputs":"Hi","parameters":{"max_new_tokens":1,"seed":7,"details":true,)"
                 R"("decoder_input_details":true,"return_full_text":true}})")
                .body,
            R"({"details":{"prompt_tokens":2,"finish_reason":"length","generated_tokens":1,"seed":7,)"
            R"("prefill":[{"id":72,"logprob":null,"special":null,"text":null},)"
            R"({"id":105,"logprob":null,"special":null,"text":null}],)"
            R"("tokens":[{"id":72,"logprob":null,"special":null,"text":null}]},)"
            R"("generated_text":"Hi H"})");
  // Twenty tokens without max_new_tokens; the end token and a stop string are both eos_token.
  const json stopped = json::parse(
      post(instance.port, "/generate", R"({"inputs":"Hi","parameters":{"stop":"lo","details":true}})").body);
  EXPECT_EQ(stopped["generated_text"], "Hel");
  EXPECT_EQ(stopped["details"]["finish_reason"], "eos_token");
  EXPECT_EQ(instance.engine.requests.back().sampling.max_tokens, 20);
}

TEST(Tgi, StreamsEventsWithIdArrays) {
  Instance instance;
  const Reply reply = post(instance.port, "/generate_stream",
                           R"({"inputs":"Hi","parameters":{"max_new_tokens":2,"seed":7,"details":true}})");
  EXPECT_EQ(reply.body,
            R"(data: {"token":{"id":[72],"text":"H","logprob":null,"special":null},)"
            R"("generated_text":null,"details":null})" "\n\n"
            R"(data: {"token":{"id":[101],"text":"e","logprob":null,"special":null},)"
            R"("generated_text":"He","details":{"prompt_tokens":2,"finish_reason":"length",)"
            R"("generated_tokens":2,"seed":7}})" "\n\n");
  EXPECT_TRUE(reply.has("Content-Type: text/event-stream"));
  const Reply root = post(instance.port, "/", R"({"inputs":"Hi","stream":true,"parameters":{"max_new_tokens":1}})");
  EXPECT_EQ(root.body.substr(0, 5), "data:");
}

TEST(Tgi, TruncatesFromTheLeftAndDescribesTheModel) {
  Instance instance;
  (void)post(instance.port, "/generate", R"({"inputs":"abcdef","parameters":{"truncate":2}})");
  EXPECT_EQ(instance.engine.requests.back().prompt, (std::vector<int32_t>{'e', 'f'}));
  const json info = json::parse(fetch(instance.port, "/info").body);
  EXPECT_EQ(info["models"][0]["model_id"], "demo");
  EXPECT_EQ(info["max_input_length"], 2048);
}

TEST(Native, TakesTextOrIds) {
  Instance instance;
  EXPECT_EQ(post(instance.port, "/infer",
                 R"({"inputs":"Hi","parameters":{"max_new_tokens":2,"details":true,"seed":9}})")
                .body,
            R"({"generated_text":"He","details":{"finish_reason":"length","generated_tokens":2,)"
            R"("generated_token_ids":[72,101],"seed":9}})");
  EXPECT_EQ(post(instance.port, "/infer_token", R"({"input_id":[1,2],"parameters":{"max_new_tokens":1}})").body,
            R"({"generated_text":"H"})");
  EXPECT_EQ(instance.engine.requests.back().prompt, (std::vector<int32_t>{1, 2}));
  (void)post(instance.port, "/infer", R"({"inputs":"Hi","parameters":{"priority":2,"timeout":30}})");
  EXPECT_EQ(instance.engine.requests.back().priority, 2);
}

TEST(Native, StreamsTimes) {
  Instance instance;
  EXPECT_EQ(settled(post(instance.port, "/infer",
                         R"({"inputs":"Hi","stream":true,"parameters":{"max_new_tokens":2}})")
                        .body),
            R"(data: {"prefill_time":0,"decode_time":null,"token":{"id":[72],"text":"H"}})" "\n\n"
            R"(data: {"prefill_time":null,"decode_time":0,"generated_text":"He","details":null,)"
            R"("token":{"id":[101],"text":null}})" "\n\n");
}

TEST(Triton, AnswersTextAndTokens) {
  Instance instance;
  const std::string at = "/v2/models/demo/";
  EXPECT_EQ(post(instance.port, at + "generate",
                 R"({"id":"r1","text_input":"Hi","parameters":{"max_new_tokens":3}})")
                .body,
            R"({"id":"r1","model_name":"demo","model_version":null,"text_output":"Hel"})");
  const json details = json::parse(post(instance.port, at + "generate",
                                        R"({"text_input":"Hi","parameters":{"max_new_tokens":3,"details":true}})")
                                       .body)["details"];
  EXPECT_EQ(details["finish_reason"], "length");
  EXPECT_EQ(details["generated_tokens"], 3);
  EXPECT_EQ(details["batch_size"].size(), 3u);
  EXPECT_EQ(post(instance.port, at + "infer",
                 R"({"id":"r2","inputs":[{"name":"input0","shape":[1,3],"datatype":"UINT32",)"
                 R"("data":[1,2,3],"parameters":{"max_new_tokens":4}}],"outputs":[{"name":"output0"}]})")
                .body,
            R"({"id":"r2","model_name":"demo","outputs":[{"name":"output0","shape":[1,4],)"
            R"("datatype":"UINT32","data":[72,101,108,108]}]})");
  const Reply stream = post(instance.port, at + "generate_stream",
                            R"({"id":"r1","text_input":"Hi","parameters":{"max_new_tokens":1}})");
  EXPECT_EQ(stream.body,
            R"(data:{"id":"r1","model_name":"demo","model_version":null,"text_output":"H"})" "\n\n");
}

TEST(Triton, DescribesTheModelAndRefusesOthers) {
  Instance instance;
  EXPECT_EQ(fetch(instance.port, "/v2/models/demo").body,
            R"({"name":"demo","platform":"MindIE Server","inputs":[{"name":"input0","shape":[-1],)"
            R"("datatype":"UINT32"}],"outputs":[{"name":"output0","shape":[-1],"datatype":"UINT32"}]})");
  EXPECT_EQ(fetch(instance.port, "/v2").body,
            R"({"name":"MindIE Server","version":"1.0.0","extensions":{"max_iter_times":512,)"
            R"("prefill_policy_type":0,"decode_policy_type":0,"max_prefill_batch_size":50,)"
            R"("max_prefill_tokens":8192}})");
  EXPECT_EQ(json::parse(fetch(instance.port, "/v2/models/demo/config").body)["max_seq_len"], 2560);
  const Reply other = post(instance.port, "/v2/models/other/generate", R"({"text_input":"Hi"})");
  EXPECT_EQ(other.status, 404);
  EXPECT_EQ(other.body, R"({"error":"Model other not found.","error_type":"NotFoundError"})");
  EXPECT_EQ(post(instance.port, "/v2/models/demo/dance", "{}").status, 404);
}

TEST(Triton, StopsARequestByItsId) {
  Instance instance;
  instance.engine.script = std::string(100000, 'x');
  testing::Client client(instance.port);
  client.send(testing::post_text("/v2/models/demo/generate_stream",
                                 R"({"id":"long","text_input":"Hi","parameters":{"max_new_tokens":500,"details":true}})"));
  (void)client.read_until("\"text_output\":\"x\"");
  const Reply stop = post(instance.port, "/v2/models/demo/stopInfer", R"({"id":"long"})");
  EXPECT_EQ(stop.status, 200);
  EXPECT_EQ(stop.body, R"({"id":"long"})");
  EXPECT_NE(client.read_until("0\r\n\r\n").find("\"finish_reason\":\"stop_sequence\""), std::string::npos);
  EXPECT_TRUE(instance.engine.wait_running(0));
  const Reply unknown = post(instance.port, "/v2/models/demo/stopInfer", R"({"id":"gone"})");
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(unknown.body, R"({"error":"RequestId is gone not found.","error_type":"NotFoundError"})");
}

TEST(Tokenizer, CountsAndTurnsBothWays) {
  Instance instance;
  EXPECT_EQ(post(instance.port, "/v1/tokenizer", R"({"inputs":"Hi","do_decode":true})").body,
            R"({"token_number":2,"tokens":["H","i"]})");
  EXPECT_EQ(post(instance.port, "/v1/tokenizer", R"({"inputs":""})").body,
            R"({"error":"Inputs data length in [0, 41943040], but the length of inputs is 0",)"
            R"("error_type":"Input Validation Error"})");
  EXPECT_EQ(json::parse(post(instance.port, "/v1/tokenizer", "{").body)["error"],
            "Req body converts to json fail.");
  EXPECT_EQ(json::parse(post(instance.port, "/tokenize", R"({"prompt":"Hi"})").body)["tokens"], json({72, 105}));
  const json chat = json::parse(
      post(instance.port, "/tokenize", R"({"messages":[{"role":"user","content":"Hi"}]})").body);
  EXPECT_EQ(chat["count"], 32);
  EXPECT_EQ(post(instance.port, "/detokenize", R"({"tokens":[72,105]})").body, R"({"prompt":"Hi"})");
}

// What each dialect says to the same kinds of mistakes.
TEST(Dialects, RefuseInTheirOwnShape) {
  Instance instance;
  struct Case {
    const char *path, *body, *part;
    int status = 422;
  };
  const std::string bad_text = "{\"inputs\":\"\\ud800\"}";
  const Case cases[] = {
      {"/infer", R"({"inputs":"a","input_id":[1]})", "Input conflict."},
      {"/infer", "{}", "Not found inputs."},
      {"/infer", R"({"input_id":[1048577]})", "must be in [0, 1048576], got 1048577."},
      {"/infer", R"({"input_id":[299,300]})", "Invalid Input Ids", 424},
      {"/infer", R"({"inputs":"a","parameters":{"top_p":1}})", "Parameter top_p must be in (0.0,1.0), got 1."},
      {"/infer", R"({"inputs":"a","parameters":{"max_new_tokens":0}})",
       "Parameter max_new_tokens must be in (0,2147483647], got 0."},
      {"/infer", R"({"inputs":"a","parameters":{"priority":6}})", "Parameter priority must be in [1,5], got 6."},
      {"/infer", R"({"inputs":"a","parameters":[]})", "parameters must be object type."},
      {"/infer", R"({"inputs":"a","parameters":{"temperature":1e999}})", "Failed to parse request context to json"},
      {"/generate_stream", R"({"inputs":"a","parameters":{"decoder_input_details":true}})",
       "The decoder_input_details must not be true when stream is true."},
      {"/generate_stream", R"({"inputs":7})", "inputs must be string or array type."},
      {"/generate_stream", bad_text.c_str(), "Failed to parse request context to json"},
      {"/", R"({"inputs":"a","stream":1})", "Stream must be boolean type."},
      {"/generate", R"({"inputs":"a","parameters":{"adapter_id":"a b"}})", "The format of adapter_id is invalid."},
      {"/generate", R"({"inputs":"a","parameters":{"temperature":0}})", "Parameter temperature must be in (0.0,"},
      {"/v2/models/demo/generate", R"({"id":"a b","text_input":"x"})", "id must match"},
      {"/v2/models/demo/infer", R"({"inputs":[]})", "Inputs count must be 1."},
      {"/v2/models/demo/infer",
       R"({"inputs":[{"name":"a","shape":[2],"datatype":"UINT32","data":[1]}]})", "Data size should be 2, got 1."},
      {"/v2/models/demo/infer",
       R"({"inputs":[{"name":"a","shape":[1],"datatype":"FP32","data":[1]}]})", "Unsupported datatype, got FP32."},
      {"/v2/models/demo/infer",
       R"({"inputs":[{"name":"a","shape":[1],"datatype":"UINT32","data":[1]}],"outputs":[]})",
       "Outputs size should be 1, got 0."},
      {"/v1/messages", R"({"model":"demo","messages":[{"role":"user","content":"x"}]})",
       R"({"type":"error","error":{"type":"invalid_request_error","message":"max_tokens: field required"}})"},
      {"/v1/messages", "{", R"("type":"invalid_request_error")"},
      {"/v1/responses", R"({"model":"demo"})",
       R"({"error":{"message":"input: field required","type":"invalid_request_error","param":null,"code":null}})"},
      {"/v1/responses", R"({"model":"demo","input":"x","previous_response_id":"r"})", "stores no responses"},
      {"/v1/responses", R"({"model":"demo","input":"x","text":"y"})", "text: expected an object"},
      {"/v1/embeddings", R"({"model":"demo","input":"x"})", "not an embedding model", 400},
      {"/v1/chat/completions",
       R"({"model":"demo","messages":[{"role":"user","content":"x"}],"guided_regex":"impossible"})",
       "the grammar is impossible"},
      {"/v1/chat/completions",
       R"({"model":"demo","messages":[{"role":"user","content":"x"}],"tool_choice":"required"})",
       "Parameter tool_choice is required, but tools is absent or empty"},
  };
  for (const Case& c : cases) {
    const Reply reply = post(instance.port, c.path, c.body);
    EXPECT_EQ(reply.status, c.status) << c.path << c.body << reply.body;
    EXPECT_TRUE(json::accept(reply.body)) << reply.body;
    EXPECT_NE(reply.body.find(c.part), std::string::npos) << c.path << " " << c.body << "\n" << reply.body;
  }
}

// The schema that counts, where the request holds another one that does not.
TEST(Structure, OfTextFormatIsNotTheSchemaBesideIt) {
  Instance instance;
  const auto status = [&](const char* counts, const char* beside) {
    const json body{{"model", "demo"},
                    {"prompt", "x"},
                    {"guided_json", {{"title", counts}}},
                    {"response_format",
                     {{"type", "text"}, {"json_schema", {{"name", "a"}, {"schema", {{"title", beside}}}}}}}};
    return post(instance.port, "/v1/completions", body.dump()).status;
  };
  EXPECT_EQ(status("mine", "impossible"), 200);
  EXPECT_EQ(status("impossible", "mine"), 422);
}

TEST(Structure, InTextIsBoundedInDepth) {
  Instance instance;
  std::string schema;
  for (int i = 0; i < 20'000; ++i) schema += R"({"items":)";
  schema += "{}" + std::string(20'000, '}');
  for (const char* path : {"/v1/completions", "/generate"}) {
    const Reply reply = post(instance.port, path,
                             json{{"model", "demo"}, {"prompt", "x"}, {"guided_json", schema}}.dump());
    EXPECT_EQ(reply.status, 422) << reply.body;
    EXPECT_NE(reply.body.find("nested deeper than 100 levels"), std::string::npos) << reply.body;
  }
}

TEST(Messages, AnswersAsAnthropic) {
  Instance instance;
  const Reply reply = post(instance.port, "/v1/messages",
                           R"({"model":"demo","max_tokens":3,"system":"S","messages":[{"role":"user","content":)"
                           R"([{"type":"text","text":"Hi"}]}]})");
  const json body = json::parse(reply.body);
  EXPECT_EQ(body["type"], "message");
  EXPECT_EQ(body["content"], json::parse(R"([{"type":"text","text":"Hel"}])"));
  EXPECT_EQ(body["stop_reason"], "max_tokens");
  EXPECT_EQ(body["usage"]["output_tokens"], 3);
  const Reply stream = post(instance.port, "/v1/messages",
                            R"({"model":"demo","max_tokens":1,"stream":true,"messages":[{"role":"user","content":"Hi"}]})");
  EXPECT_EQ(std::regex_replace(stream.body, std::regex("data: [^\n]*\n"), ""),
            "event: message_start\n\nevent: content_block_start\n\nevent: content_block_delta\n\n"
            "event: content_block_stop\n\nevent: message_delta\n\nevent: message_stop\n\n");
  const json counted = json::parse(post(instance.port, "/v1/messages/count_tokens",
                                        R"({"model":"demo","messages":[{"role":"user","content":"Hi"}]})")
                                       .body);
  EXPECT_EQ(counted["input_tokens"], 32);
}

TEST(Messages, UsesTools) {
  Instance instance;
  instance.engine.script = R"([{"name": "f", "parameters": {"a": 1}}])";
  const std::string request =
      R"({"model":"demo","max_tokens":200,"messages":[{"role":"user","content":"Hi"}],)"
      R"("tools":[{"name":"f","input_schema":{"type":"object"}}],"tool_choice":{"type":"any"})";
  const json body = json::parse(post(instance.port, "/v1/messages", request + "}").body);
  ASSERT_EQ(body["content"].size(), 1u) << body;
  EXPECT_EQ(body["content"][0]["type"], "tool_use");
  EXPECT_EQ(body["content"][0]["input"], json({{"a", 1}}));
  EXPECT_EQ(body["stop_reason"], "tool_use");
  const Reply stream = post(instance.port, "/v1/messages", request + R"(,"stream":true})");
  EXPECT_NE(stream.body.find(R"("partial_json":"{\"a\":1}")"), std::string::npos) << stream.body;
}

TEST(Responses, AnswersAsOpenAi) {
  Instance instance;
  const json body = json::parse(
      post(instance.port, "/v1/responses", R"({"model":"demo","input":"Hi","max_output_tokens":3})").body);
  EXPECT_EQ(body["object"], "response");
  EXPECT_EQ(body["status"], "incomplete");
  EXPECT_EQ(body["output"][0]["content"][0]["text"], "Hel");
  EXPECT_EQ(body["usage"]["output_tokens"], 3);
  const Reply stream =
      post(instance.port, "/v1/responses", R"({"model":"demo","input":"Hi","stream":true})");
  std::string events;
  const std::regex line("event: ([^\n]*)");
  for (std::sregex_iterator it(stream.body.begin(), stream.body.end(), line), end; it != end; ++it)
    if (!events.ends_with((*it)[1].str() + " ")) events += (*it)[1].str() + " ";
  EXPECT_EQ(events,
            "response.created response.in_progress response.output_item.added response.content_part.added "
            "response.output_text.delta response.output_text.done response.content_part.done "
            "response.output_item.done response.completed ");
}

constexpr const char* kToolRequest =
    R"({"model":"demo","messages":[{"role":"user","content":"Hi"}],"max_tokens":400,)"
    R"("tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}])";

TEST(Chat, FindsCallsStreamingAndNot) {
  ServiceOptions options = Instance::default_options();
  options.model_type = "qwen3";
  Instance instance(options);
  instance.engine.script =
      "Let me see. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n"
      "<tool_call>{\"name\": \"g\"}</tool_call>";
  const std::string request = kToolRequest;
  const json choice = json::parse(post(instance.port, "/v1/chat/completions", request + "}").body)["choices"][0];
  EXPECT_EQ(choice["message"]["content"], "Let me see.");
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  ASSERT_EQ(choice["message"]["tool_calls"].size(), 2u) << choice;
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["arguments"], R"({"a":1})");
  EXPECT_TRUE(std::regex_match(choice["message"]["tool_calls"][1]["id"].get<std::string>(),
                               std::regex("call_[0-9A-Za-z]{8}")));
  const Reply stream = post(instance.port, "/v1/chat/completions", request + R"(,"stream":true})");
  EXPECT_NE(stream.body.find(R"("tool_calls":[{"index":0,"id":"call_)"), std::string::npos);
  EXPECT_NE(stream.body.find(R"("tool_calls":[{"index":1,"function":{"arguments":"{}"}}])"), std::string::npos)
      << stream.body;
  EXPECT_NE(stream.body.find(R"("finish_reason":"tool_calls")"), std::string::npos);
  const json one = json::parse(
      post(instance.port, "/v1/chat/completions", request + R"(,"parallel_tool_calls":false})").body);
  EXPECT_EQ(one["choices"][0]["message"]["tool_calls"].size(), 1u);
}

TEST(Chat, AForcedCallIsGuided) {
  Instance instance;
  instance.engine.script = R"([{"name": "f", "parameters": {"a": 1}}])";
  const std::string request = kToolRequest;
  const json body = json::parse(
      post(instance.port, "/v1/chat/completions", request + R"(,"tool_choice":"required"})").body);
  EXPECT_EQ(body["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "f") << body;
  ASSERT_NE(instance.engine.requests.back().sampling.guide, nullptr);
}

TEST(Chat, SplitsReasoningAndCountsIt) {
  ServiceOptions options = Instance::default_options();
  options.model_type = "qwen3";
  options.enable_reasoning = true;
  Instance instance(options);
  instance.engine.script = "<think>\nHm.\n</think>\n\nYes.";
  const std::string request = R"({"model":"demo","messages":[{"role":"user","content":"Hi"}],"max_tokens":400)";
  const json body = json::parse(post(instance.port, "/v1/chat/completions", request + "}").body);
  EXPECT_EQ(body["choices"][0]["message"]["reasoning_content"], "Hm.") << body;
  EXPECT_EQ(body["choices"][0]["message"]["content"], "Yes.");
  EXPECT_EQ(body["usage"]["completion_tokens_details"]["reasoning_tokens"], 12);
  const Reply stream = post(instance.port, "/v1/chat/completions", request + R"(,"stream":true})");
  EXPECT_NE(stream.body.find(R"("reasoning_content":"H")"), std::string::npos) << stream.body;
  EXPECT_EQ(stream.body.find("think"), std::string::npos);
  // Switched off by the request.
  instance.engine.script = "Yes.";
  const json off = json::parse(post(instance.port, "/v1/chat/completions",
                                    request + R"(,"chat_template_kwargs":{"enable_thinking":false}})")
                                   .body);
  EXPECT_EQ(off["choices"][0]["message"]["content"], "Yes.");
  EXPECT_FALSE(off["choices"][0]["message"].contains("reasoning_content"));
}

TEST(Completions, SearchesBeams) {
  Instance instance;
  const json body = json::parse(post(instance.port, "/v1/completions",
                                     R"({"model":"demo","prompt":"Hi","use_beam_search":true,"n":2,"best_of":3,)"
                                     R"("max_tokens":3,"logprobs":1})")
                                    .body);
  ASSERT_EQ(body["choices"].size(), 2u) << body;
  // The script engine gives the same first choice after every prompt: H, worth -0.5.
  EXPECT_EQ(body["choices"][0]["text"], "HHH");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(body["choices"][0]["logprobs"]["token_logprobs"], json({-0.5, -0.5, -0.5}));
  EXPECT_NE(body["choices"][1]["text"], "HHH");
  EXPECT_TRUE(instance.engine.wait_running(0));
}

TEST(OpenApi, DocumentsEveryInferenceRoute) {
  Instance instance;
  const json document = json::parse(fetch(instance.port, "/openapi.json").body);
  EXPECT_EQ(document["openapi"], "3.1.0");
  for (const char* path : {"/v1/chat/completions", "/v1/completions", "/generate", "/infer", "/v1/messages",
                           "/v2/models/{model}/infer", "/v1/responses", "/tokenize"})
    EXPECT_TRUE(document["paths"].contains(path)) << path;
  const json& chat = document["components"]["schemas"]["Chat"];
  EXPECT_EQ(chat["required"], json({"model", "messages"}));
  EXPECT_EQ(chat["properties"]["top_logprobs"]["maximum"], 20);
  EXPECT_EQ(chat["properties"]["messages"]["items"]["properties"]["content"]["oneOf"][0]["type"], "string");
  EXPECT_EQ(document["components"]["schemas"]["Detokenize"]["required"], json::array({"tokens"}));
}

}  // namespace
}  // namespace phalanx::api
