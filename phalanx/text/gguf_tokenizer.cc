#include "phalanx/text/gguf_tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "phalanx/base/error.h"
#include "phalanx/text/utf8.h"

namespace phalanx::text {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kUnknown = 2;
constexpr int64_t kControl = 3;
constexpr int64_t kUserDefined = 4;
constexpr size_t kMaxTokenBytes = 4096;

// The regular expressions of the models' own tokenizer.json files.
constexpr const char* kLlama3Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class WordRule { kGpt2, kDigitsAlone, kLlama3, kQwen2 };

// Names as llama.cpp's converter writes them.
struct NamedRule {
  std::string_view name;
  WordRule rule;
};
constexpr NamedRule kWordRules[] = {{"codeshell", WordRule::kDigitsAlone},
                                    {"deepseek-r1-qwen", WordRule::kQwen2},
                                    {"gpt-2", WordRule::kGpt2},
                                    {"gpt2", WordRule::kGpt2},
                                    {"llama-bpe", WordRule::kLlama3},
                                    {"llama-v3", WordRule::kLlama3},
                                    {"llama3", WordRule::kLlama3},
                                    {"olmo", WordRule::kGpt2},
                                    {"phi-2", WordRule::kGpt2},
                                    {"qwen2", WordRule::kQwen2},
                                    {"refact", WordRule::kDigitsAlone},
                                    {"smollm", WordRule::kDigitsAlone},
                                    {"starcoder", WordRule::kDigitsAlone}};

bool is_utf8(std::string text) {
  const std::string original = text;
  return take_characters(text, /*at_end=*/true) == original;
}

class Converter {
 public:
  Converter(const GgufVocabulary& vocabulary, const std::string& where)
      : in_(vocabulary), where_(where) {}

  std::string convert() {
    check();
    ordered_json out;
    out["version"] = "1.0";
    out["truncation"] = nullptr;
    out["padding"] = nullptr;
    out["added_tokens"] = added_tokens();
    if (in_.model == "gpt2")
      byte_level(out);
    else
      sentencepiece(out);
    return out.dump() + "\n";
  }

 private:
  [[noreturn]] void fail(const std::string& what, Code code = Code::kInvalidArgument) const {
    throw Error(code, fmt::format("{}: {}", where_, what));
  }

  void check() {
    if (in_.model != "gpt2" && in_.model != "llama")
      fail(
          fmt::format(
              "tokenizer.ggml.model: found \"{}\", expected \"gpt2\" (byte-level BPE) or \"llama\" "
              "(sentencepiece)",
              in_.model),
          Code::kUnimplemented);
    if (in_.tokens.empty()) fail("tokenizer.ggml.tokens: found none");
    if (in_.types.size() != in_.tokens.size())
      fail(fmt::format("tokenizer.ggml.token_type: found {} entries, expected {} as tokens",
                       in_.types.size(), in_.tokens.size()));
    for (size_t id = 0; id < in_.tokens.size(); ++id) {
      const std::string& token = in_.tokens[id];
      if (token.size() > kMaxTokenBytes)
        fail(fmt::format("token {} has {} bytes, expected at most {}", id, token.size(),
                         kMaxTokenBytes));
      if (!is_utf8(token)) fail(fmt::format("token {} is not UTF-8", id));
      if (!id_of_.emplace(token, static_cast<int64_t>(id)).second)
        fail(fmt::format("tokens {} and {} are the same text", id_of_[token], id));
    }
    for (const auto& [name, id] : {std::pair{"bos", in_.bos_id}, {"unknown", in_.unknown_id}})
      if (id && (*id < 0 || *id >= static_cast<int64_t>(in_.tokens.size())))
        fail(fmt::format("tokenizer.ggml.{}_token_id: found {}, expected 0 to {}", name, *id,
                         in_.tokens.size() - 1));
  }

  ordered_json added_tokens() const {
    ordered_json list = ordered_json::array();
    for (size_t id = 0; id < in_.tokens.size(); ++id) {
      const int64_t type = in_.types[id];
      const bool special = type == kControl || (type == kUnknown && in_.model == "llama");
      if (!special && type != kUserDefined) continue;
      list.push_back({{"id", id},
                      {"content", in_.tokens[id]},
                      {"single_word", false},
                      {"lstrip", false},
                      {"rstrip", false},
                      {"normalized", false},
                      {"special", special}});
    }
    return list;
  }

