#include "phalanx/text/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/text/testing_files.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::text {
namespace {

using Ids = std::vector<int32_t>;

// The vocabulary of a committed tokenizer.json, as a GGUF file would hold it.
GgufVocabulary vocabulary_of(const std::string& name, const std::string& model) {
  const auto json = read_json_file(testdata(name) + "/tokenizer.json");
  GgufVocabulary out{.model = model};
  const auto& vocab = json["model"]["vocab"];
  out.tokens.resize(vocab.size());
  for (const auto& [token, id] : vocab.items()) out.tokens[id.get<size_t>()] = token;
  out.types.assign(out.tokens.size(), 1);
  for (const auto& added : json["added_tokens"]) {
    const size_t id = added["id"];
    if (id >= out.tokens.size()) {
      out.tokens.push_back(added["content"]);
      out.types.push_back(1);
    }
    out.types[id] = added["special"] ? 3 : 4;
  }
  for (const auto& merge : json["model"]["merges"])
    out.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  return out;
}

std::string error_of(const GgufVocabulary& vocabulary, Code code = Code::kInvalidArgument) {
  try {
    (void)tokenizer_json_from_gguf(vocabulary, "x.gguf");
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    return e.what();
  }
  return "nothing was thrown";
}

TEST(GgufTokenizer, ByteLevelEncodesAsTheOriginal) {
  GgufVocabulary vocabulary = vocabulary_of("byte_level", "gpt2");
  vocabulary.pre = "smollm";
  const auto original = Tokenizer::load(testdata("byte_level"));
  const auto made = Tokenizer::from_json(tokenizer_json_from_gguf(vocabulary, "x.gguf"), "x");
  EXPECT_EQ(made->vocab_size(), original->vocab_size());
  for (const std::string text :
       {"hello the world 12", "中文 é 😀", "<|im_start|>a<tool call>b", " x\n\n"}) {
    EXPECT_EQ(made->encode(text, true), original->encode(text, true));
    EXPECT_EQ(made->decode(made->encode(text, true), true),
              original->decode(original->encode(text, true), true));
  }
  EXPECT_TRUE(made->is_special(1));
  EXPECT_FALSE(made->is_special(273));
}

TEST(GgufTokenizer, WordRulesDiffer) {
  GgufVocabulary vocabulary = vocabulary_of("byte_level", "gpt2");
  // "12" is one token where digits may stand together.
  vocabulary.tokens.push_back("12");
  vocabulary.types.push_back(1);
  vocabulary.merges.push_back("1 2");
  const auto ids = [&](const std::string& pre) {
    vocabulary.pre = pre;
    return Tokenizer::from_json(tokenizer_json_from_gguf(vocabulary, "x"), "x")
        ->encode("1212", false);
  };
  EXPECT_EQ(ids("smollm"), (Ids{52, 53, 52, 53}));
  EXPECT_EQ(ids("gpt-2"), (Ids{274, 274}));
  EXPECT_EQ(ids("llama-bpe"), (Ids{274, 52, 53}));  // at most three digits
  EXPECT_EQ(ids("qwen2"), (Ids{52, 53, 52, 53}));
}

TEST(GgufTokenizer, BeginOfSequence) {
  GgufVocabulary vocabulary = vocabulary_of("byte_level", "gpt2");
  vocabulary.pre = "smollm";
  vocabulary.bos_id = 1;
  const auto ids = [&] {
    return Tokenizer::from_json(tokenizer_json_from_gguf(vocabulary, "x"), "x")->encode("a", true);
  };
  EXPECT_EQ(ids(), (Ids{100}));
  vocabulary.add_bos = true;
  EXPECT_EQ(ids(), (Ids{1, 100}));
  vocabulary.add_bos.reset();
  vocabulary.pre = "llama-bpe";  // says so by default
  EXPECT_EQ(ids(), (Ids{1, 100}));
}

// Scores fall with the order of merges, as a sentencepiece BPE model has them.
GgufVocabulary sentencepiece() {
  GgufVocabulary vocabulary = vocabulary_of("byte_fallback", "llama");
  vocabulary.merges.clear();
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    vocabulary.scores.push_back(id < 259 ? 0 : -static_cast<double>(id));
    if (id >= 3 && id < 259) vocabulary.types[id] = 6;
  }
  vocabulary.types[0] = 2;
  vocabulary.bos_id = 1;
  vocabulary.unknown_id = 0;
  return vocabulary;
}

