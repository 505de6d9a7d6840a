#include "phalanx/text/detokenizer.h"

#include <span>
#include <utility>

#include "phalanx/text/utf8.h"

namespace phalanx::text {
namespace {

// A text that ends in U+FFFD may change with the next id where a decoder joins bytes unknown to us.
constexpr size_t kMaxHeld = 64;

}  // namespace

Detokenizer::Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, DetokenizerOptions options)
    : tokenizer_(std::move(tokenizer)),
      options_(options),
      byte_level_(tokenizer_->is_byte_level()) {}

std::string Detokenizer::push(int32_t id) {
  // Dropped here, so that the context always has text.
  if (options_.skip_special_tokens && tokenizer_->is_special(id)) return {};
  if (byte_level_) {
    pending_ += tokenizer_->token_bytes(id);
    return take_characters(pending_, /*at_end=*/false);
  }
  if (!tokenizer_->has_id(id)) return {};
  ids_.push_back(id);
  // A run of bytes is text only if all of it is, so it waits for its end.
  if (tokenizer_->is_byte_fallback(id)) return {};
  return take_window(/*at_end=*/false);
}

std::string Detokenizer::flush() {
  if (byte_level_) return take_characters(pending_, /*at_end=*/true);
  std::string text = take_window(/*at_end=*/true);
  ids_.clear();
  read_ = 0;
  return text;
}

std::string Detokenizer::take_window(bool at_end) {
  const std::span<const int32_t> all(ids_);
  const std::string before = tokenizer_->decode(all.first(read_), options_.skip_special_tokens);
  const std::string now = tokenizer_->decode(all, options_.skip_special_tokens);
  if (now.size() <= before.size()) return {};
  if (!at_end && now.ends_with(kReplacement) && ids_.size() - read_ <= kMaxHeld) return {};
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<ptrdiff_t>(read_));
  read_ = ids_.size();
  return now.substr(before.size());
}

}  // namespace phalanx::text
