#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <regex>

#include "phalanx/api/testing.h"

namespace phalanx::api {
namespace {

using nlohmann::json;
using testing::Client;
using testing::fetch;
using testing::Instance;
using testing::kEos;
using testing::parse_reply;
using testing::post;
using testing::post_text;
using testing::Reply;

constexpr const char* kChat = "/v1/chat/completions";
constexpr const char* kCompletions = "/v1/completions";

std::string chat(const json& patch = json::object()) {
  json body = {{"model", "demo"}, {"messages", json::array({{{"role", "user"}, {"content", "Hi"}}})}};
  body.merge_patch(patch);
  return body.dump();
}
std::string completion(const json& patch = json::object()) {
  json body = {{"model", "demo"}, {"prompt", "Hi"}};
  body.merge_patch(patch);
  return body.dump();
}

// With the numbers that change replaced.
std::string settled(std::string body) {
  return std::regex_replace(body, std::regex("\"created\":[0-9]+"), "\"created\":0");
}

TEST(Service, AnswersAChat) {
  Instance instance;
  const Reply reply = post(instance.port, kChat, chat({{"frobnicate", 1}}));
  EXPECT_EQ(reply.status, 200);
  EXPECT_TRUE(reply.has("X-Phalanx-Ignored: frobnicate\r\n"));
  // The prompt is [{"role":"user","content":"Hi"}]: 32 bytes, each a token.
  EXPECT_EQ(settled(reply.body),
            R"({"id":"endpoint_common_0","object":"chat.completion","created":0,"model":"demo",)"
            R"("choices":[{"index":0,"message":{"role":"assistant","content":"Hello.","tool_calls":[]},)"
            R"("logprobs":null,"finish_reason":"stop"}],)"
            R"("usage":{"prompt_tokens":32,"completion_tokens":7,"total_tokens":39}})");
  const Reply named = post(instance.port, kChat, chat(), "req-id: mine\r\n");
  EXPECT_EQ(json::parse(named.body)["id"], "mine");
}

TEST(Service, StreamsAChatByteForByte) {
  Instance instance;
  instance.engine.script = "a\xC3\xA4";
  const Reply reply = post(instance.port, kChat, chat({{"stream", true}, {"max_tokens", 4}}));
  EXPECT_TRUE(reply.has("Content-Type: text/event-stream\r\n"));
  const std::string head = R"(data: {"id":"endpoint_common_0","object":"chat.completion.chunk",)"
                           R"("created":0,"model":"demo","choices":[{"index":0,"delta":{"role":)";
  EXPECT_EQ(settled(reply.body),
            head + R"("assistant","content":""},"logprobs":null,"finish_reason":null}]})" "\n\n" +
                head + R"("assistant","content":"a"},"logprobs":null,"finish_reason":null}]})" "\n\n" +
                head + "\"assistant\",\"content\":\"\xC3\xA4\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n" +
                head +
                R"("assistant","content":""},"logprobs":null,"finish_reason":"stop"}],)"
                R"("usage":{"prompt_tokens":32,"completion_tokens":4,"total_tokens":36}})" "\n\n" +
                "data: [DONE]\n\n");
}

TEST(Service, AddsTheUsageChunkWhenAsked) {
  Instance instance;
  const Reply reply = post(
      instance.port, kCompletions,
      completion({{"stream", true}, {"max_tokens", 1}, {"stream_options", {{"include_usage", true}}}}));
  const std::string head =
      R"(data: {"id":"endpoint_common_0","object":"text_completion","created":0,"model":"demo",)";
  const std::string usage =
      R"("usage":{"prompt_tokens":2,"completion_tokens":1,"total_tokens":3}})" "\n\n";
  EXPECT_EQ(settled(reply.body),
            head +
                R"("choices":[{"index":0,"text":"H","logprobs":null,"stop_reason":null,)"
                R"("finish_reason":"length"}],)" +
                usage + head + R"("choices":[],)" + usage + "data: [DONE]\n\n");
}

TEST(Service, CompletesTextAndTokenPrompts) {
  Instance instance;
  const Reply reply = post(instance.port, kCompletions, completion({{"max_tokens", 3}}));
  EXPECT_EQ(settled(reply.body),
            R"({"id":"endpoint_common_0","object":"text_completion","created":0,"model":"demo",)"
            R"("choices":[{"index":0,"text":"Hel","logprobs":null,"stop_reason":null,)"
            R"("finish_reason":"length"}],)"
            R"("usage":{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5}})");
  const Reply ids = post(instance.port, kCompletions,
                         completion({{"prompt", {{72, 105}, {33}}}, {"echo", true}, {"max_tokens", 1}}));
  const json choices = json::parse(ids.body)["choices"];
  ASSERT_EQ(choices.size(), 2u);
  EXPECT_EQ(choices[0]["text"], "HiH");
  EXPECT_EQ(choices[1]["text"], "!H");
  EXPECT_EQ(choices[1]["index"], 1);
  EXPECT_EQ(json::parse(ids.body)["usage"]["prompt_tokens"], 3);
}

TEST(Service, StopsAtStringsAndIds) {
  Instance instance;
  instance.engine.script = "one two three";
  json choice = json::parse(post(instance.port, kCompletions, completion({{"stop", {"wo t", "zz"}}})).body)
      ["choices"][0];
  EXPECT_EQ(choice["text"], "one t");
  EXPECT_EQ(choice["stop_reason"], "wo t");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(instance.engine.wait_running(0));
  choice = json::parse(post(instance.port, kCompletions,
                            completion({{"stop", "wo"}, {"include_stop_str_in_output", true}}))
                           .body)["choices"][0];
  EXPECT_EQ(choice["text"], "one two");
  choice = json::parse(
      post(instance.port, kCompletions, completion({{"stop_token_ids", {' '}}})).body)["choices"][0];
  EXPECT_EQ(choice["text"], "one");
  EXPECT_EQ(choice["stop_reason"], ' ');
  choice = json::parse(post(instance.port, kCompletions,
                            completion({{"ignore_eos", true}, {"max_tokens", 15}}))
                           .body)["choices"][0];
  EXPECT_EQ(choice["text"], "one two three..");
  EXPECT_EQ(choice["finish_reason"], "length");
  // A stop string in a stream: what may begin one is held back.
  const Reply stream =
      post(instance.port, kCompletions, completion({{"stop", "e t"}, {"stream", true}}));
  EXPECT_EQ(stream.body.find("\"e\""), std::string::npos) << stream.body;
  EXPECT_NE(stream.body.find("\"stop_reason\":\"e t\""), std::string::npos);
}

TEST(Service, GivesLogprobsInBothDialects) {
  Instance instance;
  instance.engine.script = "ab";
  const json chat_choice = json::parse(
      post(instance.port, kChat, chat({{"logprobs", true}, {"top_logprobs", 2}, {"max_tokens", 1}}))
          .body)["choices"][0];
  EXPECT_EQ(chat_choice["logprobs"],
            json::parse(R"({"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[
                {"token":"a","logprob":-0.5,"bytes":[97]},{"token":"b","logprob":-1.0,"bytes":[98]}]}]})"));
  const json text_choice =
      json::parse(post(instance.port, kCompletions, completion({{"logprobs", 2}, {"max_tokens", 2}}))
                      .body)["choices"][0];
  EXPECT_EQ(text_choice["logprobs"], json::parse(R"({"text_offset":[0,1],"token_logprobs":[-0.5,-0.5],
      "tokens":["a","b"],"top_logprobs":[{"a":-0.5,"b":-1.0},{"b":-0.5}]})"));
}

