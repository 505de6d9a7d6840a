// LoRA adapters over HTTP: load and unload, which dialect names them how, and the refusals.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/testing.h"

namespace phalanx::api {
namespace {

using nlohmann::json;
using testing::fetch;
using testing::Instance;
using testing::post;
using testing::Reply;

constexpr const char* kLoad = "/v1/load_lora_adapter";
constexpr const char* kUnload = "/v1/unload_lora_adapter";

#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(Adapters, LoadedNamedUnloaded) {
  Instance instance;
  const Reply loaded =
      post(instance.port, kLoad,
           R"({"lora_name":"sql","lora_path":"/adapters/team/sql","master_model":"demo"})");
  EXPECT_EQ(loaded.status, 200) << loaded.body;
  EXPECT_EQ(loaded.body, "Success: LoRA adapter 'sql' added successfully.");
  const json models = json::parse(fetch(instance.port, "/v1/models").body)["data"];
  ASSERT_EQ(models.size(), 2U);
  EXPECT_EQ(models[1]["id"], "sql");
  EXPECT_EQ(models[1]["parent"], "demo");
  EXPECT_EQ(models[1]["root"], "***/sql");
  EXPECT_EQ(fetch(instance.port, "/v1/models/sql").status, 200);

  const std::string chat = R"("messages":[{"role":"user","content":"Hi"}])";
  const auto adapter_of = [&](const char* path, const std::string& body) -> std::string {
    instance.engine.requests.clear();
    const Reply reply = post(instance.port, path, body);
    EXPECT_EQ(reply.status, 200) << path << " " << reply.body;
    return instance.engine.requests.empty() ? "none" : instance.engine.requests.front().adapter;
  };
  const char* kChat = "/v1/chat/completions";
  EXPECT_EQ(adapter_of(kChat, R"({"model":"sql",)" + chat + "}"), "sql");
  EXPECT_EQ(adapter_of(kChat, R"({"model":"demo",)" + chat + "}"), "");
  EXPECT_EQ(adapter_of("/v1/completions", R"({"model":"sql","prompt":"a"})"), "sql");
  EXPECT_EQ(adapter_of("/v1/responses", R"({"model":"sql","input":"a"})"), "sql");
  EXPECT_EQ(adapter_of("/v1/messages", R"({"model":"sql","max_tokens":4,)" + chat + "}"), "sql");
  EXPECT_EQ(adapter_of("/generate", R"({"prompt":"a","model":"sql"})"), "sql");
  EXPECT_EQ(adapter_of("/generate", R"({"prompt":"a","model":"None"})"), "");
  EXPECT_EQ(adapter_of("/generate", R"({"inputs":"a","parameters":{"adapter_id":"sql"}})"), "sql");
  const Reply answer = post(instance.port, kChat, R"({"model":"sql",)" + chat + "}");
  EXPECT_EQ(json::parse(answer.body)["model"], "sql");
  const Reply beams =
      post(instance.port, kChat,
           R"({"model":"sql","use_beam_search":true,"n":2,"max_tokens":2,)" + chat + "}");
  EXPECT_EQ(beams.status, 200) << beams.body;
  EXPECT_EQ(instance.engine.requests.back().adapter, "sql");

  const Reply removed = post(instance.port, kUnload, R"({"lora_name":"sql","lora_int_id":1})");
  EXPECT_EQ(removed.status, 200) << removed.body;
  EXPECT_EQ(removed.body, "Success: LoRA adapter 'sql' removed successfully.");
  EXPECT_EQ(json::parse(fetch(instance.port, "/v1/models").body)["data"].size(), 1U);
  const Reply gone = post(instance.port, kChat, R"({"model":"sql",)" + chat + "}");
  EXPECT_EQ(gone.status, 422);
  EXPECT_SAYS(gone.body, "Model not found");
  EXPECT_EQ(post(instance.port, "/generate", R"({"inputs":"a","parameters":{"adapter_id":"sql"}})")
                .status,
            404);
  // Unloaded between the parser and the engine.
  instance.engine.result = engine::SubmitResult::kUnknownAdapter;
  instance.engine.detail = "the LoRA adapter 'sql' is not loaded";
  const Reply late = post(instance.port, kChat, R"({"model":"demo",)" + chat + "}");
  EXPECT_EQ(late.status, 404);
  EXPECT_SAYS(late.body, "the LoRA adapter 'sql' is not loaded");
}

TEST(Adapters, RefusalsSayWhatIsWrong) {
  ServiceOptions options = Instance::default_options();
  options.check_adapter = [](const std::string& path) {
    if (path == "/adapters/dora") throw Error(Code::kInvalidArgument, "1. DoRA cannot be served");
  };
  Instance instance(options);
  struct Case {
    const char* path;
    const char* body;
    int status;
    const char* text;
  };
  const Case cases[] = {
      {kLoad, "{", 422, "Req body converts to json fail."},
      {kLoad, "[]", 422, "Req body converts to json fail."},
      {kLoad, "{}", 400, "Input invalid lora name"},
      {kLoad, R"({"lora_name":"a b","lora_path":"/a"})", 400, "found 'a b'"},
      {kLoad, R"({"lora_name":7,"lora_path":"/a"})", 422, "lora_name"},
      {kLoad, R"({"lora_name":"a"})", 400, "Input invalid lora path: found ''"},
      {kLoad, R"({"lora_name":"a","lora_path":"relative"})", 400, "Input invalid lora path"},
      {kLoad, R"({"lora_name":"a","lora_path":"/a/../etc"})", 400, "Input invalid lora path"},
      {kLoad, R"({"lora_name":"a","lora_path":"/a\u0000b"})", 400, "Input invalid lora path"},
      {kLoad, R"({"lora_name":"demo","lora_path":"/a"})", 400, "the name of the base model"},
      {kLoad, R"({"lora_name":"a","lora_path":"/a","master_model":"other"})", 404,
       "Lora base model not found. Please check. Lora name is a"},
      {kLoad, R"({"lora_name":"a","lora_path":"/a","load_inplace":true})", 400, "load_inplace"},
      {kLoad, R"({"lora_name":"a","lora_path":"/adapters/dora"})", 400, "DoRA cannot be served"},
      {kLoad, R"({"lora_name":"a","lora_path":"/adapters/bad"})", 400, "rank 1: tensor missing"},
      {kUnload, R"({"lora_name":"nobody"})", 404, "'nobody' is not loaded"},
      {kUnload, R"({"lora_name":""})", 400, "Input invalid lora name"},
  };
  for (const Case& c : cases) {
    const Reply reply = post(instance.port, c.path, c.body);
    EXPECT_EQ(reply.status, c.status) << c.body << " " << reply.body;
    EXPECT_SAYS(reply.body, c.text);
    EXPECT_TRUE(json::parse(reply.body).contains("error_type")) << reply.body;
  }
  EXPECT_EQ(post(instance.port, kLoad, R"({"lora_name":"a","lora_path":"/a"})").status, 200);
  const Reply twice = post(instance.port, kLoad, R"({"lora_name":"a","lora_path":"/a"})");
  EXPECT_EQ(twice.status, 400);
  EXPECT_SAYS(twice.body, "is loaded already");
  const Reply other =
      post(instance.port, kLoad, R"({"lora_name":"b","lora_path":"/b","frobnicate":1})");
  EXPECT_TRUE(other.has("X-Phalanx-Ignored: frobnicate\r\n"));
}

}  // namespace
}  // namespace phalanx::api
