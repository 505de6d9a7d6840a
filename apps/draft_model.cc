#include "apps/draft_model.h"

#include <fmt/format.h>

#include <memory>
#include <optional>

#include "apps/file_digest.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {
namespace {

constexpr const char* kOther =
    "use a draft model of the same family with the same tokenizer, or speculation by prompt look-up "
    "(\"ngram\")";

// The first id that the two do not read alike, in words; nothing if there is none.
std::optional<std::pair<std::string, std::string>> first_difference(const text::Tokenizer& draft,
                                                                    const text::Tokenizer& target,
                                                                    int64_t vocab) {
  const auto name = [](const text::Tokenizer& tokenizer, int32_t id) {
    return tokenizer.has_id(id) ? fmt::format("\"{}\"", tokenizer.token_text(id))
                                : std::string("no token");
  };
  for (int64_t i = 0; i < vocab; ++i) {
    const auto id = static_cast<int32_t>(i);
    if (draft.has_id(id) == target.has_id(id) &&
        (!draft.has_id(id) || draft.token_bytes(id) == target.token_bytes(id)))
      continue;
    return std::pair(fmt::format("id {} is {}", id, name(draft, id)),
                     fmt::format("id {} is {}", id, name(target, id)));
  }
  return std::nullopt;
}

void check_tokenizers(const NodeConfig& config, int64_t vocab, Problems& problems) {
  const std::string& draft = config.plugins.draft_model;
  const std::string& target = config.model.weight_path;
  const std::string own = file_digest(draft + "/tokenizer.json");
  const std::string wanted = file_digest(target + "/tokenizer.json");
  if (own == wanted && own != "absent") return;
  Problem problem{.what = "the draft model has another tokenizer than the model",
                  .where = config.plugins.draft_where,
                  .found = fmt::format("{}/tokenizer.json: {}", draft, own),
                  .expected = fmt::format("the tokens of {}/tokenizer.json: {}", target, wanted),
                  .fix = kOther};
  if (own == "absent") problem.fix = "copy the tokenizer.json that the draft model was trained with";
  if (own != "absent" && wanted != "absent") {
    const auto differ =
        first_difference(*text::Tokenizer::load(draft), *text::Tokenizer::load(target), vocab);
    if (!differ) return;  // the files differ in what does not matter here
    problem.found += ", " + differ->first;
    problem.expected += ", " + differ->second;
  }
  problems.add(std::move(problem));
}

}  // namespace

void check_draft_model(const NodeConfig& config, const models::ModelInfo& target,
                       Problems& problems) {
  const std::string& folder = config.plugins.draft_model;
  try {
    const models::ModelInfo info = models::read_model_info(folder);
    models::check_checkpoint(folder);
    if (info.vocab_size != target.vocab_size) {
      problems.add({.what = "the draft model has another vocabulary than the model",
                    .where = config.plugins.draft_where,
                    .found = fmt::format("vocab_size {} in {}/config.json", info.vocab_size, folder),
                    .expected = fmt::format("vocab_size {}, as in {}/config.json", target.vocab_size,
                                            config.model.weight_path),
                    .fix = kOther});
      return;
    }
    check_tokenizers(config, target.vocab_size, problems);
  } catch (const std::exception& error) {
    problems.add({.what = fmt::format("the draft model cannot be used: {}", error.what()),
                  .where = config.plugins.draft_where});
  }
}

}  // namespace phalanx::apps