TEST(Service, GivesSeveralSequencesWithTheirOwnSeeds) {
  Instance instance;
  const json body = json::parse(
      post(instance.port, kChat, chat({{"n", 3}, {"temperature", 1}, {"seed", 40}})).body);
  EXPECT_EQ(body["choices"].size(), 3u);
  EXPECT_EQ(body["choices"][2]["index"], 2);
  EXPECT_EQ(body["usage"]["prompt_tokens"], 32);
  EXPECT_EQ(body["usage"]["completion_tokens"], 21);
  ASSERT_EQ(instance.engine.requests.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(instance.engine.requests[i].sampling.seed, 40 + i);
    EXPECT_EQ(instance.engine.requests[i].sampling.stop_token_ids, std::vector<int32_t>{kEos});
  }
  const Reply stream =
      post(instance.port, kChat, chat({{"n", 2}, {"temperature", 1}, {"stream", true}}));
  EXPECT_NE(stream.body.find("\"index\":1"), std::string::npos);
  EXPECT_TRUE(stream.body.ends_with("data: [DONE]\n\n"));
}

void expect_refused(const Reply& reply, int status, const std::string& type, const std::string& error) {
  EXPECT_EQ(reply.status, status);
  EXPECT_EQ(reply.body, json({{"error", error}, {"error_type", type}}).dump());
}

