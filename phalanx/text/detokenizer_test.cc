#include "phalanx/text/detokenizer.h"

#include <gtest/gtest.h>

#include <random>

#include "phalanx/text/testing_files.h"
#include "phalanx/text/utf8.h"

namespace phalanx::text {
namespace {

using Ids = std::vector<int32_t>;

bool is_utf8(std::string text) {
  const std::string original = text;
  return take_characters(text, false) == original && text.empty();
}

// All pieces joined; checks each piece.
std::string stream(const std::shared_ptr<const Tokenizer>& t, const Ids& ids, bool skip) {
  Detokenizer detokenizer(t, {.skip_special_tokens = skip});
  std::string joined;
  for (const int32_t id : ids) {
    const std::string piece = detokenizer.push(id);
    EXPECT_TRUE(is_utf8(piece));
    joined += piece;
  }
  const std::string last = detokenizer.flush();
  EXPECT_TRUE(is_utf8(last));
  return joined + last;
}

class DetokenizerOf : public testing::TestWithParam<const char*> {};

TEST_P(DetokenizerOf, StreamsTexts) {
  const auto t = Tokenizer::load(testdata(GetParam()));
  for (const std::string text : {"hello the world", "  two spaces  ", "中文字 mixed 中 é",
                                 "😀👨‍👩‍👧😀", "a\n\n b", "� real", ""}) {
    const Ids ids = t->encode(text, true);
    EXPECT_EQ(stream(t, ids, true), text);
    EXPECT_EQ(stream(t, ids, true), t->decode(ids, true));
    EXPECT_EQ(stream(t, ids, false), t->decode(ids, false));
  }
}

TEST_P(DetokenizerOf, RandomIdsEqualTheFullDecode) {
  const auto t = Tokenizer::load(testdata(GetParam()));
  std::mt19937 random(7);
  const auto vocab = static_cast<int32_t>(t->vocab_size());
  for (int round = 0; round < 1500; ++round) {
    Ids ids;
    const size_t length = random() % 40;
    // Bytes alone now and then, so that some form characters and most do not.
    const int32_t limit = round % 2 == 0 ? vocab + 2 : 259;
    while (ids.size() < length) {
      ids.push_back(static_cast<int32_t>(random() % limit) - 1);
      if (random() % 8 == 0)
        for (const int32_t id : t->encode("中😀", false)) ids.push_back(id);
    }
    for (const bool skip : {true, false})
      ASSERT_EQ(stream(t, ids, skip), t->decode(ids, skip)) << "round " << round;
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, DetokenizerOf, testing::Values("byte_level", "byte_fallback"));

TEST(Detokenizer, GivesCharactersAsSoonAsTheyAreWhole) {
  const auto t = Tokenizer::load(testdata("byte_level"));
  Detokenizer d(t);
  EXPECT_EQ(d.push(272), "");  // two bytes of three
  EXPECT_EQ(d.push(176), "中");
  EXPECT_EQ(d.push(100), "a");
  EXPECT_EQ(d.push(2), "");  // special
  EXPECT_EQ(d.push(272), "");
  EXPECT_EQ(d.flush(), "\xEF\xBF\xBD");
  EXPECT_EQ(d.flush(), "");
}

TEST(Detokenizer, FirstSpaceIsStrippedOnceOnly) {
  const auto t = Tokenizer::load(testdata("byte_fallback"));
  Detokenizer d(t);
  EXPECT_EQ(d.push(339), "world");
  EXPECT_EQ(d.push(339), " world");
  EXPECT_EQ(d.push(1), "");
  EXPECT_EQ(d.push(339), " world");
}

TEST(Detokenizer, ByteRunsAreGivenWhole) {
  const auto t = Tokenizer::load(testdata("byte_fallback"));
  Detokenizer d(t);
  for (const int32_t id : t->encode("a😀😀", false)) {
    const std::string piece = d.push(id);
    EXPECT_TRUE(piece.empty() || piece == "a") << piece;
  }
  EXPECT_EQ(d.push(339), "😀😀 world");
}

TEST(Utf8, TakesCharactersAndReplacesTheRest) {
  const auto whole = [](std::string bytes) { return take_characters(bytes, true); };
  EXPECT_EQ(whole("a\xC0\xAF z"), "a\uFFFD\uFFFD z");                // overlong
  EXPECT_EQ(whole("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");            // surrogate
  EXPECT_EQ(whole("\xF0\x9F\x98 x"), "\uFFFD x");                    // one maximal part
  EXPECT_EQ(whole("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");  // beyond U+10FFFF
  std::string pending = "ok\xF0\x9F";
  EXPECT_EQ(take_characters(pending, false), "ok");
  EXPECT_EQ(pending, "\xF0\x9F");
}

}  // namespace
}  // namespace phalanx::text
