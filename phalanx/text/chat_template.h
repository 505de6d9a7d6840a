#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

struct PtxTemplate;

namespace phalanx::text {

// One conversation to be written as a prompt. The JSON texts keep their order of keys.
struct ChatInput {
  std::string messages_json;   // array of {role, content, ...}, as in OpenAI's request
  std::string tools_json;      // array; empty: none
  std::string documents_json;  // array; empty: none
  bool add_generation_prompt = true;
  std::string extra_json;      // object of further variables (chat_template_kwargs); may be empty
  std::optional<int64_t> now;  // seconds since 1970 for strftime_now; default: the clock
};

// The chat template of a checkpoint, with the meaning of transformers' apply_chat_template:
// trim_blocks and lstrip_blocks, Python's methods on texts, dicts and lists, tojson as json.dumps,
// raise_exception, strftime_now, loop controls. Immutable; any number of threads may use one
// object.
class ChatTemplate {
 public:
  // The template is `override_file` if not empty, else chat_template.jinja, chat_template.json or
  // "chat_template" of tokenizer_config.json (a text, or a list of {name, template}, of which
  // "tool_use" serves requests with tools and "default" the others). Special tokens come from
  // tokenizer_config.json and special_tokens_map.json. A checkpoint without a template gives an
  // empty object. Throws kNotFound for a missing override, kInvalidArgument for what cannot be read
  // or compiled; the message names the file.
  [[nodiscard]] static std::shared_ptr<const ChatTemplate> load(
      const std::string& model_dir, const std::string& override_file = "");
  // `special_tokens`: bos_token, eos_token, ... and their texts.
  [[nodiscard]] static std::shared_ptr<const ChatTemplate> from_source(
      const std::string& source, const std::map<std::string, std::string>& special_tokens,
      const std::string& where);
  // Another template, which a client sent, with this one's special tokens; at most kMaxClientTemplate
  // bytes. It is compiled and rendered on a stack large enough for any nesting of that size and of what
  // it can build within its bound of work. Throws kInvalidArgument, kResourceExhausted.
  static constexpr size_t kMaxClientTemplate = 256 << 10;
  [[nodiscard]] std::shared_ptr<const ChatTemplate> with_source(const std::string& source,
                                                                const std::string& where) const;
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  [[nodiscard]] bool empty() const { return default_ == nullptr && tool_use_ == nullptr; }

  // The prompt; encode it with add_special_tokens = false. Throws kFailedPrecondition when empty()
  // and kInvalidArgument for what the template raises, for input that is not JSON, and for a
  // template that does not end within a bound of work or memory (about 100 MB).
  [[nodiscard]] std::string render(const ChatInput& input) const;

 private:
  ChatTemplate() = default;
  [[nodiscard]] std::string render_here(const ChatInput& input) const;

  PtxTemplate* default_ = nullptr;
  PtxTemplate* tool_use_ = nullptr;
  std::map<std::string, std::string> special_tokens_;  // name to JSON text
  std::string where_;
  bool from_client_ = false;
};

}  // namespace phalanx::text