TEST(Service, RefusesPromptsThatDoNotFit) {
  ServiceOptions options = Instance::default_options();
  options.max_input_tokens = 100;
  options.max_sequence = 60;
  options.max_position_embeddings = 200;
  Instance instance(options);
  const auto prompt = [&](size_t length) {
    return post(instance.port, kCompletions, completion({{"prompt", std::string(length, 'x')}}));
  };
  const std::string text =
      "Failed to enqueue inferRequest. This model's maximum input ids length cannot be greater than ";
  expect_refused(prompt(201), 424, "Generation Error",
                 text + "maxPositionEmbeddings 200,the input ids length is 201");
  expect_refused(prompt(101), 424, "Generation Error", text + "100,the input ids length is 101");
  expect_refused(prompt(61), 424, "Generation Error", text + "maxSeqLen 60,the input ids length is 61");
  expect_refused(post(instance.port, kCompletions, completion({{"prompt", {1, 300}}})), 424,
                 "Generation Error", "Failed to enqueue inferRequest. Invalid Input Ids");
  expect_refused(post(instance.port, kCompletions, completion({{"prompt", {-1}}})), 424,
                 "Generation Error", "Failed to enqueue inferRequest. Invalid Input Ids");
}

TEST(Service, TruncatesWhereConfigured) {
  for (const int side : {-1, 1}) {
    ServiceOptions options = Instance::default_options();
    options.max_input_tokens = 2;
    options.truncation = side;
    Instance instance(options);
    EXPECT_EQ(post(instance.port, kCompletions, completion({{"prompt", {1, 2, 3}}})).status, 200);
    EXPECT_EQ(instance.engine.requests[0].prompt,
              side < 0 ? (std::vector<int32_t>{1, 2}) : (std::vector<int32_t>{2, 3}));
  }
}

TEST(Service, SaysWhyTheEngineDidNotTakeARequest) {
  Instance instance;
  instance.engine.detail = "2000 wait.";
  instance.engine.result = engine::SubmitResult::kQueueFull;
  const Reply full = post(instance.port, kChat, chat());
  expect_refused(full, 503, "Service Unavailable",
                 "The request queue is full, try again later. 2000 wait.");
  EXPECT_TRUE(full.has("Retry-After: 1\r\n"));
  instance.engine.result = engine::SubmitResult::kStopped;
  instance.engine.detail = "";
  expect_refused(
      post(instance.port, kChat, chat({{"stream", true}})), 500, "Incomplete Generation",
      "Failed to enqueue inferRequest. Engine has been stopped. Cannot add request.");
  instance.engine.result = engine::SubmitResult::kPromptTooLong;
  instance.engine.detail = "The KV cache holds 128.";
  expect_refused(
      post(instance.port, kChat, chat()), 424, "Generation Error",
      "Failed to enqueue inferRequest. The KV cache holds 128.");
  EXPECT_EQ(instance.core->generate.active(), 0);
}

TEST(Service, TellsAFailureOfTheEngine) {
  Instance instance;
  instance.engine.hold = true;
  const Error lost(Code::kUnavailable, "node 127.0.0.2: rank 1 died");
  Client whole(instance.port);
  whole.send(post_text(kChat, chat()));
  ASSERT_TRUE(instance.engine.wait_running(1));
  instance.engine.fail(lost);
  expect_refused(parse_reply(whole.read_all()), 500, "Incomplete Generation",
                 "Failed to get engine response. node 127.0.0.2: rank 1 died");

  instance.engine.hold = false;
  instance.engine.step = std::chrono::milliseconds(1);
  Client stream(instance.port);
  stream.send(post_text(kCompletions, completion({{"stream", true}, {"ignore_eos", true}})));
  stream.read_until("\"text\":\"H\"");
  instance.engine.fail(lost);
  const std::string rest = stream.read_until("0\r\n\r\n");
  EXPECT_NE(rest.find("data: {\"error\":\"Failed to get engine response. node 127.0.0.2: rank 1 died\","
                      "\"error_type\":\"Incomplete Generation\"}\n\n\r\n0\r\n\r\n"),
            std::string::npos)
      << rest;
  EXPECT_EQ(rest.find("[DONE]"), std::string::npos);
}

