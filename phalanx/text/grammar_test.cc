#include "phalanx/text/grammar.h"

#include <gtest/gtest.h>

#include <ctime>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/text/testing_files.h"

namespace phalanx::text {
namespace {

using nlohmann::json;
using Kind = GrammarSpec::Kind;

// A byte-level tokeniser whose end token is its last id.
struct Fixture {
  std::shared_ptr<const Tokenizer> tokenizer =
      Tokenizer::load(std::string(PHALANX_TESTDATA) + "/byte_level");
  int64_t vocab = tokenizer->vocab_size();
  int32_t end = static_cast<int32_t>(vocab - 1);
  Grammars grammars{*tokenizer, vocab, std::span(&end, 1)};

  [[nodiscard]] std::vector<uint32_t> mask(GrammarWalker& walker) const {
    std::vector<uint32_t> words(static_cast<size_t>((vocab + 31) / 32));
    walker.mask(words);
    return words;
  }
  static bool allows(const std::vector<uint32_t>& mask, int32_t id) {
    return (mask[static_cast<size_t>(id / 32)] >> (id % 32) & 1) != 0;
  }
  // Whether `text` and then the end are allowed.
  [[nodiscard]] bool accepts(const GrammarSpec& spec, std::string_view text) const {
    const auto walker = grammars.compile(spec);
    for (const int32_t id : tokenizer->encode(text, false)) {
      if (!allows(mask(*walker), id)) return false;
      walker->accept(id);
    }
    return allows(mask(*walker), end);
  }
};

TEST(Grammars, FollowEveryKind) {
  const Fixture f;
  const GrammarSpec object{.kind = Kind::kJsonObject, .text = {}};
  EXPECT_TRUE(f.accepts(object, R"({"a": [1, "x", null]})"));
  EXPECT_TRUE(f.accepts(object, "{\n  \"a\": true\n}"));
  EXPECT_FALSE(f.accepts(object, "[1]"));
  EXPECT_FALSE(f.accepts(object, R"({"a": 1)"));
  const GrammarSpec schema{
      .kind = Kind::kJsonSchema,
      .text = R"({"type":"object","properties":{"n":{"type":"integer","minimum":3}},"required":["n"],
                  "additionalProperties":false})"};
  EXPECT_TRUE(f.accepts(schema, R"({"n": 12})"));
  EXPECT_FALSE(f.accepts(schema, R"({"n": 2})"));
  EXPECT_FALSE(f.accepts(schema, R"({"m": 12})"));
  EXPECT_FALSE(f.accepts(schema, "{}"));
  const GrammarSpec regex{.kind = Kind::kRegex, .text = "[ab]{2}-\\d+"};
  EXPECT_TRUE(f.accepts(regex, "ab-12"));
  EXPECT_FALSE(f.accepts(regex, "abc-12"));
  const GrammarSpec choice{.kind = Kind::kChoice, .text = R"(["yes", "no \"way\"", "\u00e4"])"};
  EXPECT_TRUE(f.accepts(choice, "yes"));
  EXPECT_TRUE(f.accepts(choice, "no \"way\""));
  EXPECT_TRUE(f.accepts(choice, "\xC3\xA4"));
  EXPECT_FALSE(f.accepts(choice, "maybe"));
  const GrammarSpec lark{.kind = Kind::kLark, .text = "start: \"a\" b+\nb: \"b\" | \"c\""};
  EXPECT_TRUE(f.accepts(lark, "abcb"));
  EXPECT_FALSE(f.accepts(lark, "a"));
}

TEST(Grammars, AWalkerIsCopiedWithItsPlace) {
  const Fixture f;
  const auto walker = f.grammars.compile({.kind = Kind::kRegex, .text = "ab"});
  walker->accept(f.tokenizer->encode("a", false)[0]);
  const auto copy = walker->clone();
  const int32_t b = f.tokenizer->encode("b", false)[0];
  copy->accept(b);
  EXPECT_TRUE(Fixture::allows(f.mask(*walker), b));
  EXPECT_FALSE(Fixture::allows(f.mask(*copy), b));
  EXPECT_TRUE(Fixture::allows(f.mask(*copy), f.end));
  EXPECT_THROW(walker->accept(f.tokenizer->encode("x", false)[0]), Error);
}

