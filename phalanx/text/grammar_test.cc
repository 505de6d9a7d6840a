#include "phalanx/text/grammar.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>

#include "phalanx/base/clock.h"
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
      {{Kind::kJsonSchema, R"({"allOf":[{"$ref":"#"}]})"}, "json_schema cannot be used: no text satisfies it"},
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
// Followed by recursion in the crate: on an ordinary stack each of them ended the process.
TEST(Grammars, ChainsOfAnyLengthEndTheRequestAlone) {
  const Fixture f;
  const auto chain = [](const std::string& before, const std::string& after) {
    std::string text = R"({"$ref":"#/$defs/d0","$defs":{)";
    for (int i = 0; i < 20'000; ++i)
      text += fmt::format(R"("d{}":{}{{"$ref":"#/$defs/d{}"}}{},)", i, before, i + 1, after);
    return text + R"("d20000":{"type":"string"}}})";
  };
  for (const auto& [before, after] : {std::pair("", ""), std::pair(R"({"allOf":[)", "]}"),
                                      std::pair(R"({"anyOf":[)", R"(,{"type":"null"}]})")}) {
    const auto start = Clock::now();
    try {
      (void)f.grammars.compile({.kind = Kind::kJsonSchema, .text = chain(before, after)});
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::kInvalidArgument);
      EXPECT_NE(std::string(e.what()).find("json_schema cannot be used"), std::string::npos) << e.what();
    }
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(20)) << before;
  }
  try {
    (void)f.grammars.compile({.kind = Kind::kRegex, .text = std::string(2'000'000, 'a')});
    ADD_FAILURE() << "compiled";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "the regex cannot be used: found 2000000 bytes, expected at most 1048576");
  }
}

TEST(Grammars, RepetitionsOfOneLexemeAreBounded) {
  const Fixture f;
  const auto times = [](int count, const std::string& part) {
    std::string text;
    for (int i = 0; i < count; ++i) text += part;
    return text;
  };
  // Each line doubles: 2^30 repetitions in 31 lines.
  std::string doubling = "start: A30\nA0: \"a\"?\n";
  for (int i = 0; i < 30; ++i) doubling += fmt::format("A{}.2 : A{} A{}\n", i + 1, i, i);
  const std::pair<GrammarSpec, const char*> cases[] = {
      {{Kind::kRegex, times(5000, "a?")}, "the regex cannot be used: expression: more than 4000 repetitions"},
      {{Kind::kJsonSchema, R"({"type":"string","pattern":")" + times(5000, "(ab)*") + "\"}"},
       "pattern: more than 4000 repetitions"},
      {{Kind::kLark, "start: /" + times(5000, "a{0,1}") + "/"}, "expression: more than 4000 repetitions"},
      {{Kind::kLark, "start: A\nA: " + times(5000, "\"b\"? ")}, "terminal A: more than 4000 repetitions"},
      {{Kind::kLark, doubling}, "more than 4000 repetitions"},
      {{Kind::kLark, "start: B22\nB0: \"abcdefgh\"\n" + [] {
          std::string lines;
          for (int i = 0; i < 22; ++i) lines += fmt::format("B{}: B{} B{}\n", i + 1, i, i);
          return lines;
        }()},
       "longer than 1048576 bytes"},
  };
  const auto start = Clock::now();
  for (const auto& [spec, part] : cases) {
    try {
      (void)f.grammars.compile(spec);
      ADD_FAILURE() << part;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(10));
  // Many in rules, not in one lexeme; strings and comments hold none.
  const GrammarSpec rules{Kind::kLark, "// ????\nstart: \"?\" x\nx: " + times(50, "\"b\"? ") + "| A\nA: /c\\?+/\n"};
  EXPECT_TRUE(f.accepts(rules, "?bbb"));
  EXPECT_TRUE(f.accepts(rules, "?c??"));
}

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
