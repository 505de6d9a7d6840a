#include "phalanx/text/chat_template.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/text/testing_files.h"

namespace phalanx::text {
namespace {

constexpr const char* kHello =
    R"([{"role":"system","content":"Be brief."},{"role":"user","content":"Hi <b>"}])";

std::string render(const std::string& source, const ChatInput& input = {.messages_json = kHello},
                   const std::map<std::string, std::string>& tokens = {}) {
  return ChatTemplate::from_source(source, tokens, "test")->render(input);
}

std::string error_of(const std::string& source, ChatInput input = {.messages_json = kHello}) {
  try {
    return "rendered: " + render(source, input);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kInvalidArgument);
    return e.what();
  }
}

TEST(ChatTemplate, ChatMl) {
  const std::string source =
      "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
      "+ "
      "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
      "}}{% endif %}";
  EXPECT_EQ(render(source),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
            "<|im_start|>assistant\n");
  EXPECT_EQ(render(source, {.messages_json = kHello, .add_generation_prompt = false}),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n");
}

TEST(ChatTemplate, Llama3) {
  const std::string source =
      "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
      "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
      "trim + "
      "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif "
      "%}{{ "
      "content }}{% endfor %}{% if add_generation_prompt %}{{ "
      "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
  EXPECT_EQ(render(source, {.messages_json = R"([{"role":"user","content":"  Hi \n"}])"},
                   {{"bos_token", "<|begin_of_text|>"}}),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

constexpr const char* kMistral =
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 "
    "% 2 "
    "== 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') "
    "}}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' "
    "}}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ "
    "raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

TEST(ChatTemplate, Mistral) {
  const std::string messages =
      R"([{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}])";
  EXPECT_EQ(
      render(kMistral, {.messages_json = messages}, {{"bos_token", "<s>"}, {"eos_token", "</s>"}}),
      "<s>[INST] a [/INST]b</s>[INST] c [/INST]");
}

TEST(ChatTemplate, RaisedMessageIsHandedOn) {
  EXPECT_EQ(error_of(kMistral, {.messages_json = R"([{"role":"assistant","content":"b"}])"}),
            "the chat template (test) refuses this conversation: Conversation roles must alternate "
            "user/assistant/user/assistant/...");
  EXPECT_EQ(error_of("{% macro f() %}{{ raise_exception('inner') }}{% endmacro %}{{ f() }}"),
            "the chat template (test) refuses this conversation: inner");
}

TEST(ChatTemplate, BlocksAreTrimmedAsInTransformers) {
  EXPECT_EQ(render("  {% if true %}\n  a\n  {% endif %}\nb\n"), "  a\nb");
  EXPECT_EQ(
      render("{% generation %}x{% endgeneration %}{%- generation -%} y {%- endgeneration -%}"),
      "xy");
}

TEST(ChatTemplate, PythonsSpellings) {
  EXPECT_EQ(render("{{ none }} {{ true }} {{ False }} {{ 1.0 }} {{ missing }}."),
            "None True False 1.0 .");
  EXPECT_EQ(render("{% if tools is none and tools is defined %}no tools{% endif %}"), "no tools");
  EXPECT_EQ(render("{{ 'a=b=c'.split('=')[-1] }}{{ ' x '.strip() }}{{ 'abc'.startswith('ab') }}"
                   "{{ 'abc'[::-1] }}{{ messages[0].get('nothing', 'd') }}{{ 'x'.upper() }}"),
            "cxTruecbadX");
  EXPECT_EQ(render("{% for k, v in messages[0].items() %}{{ k }}:{{ v }};{% endfor %}"),
            "role:system;content:Be brief.;");
  EXPECT_EQ(render("{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
                   "{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"),
            "1");
  EXPECT_EQ(render("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
                   "| join(',') }}{{ messages[1:] | length }}"),
            "Hi <b>1");
}

TEST(ChatTemplate, TojsonIsPythons) {
  const ChatInput input{
      .messages_json = "[]",
      .tools_json = R"([{"z":1,"a":"<b>'é","n":null,"f":1.5,"l":[true,2],"e":{}}])"};
  EXPECT_EQ(render("{{ tools[0] | tojson }}", input),
            R"({"z": 1, "a": "<b>'é", "n": null, "f": 1.5, "l": [true, 2], "e": {}})");
  EXPECT_EQ(render("{{ tools[0].l | tojson(indent=2) }}", input), "[\n  true,\n  2\n]");
  EXPECT_EQ(render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", input),
            R"({"a": 2, "b": 1})");
}

TEST(ChatTemplate, ToolCallArgumentsBecomeObjects) {
  const std::string messages =
      R"([{"role":"assistant","content":null,"tool_calls":[{"type":"function","function":{"name":"f","arguments":"{\"b\": 1, \"a\": [2]}"}}]}])";
  EXPECT_EQ(
      render("{% for c in messages[0].tool_calls %}{{ c.function.name }} {{ c.function.arguments "
             "| tojson }}{% endfor %}",
             {.messages_json = messages}),
      R"(f {"b": 1, "a": [2]})");
}

TEST(ChatTemplate, TextPartsAreJoinedUnlessTheTemplateKnowsThem) {
  const std::string messages =
      R"([{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}])";
  EXPECT_EQ(render("{{ messages[0].content }}", {.messages_json = messages}), "a\nb");
  EXPECT_EQ(render("{% for part in messages[0]['content'] %}[{{ part.text }}]{% endfor %}",
                   {.messages_json = messages}),
            "[a][b]");
}

TEST(ChatTemplate, ExtraVariables) {
  const ChatInput input{
      .messages_json = "[]",
      .extra_json = R"({"enable_thinking":false,"bos_token":"<x>","messages":[1]})"};
  EXPECT_EQ(render("{{ bos_token }}{{ enable_thinking }}{{ messages | length }}", input,
                   {{"bos_token", "<s>"}}),
            "<x>False0");
  EXPECT_EQ(error_of("x", {.messages_json = "[]", .extra_json = "[1]"}),
            "template variables: found a JSON array, expected an object");
}

TEST(ChatTemplate, Strftime) {
  EXPECT_EQ(render("{{ strftime_now('%Y') }}", {.messages_json = "[]", .now = 1'700'000'000}),
            "2023");
}

TEST(ChatTemplate, BadInputIsRefused) {
  EXPECT_NE(error_of("x", {.messages_json = "[{"}).find("messages: not valid JSON"),
            std::string::npos);
  EXPECT_NE(error_of("{% if %}").find("test: the chat template cannot be compiled: "),
            std::string::npos);
  EXPECT_NE(error_of("{{ messages[0].content.nothing.more }}").find("undefined"),
            std::string::npos);
  EXPECT_NE(error_of("{{ nothing() }}").find("nothing"), std::string::npos);
}

TEST(ChatTemplate, WorkAndMemoryAreBounded) {
  const auto start = Clock::now();
  EXPECT_NE(error_of("{% for a in range(100000) %}{% for b in range(100000) %}{% set x = a * b %}"
                     "{% endfor %}{% endfor %}")
                .find("did not end within its bound of work"),
            std::string::npos);
  EXPECT_NE(error_of("{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for a in range(60) %}"
                     "{% set ns.x = ns.x ~ ns.x %}{% endfor %}")
                .find("did not end within its bound of work"),
            std::string::npos);
  EXPECT_EQ(render("{{ '{:>8}|{:.3f}|{{9999999}}'.format('ab', 1.5) }}"), "      ab|1.500|{9999999}");
  for (const char* spec : {"{:>3000000000}", "{:.99999999999999999999f}", "{:60000}{:60000}"})
    EXPECT_NE(error_of("{{ '" + std::string(spec) + "'.format(1, 2) }}")
                  .find("widths and precisions add up to more than 100000"),
              std::string::npos);
  EXPECT_NE(error_of("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").find("recursion"),
            std::string::npos);
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(20));
}

TEST(ChatTemplate, WhatAClientSendsMayNest) {
  const auto own = ChatTemplate::from_source("{{ 1 }}", {}, "test");
  const auto outcome = [&](const std::string& source) -> std::string {
    try {
      return own->with_source(source, "chat_template of the request")->render({.messages_json = kHello});
    } catch (const Error& e) {
      return e.what();
    }
  };
  const auto times = [](size_t count, const std::string& part) {
    std::string text;
    for (size_t i = 0; i < count; ++i) text += part;
    return text;
  };
  EXPECT_EQ(outcome("{{ 1" + times(100'000, "+1") + " }}"), "100001");
  EXPECT_EQ(outcome("{{ 1" + times(50'000, "|abs") + " }}"), "1");
  EXPECT_EQ(outcome("{{ " + times(200'000, "-") + "1 }}"), "1");
  EXPECT_EQ(outcome("{{ " + times(50'000, "not ") + "true }}"), "True");
  EXPECT_EQ(outcome("{% if false %}" + times(10'000, "{% elif false %}") + "{% else %}a{% endif %}"), "a");
  EXPECT_EQ(outcome("{% set ns = namespace(x=[]) %}{% for a in range(100000) %}{% set ns.x = [ns.x] %}"
                    "{% endfor %}{{ ns.x|length }}"),
            "1");
  for (const char* end : {"{{ ns.x }}", "{{ ns.x|tojson }}", "{{ ns.x == ns.y }}", "{{ ns.x|string|length }}"})
    EXPECT_FALSE(outcome("{% set ns = namespace(x=[], y=[]) %}{% for a in range(100000) %}{% set ns.x = "
                         "[ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}" +
                         std::string(end))
                     .empty())
        << end;
  EXPECT_NE(outcome("{% set ns = namespace(x=[]) %}{% for a in range(9999) %}{% for b in range(9999) %}"
                    "{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}")
                .find("bound of work"),
            std::string::npos);
  EXPECT_EQ(outcome(times(300'000, "a")),
            "chat_template of the request: found 300000 bytes, expected at most 262144");
}

class ChatTemplateFiles : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "chat_template_files";
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void write(const std::string& name, const std::string& content) {
    std::ofstream(dir_ + "/" + name) << content;
  }
  std::string load_error(const std::string& override_file = "") {
    try {
      (void)ChatTemplate::load(dir_, override_file);
    } catch (const Error& e) {
      return e.what();
    }
    return "nothing was thrown";
  }
  std::string dir_;
};

TEST_F(ChatTemplateFiles, NoTemplateIsEmptyAndSaysSo) {
  const auto t = ChatTemplate::load(dir_);
  EXPECT_TRUE(t->empty());
  try {
    (void)t->render({.messages_json = kHello});
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kFailedPrecondition);
    EXPECT_EQ(std::string(e.what()).find(dir_ + ": the checkpoint has no chat template. Fix: "),
              0u);
  }
}

TEST_F(ChatTemplateFiles, PrecedenceAndSpecialTokens) {
  write(
      "tokenizer_config.json",
      R"({"chat_template":"config {{ bos_token }}{{ eos_token }}","bos_token":{"content":"<s>"},"eos_token":"</s>","pad_token":null})");
  EXPECT_EQ(ChatTemplate::load(dir_)->render({.messages_json = kHello}), "config <s></s>");
  write("chat_template.json", R"({"chat_template":"json {{ bos_token }}"})");
  EXPECT_EQ(ChatTemplate::load(dir_)->render({.messages_json = kHello}), "json <s>");
  write("chat_template.jinja", "jinja {{ bos_token }}");
  EXPECT_EQ(ChatTemplate::load(dir_)->render({.messages_json = kHello}), "jinja <s>");
  write("other.txt", "other {{ bos_token }}");
  EXPECT_EQ(ChatTemplate::load(dir_, dir_ + "/other.txt")->render({.messages_json = kHello}),
            "other <s>");
  EXPECT_NE(load_error(dir_ + "/absent.txt").find(dir_ + "/absent.txt"), std::string::npos);
}

TEST_F(ChatTemplateFiles, NamedTemplates) {
  write(
      "tokenizer_config.json",
      R"({"chat_template":[{"name":"default","template":"plain"},{"name":"tool_use","template":"tools"}]})");
  const auto t = ChatTemplate::load(dir_);
  EXPECT_EQ(t->render({.messages_json = kHello}), "plain");
  EXPECT_EQ(t->render({.messages_json = kHello, .tools_json = "[{}]"}), "tools");
}

TEST_F(ChatTemplateFiles, WrongFormsAreNamed) {
  const std::string path = dir_ + "/tokenizer_config.json";
  write("tokenizer_config.json", R"({"chat_template":5})");
  EXPECT_EQ(load_error(), path +
                              ": chat_template: found a JSON number, expected a text or a list of "
                              "{\"name\", \"template\"}");
  write("tokenizer_config.json", R"({"chat_template":[{"name":"rag","template":"x"}]})");
  EXPECT_EQ(load_error(),
            path + ": chat_template: found a list of [rag], expected one named \"default\"");
  write("tokenizer_config.json", R"([])");
  EXPECT_EQ(load_error(), path + ": found a JSON array, expected an object");
  write("tokenizer_config.json", R"({"chat_template":"{% for %}"})");
  EXPECT_EQ(load_error().find(path + ": the chat template cannot be compiled: "), 0u);
}

TEST_F(ChatTemplateFiles, DemoModel) {
  if (demo_model().empty()) GTEST_SKIP() << "demo model not fetched (scripts/fetch_demo_model)";
  EXPECT_EQ(ChatTemplate::load(demo_model())
                ->render({.messages_json = R"([{"role":"user","content":"Hi"}])"}),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace
}  // namespace phalanx::text