TEST(GgufTokenizer, SentencepieceEncodesAsTheOriginal) {
  const auto original = Tokenizer::load(testdata("byte_fallback"));
  const auto made = Tokenizer::from_json(tokenizer_json_from_gguf(sentencepiece(), "x"), "x");
  for (const std::string text :
       {"hello the world 12", "中文 é 😀", "  two  spaces", "</s>the<s>", ""}) {
    EXPECT_EQ(made->encode(text, true), original->encode(text, true)) << text;
    EXPECT_EQ(made->decode(made->encode(text, true), true),
              original->decode(original->encode(text, true), true));
  }
}

TEST(GgufTokenizer, SentencepieceWithoutPrefix) {
  GgufVocabulary vocabulary = sentencepiece();
  vocabulary.add_space_prefix = false;
  vocabulary.add_bos = false;
  const auto made = Tokenizer::from_json(tokenizer_json_from_gguf(vocabulary, "x"), "x");
  EXPECT_EQ(made->decode(made->encode(" hello", true), true), " hello");
  EXPECT_EQ(made->token_text(made->encode("hello", true).at(0)), "hello");
}

TEST(GgufTokenizer, WrongVocabulariesAreNamed) {
  GgufVocabulary good = vocabulary_of("byte_level", "gpt2");
  good.pre = "smollm";
  GgufVocabulary v = good;
  v.model = "bert";
  EXPECT_EQ(error_of(v, Code::kUnimplemented),
            "x.gguf: tokenizer.ggml.model: found \"bert\", expected \"gpt2\" (byte-level BPE) or "
            "\"llama\" "
            "(sentencepiece)");
  v = good;
  v.pre = "tekken";
  EXPECT_EQ(error_of(v, Code::kUnimplemented)
                .find("x.gguf: tokenizer.ggml.pre: found \"tekken\", expected one of "),
            0u);
  v = good;
  v.types.pop_back();
  EXPECT_EQ(error_of(v),
            "x.gguf: tokenizer.ggml.token_type: found 273 entries, expected 274 as tokens");
  v = good;
  v.tokens[5] = v.tokens[4];
  EXPECT_EQ(error_of(v), "x.gguf: tokens 4 and 5 are the same text");
  v = good;
  v.tokens[5] = "\xff";
  EXPECT_EQ(error_of(v), "x.gguf: token 5 is not UTF-8");
  v = good;
  v.merges[0] = "h";
  EXPECT_EQ(
      error_of(v),
      "x.gguf: tokenizer.ggml.merges[0]: found \"h\", expected two tokens with a space between");
  v.merges[0] = "h q";
  EXPECT_EQ(error_of(v), "x.gguf: tokenizer.ggml.merges[0]: \"hq\" is no token");
  v = good;
  v.bos_id = 274;
  EXPECT_EQ(error_of(v), "x.gguf: tokenizer.ggml.bos_token_id: found 274, expected 0 to 273");
  v = sentencepiece();
  v.scores.pop_back();
  EXPECT_NE(error_of(v).find("tokenizer.ggml.scores: found"), std::string::npos);
  v = sentencepiece();
  v.scores[7] = std::nan("");
  EXPECT_NE(error_of(v).find("tokenizer.ggml.scores[7]: found nan"), std::string::npos);
}

}  // namespace
}  // namespace phalanx::text