  // Puts the token that begins a sequence before every text.
  ordered_json begin_of_sequence(bool wanted) const {
    if (!wanted || !in_.bos_id) return nullptr;
    const std::string& bos = in_.tokens[static_cast<size_t>(*in_.bos_id)];
    const auto special = [&](int type) {
      return ordered_json{{"SpecialToken", {{"id", bos}, {"type_id", type}}}};
    };
    const auto sequence = [](const char* id, int type) {
      return ordered_json{{"Sequence", {{"id", id}, {"type_id", type}}}};
    };
    return {{"type", "TemplateProcessing"},
            {"single", {special(0), sequence("A", 0)}},
            {"pair", {special(0), sequence("A", 0), special(1), sequence("B", 1)}},
            {"special_tokens", {{bos, {{"id", bos}, {"ids", {*in_.bos_id}}, {"tokens", {bos}}}}}}};
  }

  ordered_json vocab() const {
    ordered_json map = ordered_json::object();
    auto& object = map.get_ref<ordered_json::object_t&>();
    object.reserve(in_.tokens.size());
    // Tokens are known to be different, so they are appended without a search.
    for (size_t id = 0; id < in_.tokens.size(); ++id)
      static_cast<ordered_json::object_t::Container&>(object).emplace_back(in_.tokens[id], id);
    return map;
  }

  WordRule word_rule() const {
    std::string known;
    for (const NamedRule& named : kWordRules) {
      if (named.name == in_.pre) return named.rule;
      known += fmt::format("{}{}", known.empty() ? "" : ", ", named.name);
    }
    fail(fmt::format(
             "tokenizer.ggml.pre: found \"{}\", expected one of {}. Fix: name the one that splits "
             "words alike with --pre-tokenizer",
             in_.pre, known),
         Code::kUnimplemented);
  }

  void byte_level(ordered_json& out) const {
    const WordRule rule = word_rule();
    const bool llama3 = rule == WordRule::kLlama3;
    out["normalizer"] = rule == WordRule::kQwen2 ? ordered_json{{"type", "NFC"}} : ordered_json();
    out["pre_tokenizer"] = pre_tokenizer(rule);
    out["post_processor"] = begin_of_sequence(in_.add_bos.value_or(llama3));
    out["decoder"] = {{"type", "ByteLevel"},
                      {"add_prefix_space", true},
                      {"trim_offsets", true},
                      {"use_regex", true}};
    ordered_json merges = ordered_json::array();
    for (size_t i = 0; i < in_.merges.size(); ++i) merges.push_back(split_merge(i));
    out["model"] = model(/*byte_fallback=*/false, nullptr, /*ignore_merges=*/llama3, merges);
  }

  static ordered_json pre_tokenizer(WordRule rule) {
    const auto bytes = [](bool use_regex) {
      return ordered_json{{"type", "ByteLevel"},
                          {"add_prefix_space", false},
                          {"trim_offsets", true},
                          {"use_regex", use_regex}};
    };
    const auto sequence = [](ordered_json first, ordered_json second) {
      return ordered_json{
          {"type", "Sequence"},
          {"pretokenizers", ordered_json::array({std::move(first), std::move(second)})}};
    };
    const auto split = [](const char* regex) {
      return ordered_json{{"type", "Split"},
                          {"pattern", {{"Regex", regex}}},
                          {"behavior", "Isolated"},
                          {"invert", false}};
    };
    switch (rule) {
      case WordRule::kGpt2:
        return bytes(true);
      case WordRule::kDigitsAlone:
        return sequence({{"type", "Digits"}, {"individual_digits", true}}, bytes(true));
      case WordRule::kLlama3:
        return sequence(split(kLlama3Split), bytes(false));
      case WordRule::kQwen2:
        return sequence(split(kQwen2Split), bytes(false));
    }
    return nullptr;
  }

  ordered_json split_merge(size_t index) const {
    const std::string& merge = in_.merges[index];
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos || space + 1 >= merge.size())
      fail(fmt::format(
          "tokenizer.ggml.merges[{}]: found \"{}\", expected two tokens with a space between",
          index, merge));
    const std::string left = merge.substr(0, space);
    const std::string right = merge.substr(space + 1);
    for (const std::string& part : {left, right, left + right})
      if (!id_of_.contains(part))
        fail(fmt::format("tokenizer.ggml.merges[{}]: \"{}\" is no token", index, part));
    return ordered_json::array({left, right});
  }

