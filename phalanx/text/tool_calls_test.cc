#include "phalanx/text/tool_calls.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"

namespace phalanx::text {
namespace {

using nlohmann::json;

struct Result {
  std::string content;
  json calls = json::array();
};

void add(CallParser::Piece piece, Result* out) {
  out->content += piece.content;
  for (const ToolCall& call : piece.calls)
    out->calls.push_back({{"name", call.name}, {"arguments", json::parse(call.arguments)}});
}

// The text in pieces that end at `cuts`.
Result parse(CallFormat format, const std::string& tools, const std::string& text,
             const std::vector<size_t>& cuts) {
  CallParser parser(format, tools);
  Result result;
  size_t at = 0;
  for (const size_t cut : cuts) {
    add(parser.push(std::string_view(text).substr(at, cut - at)), &result);
    at = cut;
  }
  add(parser.push(std::string_view(text).substr(at)), &result);
  add(parser.finish(), &result);
  return result;
}

// Every transcript gives what its file says, whole, cut at every byte, and byte by byte.
TEST(CallParser, FindsTheSameCallsHoweverTheTextIsCut) {
  int formats = 0;
  for (const auto& file :
       std::filesystem::directory_iterator(std::string(PHALANX_TESTDATA) + "/tool_calls")) {
    const json sheet = read_json_file(file.path().string());
    const auto format = call_format(sheet["format"].get<std::string>());
    ASSERT_TRUE(format) << file.path();
    EXPECT_GE(sheet["transcripts"].size(), 20u) << file.path();
    ++formats;
    const std::string tools = sheet["tools"].dump();
    for (const json& transcript : sheet["transcripts"]) {
      const std::string text = transcript["text"];
      const std::string where = sheet["format"].get<std::string>() + ": " + transcript["name"].get<std::string>();
      const auto expect = [&](const Result& got, const std::string& how) {
        EXPECT_EQ(got.content, transcript["content"].get<std::string>()) << where << ", " << how;
        EXPECT_EQ(got.calls, transcript["calls"]) << where << ", " << how;
      };
      expect(parse(*format, tools, text, {}), "whole");
      std::vector<size_t> every;
      for (size_t i = 1; i < text.size(); ++i) {
        every.push_back(i);
        expect(parse(*format, tools, text, {i}), "cut at " + std::to_string(i));
        if (::testing::Test::HasFailure()) break;
      }
      if (::testing::Test::HasFailure()) break;
      expect(parse(*format, tools, text, every), "byte by byte");
    }
  }
  EXPECT_EQ(formats, 9);
}

TEST(CallParser, KnowsTheRegisteredNames) {
  EXPECT_EQ(call_format("hermes"), CallFormat::kHermes);
  EXPECT_EQ(call_format("qwen2_5"), CallFormat::kHermes);
  EXPECT_EQ(call_format("deepseekv31"), CallFormat::kDeepSeekV31);
  EXPECT_EQ(call_format("chatglm2"), CallFormat::kNone);
  EXPECT_EQ(call_format(""), std::nullopt);
  EXPECT_EQ(call_format("gpt"), std::nullopt);
  EXPECT_EQ(call_format_names().size(), 37u);
  EXPECT_EQ(default_call_format("llama"), CallFormat::kLlamaJson);
  EXPECT_EQ(default_call_format("qwen2"), CallFormat::kQwenAuto);
  EXPECT_EQ(default_call_format("qwen3_moe"), CallFormat::kHermes);
  EXPECT_EQ(default_call_format("deepseek_v3"), CallFormat::kDeepSeekV3);
  EXPECT_EQ(default_call_format("chatglm"), CallFormat::kNone);
  EXPECT_EQ(default_call_format("mixtral"), CallFormat::kNone);
}

TEST(CallParser, ChoosesBetweenTheTwoFormsOfQwen) {
  const auto names = [](const std::string& text) {
    const Result result = parse(CallFormat::kQwenAuto, "", text, {});
    return result.calls.size() == 1 ? result.calls[0]["name"].get<std::string>() : result.content;
  };
  EXPECT_EQ(names("<tool_call>{\"name\":\"a\"}</tool_call>"), "a");
  EXPECT_EQ(names("\xE2\x9C\xBF" "FUNCTION" "\xE2\x9C\xBF: b\n\xE2\x9C\xBF" "ARGS" "\xE2\x9C\xBF: {}"), "b");
  EXPECT_EQ(names("neither"), "neither");
}

TEST(CallParser, ReadsAListOfForcedCalls) {
  const std::string text = R"([{"name": "a", "parameters": {"x": 1}}, {"name": "b", "parameters": {}}])";
  for (size_t cut = 1; cut < text.size(); ++cut) {
    const Result result = parse(CallFormat::kJsonList, "", text, {cut});
    ASSERT_EQ(result.calls.size(), 2u);
    EXPECT_EQ(result.calls[0]["arguments"]["x"], 1);
    EXPECT_EQ(result.content, "");
  }
  EXPECT_EQ(parse(CallFormat::kJsonList, "", "[{\"name\": \"a\"", {3}).content, "[{\"name\": \"a\"");
}

struct Split {
  std::string text, reasoning, content;
};

TEST(ReasoningSplitter, SplitsTheSameHoweverTheTextIsCut) {
  const Split cases[] = {
      {"<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."},
      {"Hm.</think>Yes.", "Hm.", "Yes."},
      {"\n<think>a b\n c </think> d ", "a b\n c", "d "},
      {"<think>\n\n</think>\n\nYes", "", "Yes"},
      {"never ends", "never ends", ""},
      {"<think>never ends \n", "never ends", ""},
      {"a </thin b</think>c</think>d", "a </thin b", "c</think>d"},
      {"<thi", "<thi", ""},
      {"", "", ""},
      {"</think>", "", ""},
      {"a < b </thinking> c</think>", "a < b </thinking> c", ""},
  };
  for (const Split& c : cases) {
    for (size_t cut = 0; cut <= c.text.size(); ++cut) {
      for (const bool bytes : {false, true}) {
        ReasoningSplitter splitter("<think>", "</think>");
        ReasoningSplitter::Piece all;
        const auto take = [&](const ReasoningSplitter::Piece& piece) {
          all.reasoning += piece.reasoning;
          all.content += piece.content;
        };
        if (bytes) {
          for (const char byte : c.text) take(splitter.push(std::string(1, byte)));
        } else {
          take(splitter.push(c.text.substr(0, cut)));
          take(splitter.push(c.text.substr(cut)));
        }
        take(splitter.finish());
        EXPECT_EQ(all.reasoning, c.reasoning) << c.text << " cut at " << cut;
        EXPECT_EQ(all.content, c.content) << c.text << " cut at " << cut;
      }
    }
  }
}

}  // namespace
}  // namespace phalanx::text