TEST(Service, ToldToStopItAsksToComeAgain) {
  Instance instance;
  instance.engine.hold = true;
  Client whole(instance.port);
  whole.send(post_text(kChat, chat()));
  ASSERT_TRUE(instance.engine.wait_running(1));
  instance.engine.fail(Error(Code::kCancelled, "the service is stopping: SIGTERM"));
  const auto reply = parse_reply(whole.read_all());
  expect_refused(reply, 503, "Service Unavailable",
                 "Failed to get engine response. the service is stopping: SIGTERM");
  EXPECT_TRUE(reply.has("Retry-After: 5")) << reply.head;
}

TEST(Service, EndsWhatTakesTooLong) {
  ServiceOptions options = Instance::default_options();
  options.token_timeout_s = 0.2;
  Instance instance(options);
  instance.engine.hold = true;
  for (const bool stream : {false, true})
    expect_refused(post(instance.port, kChat, chat({{"stream", stream}})), 500,
                   "Incomplete Generation", "Engine callback timeout: server tokenTimeout");
  EXPECT_TRUE(instance.engine.wait_running(0));
  options.token_timeout_s = 600;
  options.e2e_timeout_s = 0.2;
  Instance other(options);
  other.engine.hold = true;
  expect_refused(post(other.port, kChat, chat()), 500, "Incomplete Generation",
                 "Engine callback timeout: server e2eTimeout");
  // A limit of the client's is no fault of the server's.
  Instance third;
  third.engine.hold = true;
  const json limited = {{"inputs", "Hi"}, {"parameters", {{"timeout", 1}}}};
  expect_refused(post(third.port, "/infer", limited.dump()), 408, "Incomplete Generation",
                 "Engine callback timeout: client timeout");
}

TEST(Service, AClientThatLeavesFreesItsSequences) {
  Instance instance;
  instance.engine.step = std::chrono::milliseconds(2);
  Client whole(instance.port);
  whole.send(post_text(kChat, chat({{"ignore_eos", true}, {"n", 2}, {"temperature", 1}})));
  Client stream(instance.port);
  stream.send(post_text(kChat, chat({{"ignore_eos", true}, {"stream", true}})));
  stream.read_until("\"content\":\"H\"");
  ASSERT_TRUE(instance.engine.wait_running(3));
  whole.close();
  EXPECT_TRUE(instance.engine.wait_running(1));
  stream.close();
  EXPECT_TRUE(instance.engine.wait_running(0));
  EXPECT_EQ(instance.engine.stats().cancelled, 3u);
  EXPECT_EQ(instance.core->generate.active(), 0);
}

TEST(Service, ServesManyStreamsAtOnce) {
  Instance instance;
  instance.engine.script = std::string(30, 'y');
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 200; ++i) {
    clients.push_back(std::make_unique<Client>(instance.port));
    clients.back()->send(post_text(kCompletions, completion({{"stream", true}})));
  }
  for (const auto& client : clients) {
    const Reply reply = parse_reply(client->read_until("0\r\n\r\n"));
    ASSERT_EQ(reply.status, 200);
    std::string text;
    const std::regex piece("\"text\":\"(y*)\"");
    for (std::sregex_iterator i(reply.body.begin(), reply.body.end(), piece), end; i != end; ++i)
      text += (*i)[1];
    EXPECT_EQ(text, instance.engine.script);
    EXPECT_TRUE(reply.body.ends_with("data: [DONE]\n\n"));
  }
  EXPECT_TRUE(instance.engine.wait_running(0));
}

TEST(Service, ASlowReaderLosesItsStreamAndNothingElse) {
  ServerOptions http;
  http.max_buffered_bytes = 200000;
  ServiceOptions options = Instance::default_options();
  options.max_output_tokens = 1 << 20;
  Instance instance(options, http);
  instance.engine.step = std::chrono::microseconds(1);
  Client slow(instance.port, 4096);
  slow.send(post_text(kCompletions,
                      completion({{"stream", true}, {"ignore_eos", true}, {"max_tokens", 1 << 20}})));
  ASSERT_TRUE(instance.engine.wait_running(1));
  EXPECT_EQ(post(instance.port, kChat, chat()).status, 200);
  EXPECT_TRUE(instance.engine.wait_running(0));
  EXPECT_EQ(instance.engine.stats().cancelled, 1u);
}