  ordered_json model(bool byte_fallback, ordered_json unknown, bool ignore_merges,
                     ordered_json merges) const {
    return {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", std::move(unknown)},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", byte_fallback},
            {"byte_fallback", byte_fallback},
            {"ignore_merges", ignore_merges},
            {"vocab", vocab()},
            {"merges", std::move(merges)}};
  }

  void sentencepiece(ordered_json& out) const {
    if (in_.scores.size() != in_.tokens.size())
      fail(fmt::format("tokenizer.ggml.scores: found {} entries, expected {} as tokens",
                       in_.scores.size(), in_.tokens.size()));
    for (size_t id = 0; id < in_.scores.size(); ++id)
      if (!std::isfinite(in_.scores[id]))
        fail(fmt::format("tokenizer.ggml.scores[{}]: found {}, expected a finite number", id,
                         in_.scores[id]));
    const bool prefix = in_.add_space_prefix.value_or(true);
    const ordered_json space_to_mark = {
        {"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
    ordered_json normalizers = ordered_json::array();
    if (prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
    normalizers.push_back(space_to_mark);
    out["normalizer"] = {{"type", "Sequence"}, {"normalizers", normalizers}};
    out["pre_tokenizer"] = nullptr;
    out["post_processor"] = begin_of_sequence(in_.add_bos.value_or(true));
    ordered_json decoders = ordered_json::array(
        {{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
         {{"type", "ByteFallback"}},
         {{"type", "Fuse"}}});
    if (prefix)
      decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    out["decoder"] = {{"type", "Sequence"}, {"decoders", decoders}};
    ordered_json unknown;
    if (in_.unknown_id) unknown = in_.tokens[static_cast<size_t>(*in_.unknown_id)];
    out["model"] =
        model(/*byte_fallback=*/true, unknown, /*ignore_merges=*/false, merges_from_scores());
  }

  // Sentencepiece joins the two neighbours whose whole has the best score. As BPE: every way to cut
  // a token into two tokens is a merge, ordered by score, then by the lengths of the parts (as
  // transformers' converter orders them).
  ordered_json merges_from_scores() const {
    struct Merge {
      double score;
      size_t left_length;  // in characters
      size_t right_length;
      int64_t left, right;
    };
    std::vector<Merge> merges;
    for (size_t id = 0; id < in_.tokens.size(); ++id) {
      const std::string_view token = in_.tokens[id];
      std::vector<size_t> cuts;  // byte offsets where characters begin
      for (size_t i = 1; i < token.size(); ++i)
        if ((static_cast<unsigned char>(token[i]) & 0xC0) != 0x80) cuts.push_back(i);
      const size_t first = merges.size();
      for (size_t i = 0; i < cuts.size(); ++i) {
        const auto left = id_of_.find(std::string(token.substr(0, cuts[i])));
        const auto right = id_of_.find(std::string(token.substr(cuts[i])));
        if (left == id_of_.end() || right == id_of_.end()) continue;
        merges.push_back({in_.scores[id], i + 1, cuts.size() - i, left->second, right->second});
      }
      std::sort(merges.begin() + static_cast<ptrdiff_t>(first), merges.end(),
                [](const Merge& a, const Merge& b) {
                  return std::pair(a.left, a.right) < std::pair(b.left, b.right);
                });
    }
    std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
      return std::tuple(a.score, a.left_length, a.right_length) >
             std::tuple(b.score, b.left_length, b.right_length);
    });
    ordered_json list = ordered_json::array();
    for (const Merge& merge : merges)
      list.push_back(ordered_json::array({in_.tokens[static_cast<size_t>(merge.left)],
                                          in_.tokens[static_cast<size_t>(merge.right)]}));
    return list;
  }

  const GgufVocabulary& in_;
  const std::string& where_;
  std::unordered_map<std::string, int64_t> id_of_;
};

}  // namespace

std::string tokenizer_json_from_gguf(const GgufVocabulary& vocabulary, const std::string& where) {
  return Converter(vocabulary, where).convert();
}

}  // namespace phalanx::text
