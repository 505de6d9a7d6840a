#include "phalanx/text/grammar.h"

#include <fmt/format.h>

#include "phalanx/base/error.h"
#include "phalanx/text/crate_call.h"
#include "phalanx/text/grammar_size.h"
#include "phalanx/text/large_stack.h"

namespace phalanx::text {
namespace {

// The crate follows references and expressions by recursion: a schema of that size can hold a chain of
// some 30,000 $ref.
constexpr size_t kMaxText = 1 << 20;
constexpr size_t kStack = size_t{1} << 30;

// The crate's message for a client.
std::string plain(std::string message) {
  if (const size_t at = message.find("\n<non-verbose/>"); at != std::string::npos) message.erase(at);
  return message == "NoExtensionBias" ? "no text satisfies it" : message;
}

class Walker final : public GrammarWalker {
 public:
  explicit Walker(PtxWalker* handle) : handle_(handle) {}
  ~Walker() override { ptx_walker_free(handle_); }
  Walker(const Walker&) = delete;
  Walker& operator=(const Walker&) = delete;

  void mask(std::span<uint32_t> out) override {
    PtxBytes error{};
    if (!ptx_walker_mask(handle_, out.data(), out.size(), &error))
      throw Error(Code::kInvalidArgument,
                  fmt::format("the grammar cannot be followed any further: {}", take(error)));
  }
  void accept(int32_t token) override {
    PtxBytes error{};
    if (!ptx_walker_accept(handle_, static_cast<uint32_t>(token), &error))
      throw Error(Code::kInvalidArgument,
                  fmt::format("the grammar does not allow token {}: {}", token, take(error)));
  }
  bool ended() const override { return ptx_walker_is_stopped(handle_); }
  std::unique_ptr<GrammarWalker> clone() const override {
    PtxWalker* copy = nullptr;
    PtxBytes error{};
    if (!ptx_walker_clone(handle_, &copy, &error))
      throw Error(Code::kInternal, fmt::format("cannot copy a grammar's state: {}", take(error)));
    return std::make_unique<Walker>(copy);
  }

 private:
  PtxWalker* handle_;
};

}  // namespace

const char* kind_name(GrammarSpec::Kind kind) {
  switch (kind) {
    case GrammarSpec::Kind::kJsonObject: return "json_object";
    case GrammarSpec::Kind::kJsonSchema: return "json_schema";
    case GrammarSpec::Kind::kRegex: return "regex";
    case GrammarSpec::Kind::kLark: return "lark";
    case GrammarSpec::Kind::kChoice: return "choice";
  }
  return "";
}

Grammars::Grammars(const Tokenizer& tokenizer, int64_t vocab, std::span<const int32_t> end_tokens) {
  const std::vector<uint32_t> ends(end_tokens.begin(), end_tokens.end());
  PtxBytes error{};
  if (!ptx_grammars_new(tokenizer.handle(), static_cast<uint32_t>(vocab), ends.data(), ends.size(),
                        &handle_, &error))
    throw Error(Code::kInvalidArgument,
                fmt::format("structured output is not possible with this checkpoint: {}", take(error)));
}

Grammars::~Grammars() { ptx_grammars_free(handle_); }

std::unique_ptr<GrammarWalker> Grammars::compile(const GrammarSpec& spec) const {
  if (spec.text.size() > kMaxText)
    throw Error(Code::kInvalidArgument,
                fmt::format("the {} cannot be used: found {} bytes, expected at most {}",
                            kind_name(spec.kind), spec.text.size(), kMaxText));
  PtxWalker* walker = nullptr;
  PtxBytes error{};
  bool compiled = false;
  on_large_stack(kStack, [&] {
    try {
      check_lexemes(spec);
    } catch (const Error& e) {
      throw Error(e.code(), fmt::format("the {} cannot be used: {}", kind_name(spec.kind), e.what()));
    }
    compiled = ptx_grammar_compile(handle_, lend(kind_name(spec.kind)), lend(spec.text), &walker, &error);
  });
  if (!compiled)
    throw Error(Code::kInvalidArgument,
                fmt::format("the {} cannot be used: {}", kind_name(spec.kind), plain(take(error))));
  return std::make_unique<Walker>(walker);
}

}  // namespace phalanx::text