TEST(Service, SaysThatTheModelHasNoChatTemplate) {
  Instance instance(Instance::default_options(), {}, false);
  expect_refused(post(instance.port, kChat, chat()), 422, "Input Validation Error",
                 "Model demo has no chat template, so it cannot serve /v1/chat/completions. Use "
                 "/v1/completions, or add chat_template.jinja to /data/models/demo");
}

TEST(Service, AnswersBadBodiesWithoutTheEngine) {
  Instance instance;
  expect_refused(post(instance.port, kChat, "{"), 422, "Input Validation Error",
                 "Failed to parse request context to json");
  expect_refused(post(instance.port, kChat, chat({{"model", "x"}})), 422, "Input Validation Error",
                 "Model not found");
  EXPECT_EQ(post(instance.port, kCompletions, completion({{"prompt", std::string("a\0b", 3)}})).status,
            200);
  EXPECT_EQ(instance.engine.requests.size(), 1u);
}

TEST(Service, HealthFollowsTheInstance) {
  Instance instance;
  for (const char* path : {"/health", "/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready"}) {
    instance.set_health({.state = InstanceState::kServing, .lost = {}, .reason = {}});
    EXPECT_EQ(fetch(instance.port, path).status, 200) << path;
    EXPECT_EQ(fetch(instance.port, path).body, "") << path;
    instance.set_health({.state = InstanceState::kStarting, .lost = {}, .reason = {}});
    EXPECT_EQ(fetch(instance.port, path).status, 503) << path;
    EXPECT_EQ(fetch(instance.port, path).body, "") << path;
    instance.set_health({.state = InstanceState::kStopped, .lost = {}, .reason = {}});
    expect_refused(fetch(instance.port, path), 503, "Service Unavailable",
                   "The service has been stopped.");
  }
  expect_refused(fetch(instance.port, "/v2/models/x/ready"), 404, "NotFoundError", "Model x not found.");
  instance.set_health({.state = InstanceState::kFailed, .lost = {"127.0.0.2"}, .reason = {}});
  const std::string abnormal =
      R"({"message":"Abnormal node detected","no_contact_node":["node(127.0.0.2) is abnormal."]})";
  EXPECT_EQ(fetch(instance.port, "/health").status, 500);
  EXPECT_EQ(fetch(instance.port, "/health").body, abnormal);
  expect_refused(fetch(instance.port, "/v2/models/demo/ready"), 500, "Incomplete Generation", abnormal);
  instance.set_health({.state = InstanceState::kFailed, .lost = {}, .reason = "rank 0 died"});
  EXPECT_EQ(fetch(instance.port, "/v2/health/ready").body,
            R"({"message":"Service is abnormal","reason":"rank 0 died"})");
  expect_refused(post(instance.port, kChat, chat()), 503, "Service Unavailable",
                 "The service is not healthy. rank 0 died");
  const std::string lost = "node 127.0.0.2 is dead: its connection ended";
  const std::string recovering = R"({"message":"Service is recovering",)"
                                 R"("no_contact_node":["node(127.0.0.2) is abnormal."],)"
                                 R"("reason":"node 127.0.0.2 is dead: its connection ended"})";
  instance.set_health({.state = InstanceState::kRecovering, .lost = {"127.0.0.2"}, .reason = lost});
  for (const char* path : {"/health", "/v2/health/live"}) {
    EXPECT_EQ(fetch(instance.port, path).status, 200) << path;
    EXPECT_EQ(fetch(instance.port, path).body, recovering) << path;
  }
  EXPECT_EQ(fetch(instance.port, "/v2/health/ready").status, 503);
  EXPECT_EQ(fetch(instance.port, "/v2/health/ready").body, recovering);
  EXPECT_EQ(post(instance.port, kChat, chat()).status, 200);
  instance.set_health({.state = InstanceState::kServing, .lost = {}, .reason = {}});
  instance.engine.set_waiting(10);
  EXPECT_EQ(fetch(instance.port, "/health").body, R"({"message":"Service is alive but busy"})");
  EXPECT_EQ(fetch(instance.port, "/v2/health/ready").status, 503);
  instance.engine.set_waiting(0);
  instance.set_health({.state = InstanceState::kStarting, .lost = {}, .reason = {}});
  expect_refused(post(instance.port, kChat, chat()), 503, "Service Unavailable",
                 "The service is starting");
}