TEST(Grammars, RefuseWhatCannotBeFollowedSoon) {
  const Fixture f;
  const std::pair<GrammarSpec, const char*> cases[] = {
      {{Kind::kJsonSchema, "{"}, "json_schema"},
      {{Kind::kJsonSchema, R"({"type":"object","properties":{"a":{"$ref":"#/nowhere"}}})"}, "nowhere"},
      {{Kind::kJsonSchema, R"({"type":"integer","minimum":5,"maximum":3})"}, "json_schema"},
      {{Kind::kJsonSchema, R"({"type":"array","uniqueItems":true})"}, "uniqueItems"},
      {{Kind::kRegex, "(unclosed"}, "regex"},
      {{Kind::kRegex, "(?=look)ahead"}, "regex"},
      {{Kind::kLark, "start: undefined_rule"}, "undefined_rule"},
      {{Kind::kLark, ""}, "lark"},
      {{Kind::kLark, "start: start"}, "lark"},
      {{Kind::kChoice, "7"}, "choice"},
  };
  for (const auto& [spec, part] : cases) {
    const std::clock_t begin = std::clock();
    try {
      (void)f.grammars.compile(spec);
      ADD_FAILURE() << spec.text << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kInvalidArgument) << error.what();
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
    EXPECT_LT(std::clock() - begin, CLOCKS_PER_SEC) << spec.text;
  }
}

// Either is fine, but neither may take long.
TEST(Grammars, EveryEndTokenEnds) {
  const Fixture f;
  const int32_t ends[] = {f.end, f.end - 1};
  const Grammars grammars(*f.tokenizer, f.vocab, ends);
  for (const int32_t end : ends) {
    const auto walker = grammars.compile({Kind::kRegex, "a"});
    EXPECT_FALSE(Fixture::allows(f.mask(*walker), end));
    walker->accept(f.tokenizer->encode("a", false)[0]);
    EXPECT_TRUE(Fixture::allows(f.mask(*walker), end));
    walker->accept(end);
    EXPECT_TRUE(walker->ended());
  }
}

TEST(Grammars, CountsBeyondTheBoundAreNamed) {
  const Fixture f;
  try {
    (void)f.grammars.compile({Kind::kJsonSchema, R"({"properties":{"a":{"type":"array","minItems":10001}}})"});
    FAIL() << "compiled";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find("minItems: found 10001, expected at most 10000"),
              std::string::npos)
        << error.what();
  }
}

TEST(Grammars, LargeOnesCompileOrAreRefusedSoon) {
  const Fixture f;
  std::string deep = R"({"type":"string"})";
  for (int i = 0; i < 60; ++i) deep = R"({"type":"array","items":)" + deep + "}";
  json wide = {{"type", "object"}};
  for (int i = 0; i < 1000; ++i)
    wide["properties"]["property_" + std::to_string(i)] = {{"type", "integer"}, {"minimum", i}};
  const GrammarSpec cases[] = {
      {Kind::kRegex, "((a{0,1000}){0,1000}){0,1000}"},
      {Kind::kRegex, "(.{0,5000}x.{0,5000}){200}"},
      {Kind::kRegex, "(a|aa)*b(a|aa)*c([a-z]{1,300}|[a-y]{1,301}){1,300}"},
      {Kind::kRegex, "(x+x+)+y"},
      {Kind::kJsonSchema, deep},
      {Kind::kJsonSchema, wide.dump()},
      {Kind::kJsonSchema, R"({"type":"array","minItems":100000000,"items":{"type":"string"}})"},
      {Kind::kJsonSchema, R"({"type":"array","minItems":10000,"items":{"type":"string"}})"},
      {Kind::kJsonSchema, R"({"type":"array","maxItems":10000,"items":{"type":"object"}})"},
      {Kind::kJsonSchema, R"({"type":"string","minLength":100000000})"},
      {Kind::kJsonSchema, R"({"$ref":"#"})"},
      {Kind::kLark, "start: a\na: a a | \"x\""},
  };
  for (const GrammarSpec& spec : cases) {
    const std::clock_t begin = std::clock();  // of the processor: other work does not count
    try {
      const auto walker = f.grammars.compile(spec);
      for (int i = 0; i < 5; ++i) {
        const auto mask = f.mask(*walker);
        int32_t id = 0;
        while (id < f.end && !Fixture::allows(mask, id)) ++id;
        if (id == f.end) break;
        walker->accept(id);
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kInvalidArgument) << error.what();
    }
    const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    EXPECT_LT(seconds, 1) << spec.text.substr(0, 100);
  }
}

}  // namespace
}  // namespace phalanx::text
