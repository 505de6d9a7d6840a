#include "phalanx/text/tokenizer.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>

#include "phalanx/base/error.h"
#include "phalanx/text/testing_files.h"

namespace phalanx::text {
namespace {

using Ids = std::vector<int32_t>;

TEST(Tokenizer, ByteLevelEncodesAsTheReference) {
  const auto t = Tokenizer::load(testdata("byte_level"));
  EXPECT_EQ(t->encode("hello the world 12", true), (Ids{262, 269, 267, 35, 52, 53}));
  EXPECT_EQ(t->encode("中文 é 😀", false),
            (Ids{272, 176, 233, 153, 138, 35, 198, 172, 35, 243, 162, 155, 131}));
  EXPECT_EQ(t->encode("<|im_start|>a<tool call>b", false), (Ids{1, 100, 273, 101}));
  EXPECT_EQ(t->vocab_size(), 274);
  EXPECT_TRUE(t->encode("", true).empty());
}

TEST(Tokenizer, ByteFallbackEncodesAsTheReference) {
  const auto t = Tokenizer::load(testdata("byte_fallback"));
  EXPECT_EQ(t->encode("hello the world 12", true), (Ids{1, 334, 330, 339, 259, 318, 319}));
  EXPECT_EQ(t->encode("hello the world 12", false), (Ids{334, 330, 339, 259, 318, 319}));
  EXPECT_EQ(t->encode("中文 é 😀", false),
            (Ids{259, 327, 233, 153, 138, 259, 198, 172, 259, 243, 162, 155, 131}));
}

TEST(Tokenizer, DecodesBack) {
  for (const char* name : {"byte_level", "byte_fallback"}) {
    const auto t = Tokenizer::load(testdata(name));
    for (const std::string text : {"hello the world 12", "中文 é 😀", "a\n\tb  c", "'s def f(x):"})
      EXPECT_EQ(t->decode(t->encode(text, true), true), text) << name;
  }
}

TEST(Tokenizer, FileTruncationIsIgnored) {
  const auto t = Tokenizer::load(testdata("byte_level"));  // its file says max_length 8
  EXPECT_EQ(t->encode(std::string(100, '.'), true).size(), 100u);
}

TEST(Tokenizer, SpecialTokens) {
  const auto t = Tokenizer::load(testdata("byte_level"));
  ASSERT_EQ(t->token_id("<|im_end|>"), 2);
  EXPECT_FALSE(t->token_id("<|no such|>").has_value());
  EXPECT_TRUE(t->is_special(2));
  EXPECT_FALSE(t->is_special(273));  // added, but not special
  EXPECT_FALSE(t->is_special(100));
  const Ids ids{1, 100, 2};
  EXPECT_EQ(t->decode(ids, true), "a");
  EXPECT_EQ(t->decode(ids, false), "<|im_start|>a<|im_end|>");
}

TEST(Tokenizer, IdsOutsideTheVocabularyYieldNothing) {
  const auto t = Tokenizer::load(testdata("byte_level"));
  EXPECT_EQ(t->decode(Ids{100, -1, 274, 2147483647, 101}, true), "ab");
  EXPECT_EQ(t->token_bytes(-1), "");
  EXPECT_FALSE(t->has_id(-1));
  EXPECT_TRUE(t->has_id(273));
}

TEST(Tokenizer, TokenBytesAndText) {
  const auto byte_level = Tokenizer::load(testdata("byte_level"));
  EXPECT_EQ(byte_level->token_bytes(267), " world");
  EXPECT_EQ(byte_level->token_bytes(272), "\xE4\xB8");
  EXPECT_EQ(byte_level->token_text(272), "\xEF\xBF\xBD");
  EXPECT_EQ(byte_level->token_text(273), "<tool call>");
  const auto fallback = Tokenizer::load(testdata("byte_fallback"));
  EXPECT_EQ(fallback->token_text(339), " world");
  EXPECT_EQ(fallback->token_bytes(233), "\xE6");
  EXPECT_EQ(fallback->token_text(1), "<s>");
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const auto t = Tokenizer::load(testdata("byte_level"));
  try {
    (void)t->encode("ab\xff", false);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kInvalidArgument);
    EXPECT_STREQ(e.what(), "cannot tokenize: text is not valid UTF-8 at byte 2");
  }
}

class TokenizerFiles : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "tokenizer_files";
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  std::string load_error(Code code) {
    try {
      (void)Tokenizer::load(dir_);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code);
      return e.what();
    }
    return "nothing was thrown";
  }
  std::string dir_;
};

TEST_F(TokenizerFiles, MissingFileIsNamed) {
  EXPECT_EQ(load_error(Code::kNotFound),
            dir_ + "/tokenizer.json: not found. Fix: copy tokenizer.json of the checkpoint there");
}

TEST_F(TokenizerFiles, SentencepieceFileAloneIsExplained) {
  std::ofstream(dir_ + "/tokenizer.model") << "x";
  const std::string message = load_error(Code::kNotFound);
  EXPECT_NE(message.find(dir_ + "/tokenizer.json: not found"), std::string::npos) << message;
  EXPECT_NE(message.find("has only tokenizer.model (sentencepiece)"), std::string::npos) << message;
  EXPECT_NE(message.find("save_pretrained"), std::string::npos) << message;
}

TEST_F(TokenizerFiles, BrokenFilesAreNamed) {
  const std::string deep(100'000, '[');
  for (const std::string& content :
       {std::string(), std::string("{"), std::string("{}"), std::string("[1]"), deep,
        std::string(R"({"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}})"),
        std::string("{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\",\"vocab\":{\"\xff\":0}}}")}) {
    std::ofstream(dir_ + "/tokenizer.json") << content;
    const std::string message = load_error(Code::kInvalidArgument);
    EXPECT_EQ(message.find(dir_ + "/tokenizer.json: not a tokenizer.json that can be read: "), 0u)
        << message;
  }
}

TEST(Tokenizer, SharedByThreads) {
  const auto t = Tokenizer::load(testdata("byte_level"));
  const Ids expected = t->encode("hello the world 中文 😀", false);
  std::vector<std::jthread> threads;
  std::atomic<int> wrong = 0;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int k = 0; k < 200; ++k)
        if (t->encode("hello the world 中文 😀", false) != expected ||
            t->decode(expected, true) != "hello the world 中文 😀")
          ++wrong;
    });
  threads.clear();
  EXPECT_EQ(wrong, 0);
}

TEST(Tokenizer, DemoModel) {
  if (demo_model().empty()) GTEST_SKIP() << "demo model not fetched (scripts/fetch_demo_model)";
  const auto t = Tokenizer::load(demo_model());
  EXPECT_EQ(t->vocab_size(), 49152);
  EXPECT_EQ(t->token_id("<|im_end|>"), 2);
  EXPECT_EQ(t->encode("in 2024", false).size(), 6u);  // digits stand alone
  for (const std::string text :
       {"What is the capital of France?", "法国的首都是哪里？", "😀👨‍👩‍👧 ok",
        "def f(x):\n    return x**2  # 1234\n"})
    EXPECT_EQ(t->decode(t->encode(text, true), true), text);
}

}  // namespace
}  // namespace phalanx::text