TEST(Service, TimedHealthSendsATokenThrough) {
  Instance instance;
  EXPECT_EQ(fetch(instance.port, "/health/timed").body, R"({"status":"healthy"})");
  EXPECT_EQ(instance.engine.requests.at(0).sampling.max_tokens, 1);
  expect_refused(fetch(instance.port, "/health/timed-1000"), 404, "NotFoundError",
                 "Max wait time is 600, input is invalid or too long");
  expect_refused(fetch(instance.port, "/health/timed-x"), 404, "NotFoundError",
                 "Max wait time is 600, input is invalid or too long");
  for (const char* path : {"/health/timed-0", "/health/timed-601"})
    expect_refused(fetch(instance.port, path), 404, "NotFoundError",
                   "Wait time should be in range of [1, 600], input is not valid");
  instance.engine.hold = true;
  expect_refused(fetch(instance.port, "/health/timed-1"), 500, "Incomplete Generation",
                 "Engine callback timeout");
}

TEST(Service, ListsTheModel) {
  Instance instance;
  const Reply reply = fetch(instance.port, "/v1/models");
  EXPECT_EQ(std::regex_replace(reply.body, std::regex("\"created\": [0-9]+"), "\"created\": 0"),
            R"({
    "data": [
        {
            "created": 0,
            "id": "demo",
            "max_model_len": 2560,
            "object": "model",
            "owned_by": "MindIE Server",
            "parent": "null",
            "root": "***/demo"
        }
    ],
    "object": "list"
})");
  EXPECT_EQ(settled(fetch(instance.port, "/v1/models/demo").body),
            R"({"id":"demo","object":"model","created":0,"owned_by":"MindIE Server"})");
  expect_refused(fetch(instance.port, "/v1/models/x"), 404, "NotFoundError", "Model x not found.");
}

TEST(Service, TellsItsConfigurationAndState) {
  Instance instance;
  EXPECT_EQ(json::parse(fetch(instance.port, "/v1/config").body),
            json::parse(R"({"modelName":"demo","maxSeqLen":2560,"npuMemSize":-1,"cpuMemSize":0,
                "worldSize":1,"maxOutputLen":512,"cacheBlockSize":128})"));
  const json info = json::parse(fetch(instance.port, "/info").body);
  EXPECT_EQ(info["max_concurrent_requests"], 200);
  EXPECT_EQ(info["models"][0]["model_dtype"], "bfloat16");
  const json status = json::parse(fetch(instance.port, "/v1/status").body);
  EXPECT_EQ(status["resource"]["totalNpuBlockNums"], 100);
  EXPECT_EQ(status["service"]["roleStatus"], "RoleReady");
  EXPECT_EQ(status["phalanx"]["ranks"], 2);
  EXPECT_EQ(json::parse(fetch(instance.port, "/v2/models/demo/getSlotCount").body),
            json::parse(R"({"total_slots":200,"free_slots":200,"available_tokens_length":12800})"));
}

TEST(Service, CountsForPrometheus) {
  Instance instance;
  post(instance.port, kChat, chat());
  const Reply reply = fetch(instance.port, "/metrics");
  EXPECT_TRUE(reply.has("Content-Type: text/plain; charset=utf-8\r\n"));
  for (const char* line :
       {"# TYPE request_received_total counter\nrequest_received_total{model_name=\"demo\"} 1\n",
        "request_success_total{model_name=\"demo\"} 1\n",
        "time_to_first_token_seconds_count{model_name=\"demo\"} 1\n",
        "time_per_output_token_seconds_count{model_name=\"demo\"} 6\n",
        "request_prompt_tokens_bucket{model_name=\"demo\",le=\"50\"} 1\n",
        "request_prompt_tokens_bucket{model_name=\"demo\",le=\"10\"} 0\n",
        "e2e_request_latency_seconds_bucket{model_name=\"demo\",le=\"+Inf\"} 1\n"})
    EXPECT_NE(reply.body.find(line), std::string::npos) << line << reply.body;
}

