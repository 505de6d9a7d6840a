#include "phalanx/text/tokenizer.h"

#include <fmt/format.h>

#include <filesystem>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/text/crate_call.h"
#include "phalanx/text/utf8.h"

namespace phalanx::text {
namespace {

constexpr int64_t kMaxFileBytes = 500 << 20;

}  // namespace

std::shared_ptr<const Tokenizer> Tokenizer::load(const std::string& model_dir) {
  const std::filesystem::path dir(model_dir);
  const std::string path = (dir / "tokenizer.json").string();
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) {
    if (std::filesystem::exists(dir / "tokenizer.model", ignored))
      throw Error(
          Code::kNotFound,
          fmt::format("{}: not found; {} has only tokenizer.model (sentencepiece), expected "
                      "tokenizer.json. Fix: write it once with transformers: "
                      "AutoTokenizer.from_pretrained(\"{}\").save_pretrained(\"{}\")",
                      path, model_dir, model_dir, model_dir));
    throw Error(
        Code::kNotFound,
        fmt::format("{}: not found. Fix: copy tokenizer.json of the checkpoint there", path));
  }
  return from_json(read_text_file(path, kMaxFileBytes), path);
}

std::shared_ptr<const Tokenizer> Tokenizer::from_json(std::string_view json,
                                                      std::string_view where) {
  PtxTokenizer* handle = nullptr;
  PtxBytes error{};
  if (!ptx_tokenizer_load(lend(json), &handle, &error))
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: not a tokenizer.json that can be read: {}", where, take(error)));
  return std::shared_ptr<const Tokenizer>(new Tokenizer(handle));
}

Tokenizer::~Tokenizer() { ptx_tokenizer_free(handle_); }

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  PtxIds ids{};
  PtxBytes error{};
  if (!ptx_tokenizer_encode(handle_, lend(text), add_special_tokens, &ids, &error))
    throw Error(Code::kInvalidArgument, fmt::format("cannot tokenize: {}", take(error)));
  std::vector<int32_t> out(ids.data, ids.data + ids.size);
  ptx_ids_free(ids);
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  PtxBytes out{};
  PtxBytes error{};
  // Negative ids become numbers beyond any vocabulary.
  if (!ptx_tokenizer_decode(handle_, reinterpret_cast<const uint32_t*>(ids.data()), ids.size(),
                            skip_special_tokens, &out, &error))
    throw Error(Code::kInternal, fmt::format("cannot decode token ids: {}", take(error)));
  return take(out);
}

std::string Tokenizer::token_bytes(int32_t id) const {
  PtxBytes out{};
  PtxBytes error{};
  if (!ptx_tokenizer_token_bytes(handle_, static_cast<uint32_t>(id), &out, &error))
    throw Error(Code::kInternal, fmt::format("cannot decode token {}: {}", id, take(error)));
  return take(out);
}

std::string Tokenizer::token_text(int32_t id) const {
  std::string bytes = token_bytes(id);
  return take_characters(bytes, /*at_end=*/true);
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(ptx_tokenizer_vocab_size(handle_));
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  const int64_t id = ptx_tokenizer_token_id(handle_, lend(token));
  if (id < 0) return std::nullopt;
  return static_cast<int32_t>(id);
}

bool Tokenizer::is_special(int32_t id) const {
  return ptx_tokenizer_is_special(handle_, static_cast<uint32_t>(id));
}

bool Tokenizer::has_id(int32_t id) const {
  return ptx_tokenizer_has_id(handle_, static_cast<uint32_t>(id));
}

bool Tokenizer::is_byte_level() const { return ptx_tokenizer_is_byte_level(handle_); }

bool Tokenizer::is_byte_fallback(int32_t id) const {
  return ptx_tokenizer_is_byte_fallback(handle_, static_cast<uint32_t>(id));
}

}  // namespace phalanx::text