TEST(Service, TellsPrometheusOfRanksAndUnderVllmsNames) {
  Metrics metrics;
  metrics.received();
  metrics.first_token(0.5);
  metrics.next_token(0.02);
  metrics.next_token(0.04);
  const std::string text = metrics.render(
      {.model_name = "a \"b\"",
       .engine = {.running = 3, .blocks_total = 4, .blocks_free = 1, .steps = 2, .step_ns = 1500000000},
       .ranks = {{.rank = 1, .node = "10.0.0.2", .compute_seconds = 1.5, .wait_seconds = 0.25,
                  .bytes_sent = 7}},
       .nodes = {{.address = "10.0.0.2", .verdict = "stuck", .up = false}},
       .generation = 7,
       .recoveries = 6,
       .recovering = true,
       .certificates = {{"business", 1800000000}}});
  for (const char* line :
       {"vllm:num_requests_running{model_name=\"a \\\"b\\\"\",engine=\"0\"} 3\n",
        "vllm:kv_cache_usage_perc{model_name=\"a \\\"b\\\"\",engine=\"0\"} 0.75\n",
        "# TYPE vllm:inter_token_latency_seconds histogram\n",
        "vllm:inter_token_latency_seconds_count{model_name=\"a \\\"b\\\"\",engine=\"0\"} 2\n",
        "phalanx_step_seconds_sum{model_name=\"a \\\"b\\\"\"} 1.5\n",
        "phalanx_rank_compute_seconds_total{model_name=\"a \\\"b\\\"\",rank=\"1\",node=\"10.0.0.2\"} 1.5\n",
        "phalanx_rank_wait_seconds_total{model_name=\"a \\\"b\\\"\",rank=\"1\",node=\"10.0.0.2\"} 0.25\n",
        "phalanx_generation{model_name=\"a \\\"b\\\"\"} 7\n",
        "phalanx_recovering{model_name=\"a \\\"b\\\"\"} 1\n",
        "phalanx_recoveries_total{model_name=\"a \\\"b\\\"\"} 6\n",
        "phalanx_node_up{model_name=\"a \\\"b\\\"\",node=\"10.0.0.2\",verdict=\"stuck\"} 0\n",
        "phalanx_certificate_end_timestamp_seconds{plane=\"business\"} 1800000000\n"})
    EXPECT_NE(text.find(line), std::string::npos) << line << text;
  EXPECT_EQ(metrics.averages().first_token_ms, 500);
  EXPECT_NEAR(metrics.averages().next_token_ms, 30, 1e-9);
}

TEST(Service, TellsTheFiguresOfMetricsJson) {
  Instance instance;
  post(instance.port, kChat, chat());
  const json figures = json::parse(fetch(instance.port, "/metrics-json").body);
  EXPECT_EQ(figures["resultType"], "vector");
  ASSERT_EQ(figures["result"].size(), 5U);
  EXPECT_EQ(figures["result"][0]["metric"][0]["__name__"], "TTFT");
  EXPECT_EQ(figures["result"][0]["metric"][0]["job"], "node");
  EXPECT_EQ(figures["result"][4]["value"], "100.000000");
}

TEST(Service, StopsAfterTheRequestsInProgress) {
  Instance instance;
  instance.engine.step = std::chrono::milliseconds(20);
  Client running(instance.port);
  running.send(post_text(kChat, chat({{"ignore_eos", true}, {"max_tokens", 20}})));
  ASSERT_TRUE(instance.engine.wait_running(1));
  Client stopping(instance.port);
  stopping.send("GET /stopService HTTP/1.1\r\n\r\n");
  const Deadline deadline = Deadline::in_seconds(5);
  while (!instance.core->stopped && !deadline.passed())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  expect_refused(post(instance.port, kChat, chat()), 503, "Service Unavailable",
                 "The service has been stopped");
  EXPECT_EQ(fetch(instance.port, "/stopService").status, 500);
  EXPECT_EQ(fetch(instance.port, "/health/timed").body, R"({"status":"healthy"})");
  EXPECT_EQ(instance.stops, 0);
  EXPECT_EQ(parse_reply(running.read_all()).status, 200);
  EXPECT_EQ(parse_reply(stopping.read_all()).status, 200);
  while (instance.stops == 0 && !deadline.passed())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(instance.stops, 1);
}

}  // namespace
}  // namespace phalanx::api
