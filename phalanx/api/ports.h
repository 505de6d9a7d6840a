#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/http_server.h"
#include "phalanx/engine/engine.h"
#include "phalanx/text/grammar.h"

// What this room asks of the rooms below it, narrow enough to be played by a test.
namespace phalanx::api {

class EnginePort {
 public:
  virtual ~EnginePort() = default;
  [[nodiscard]] virtual engine::SubmitResult submit(engine::GenerateRequest request,
                                                    std::shared_ptr<engine::EventSink> sink,
                                                    std::string* detail) = 0;
  virtual void cancel(const std::string& id) = 0;
  [[nodiscard]] virtual engine::EngineStats stats() const = 0;
  [[nodiscard]] virtual int64_t max_queue() const = 0;
  // As the engine's.
  [[nodiscard]] virtual bool begin_trace(int64_t steps) = 0;
  [[nodiscard]] virtual std::optional<std::vector<engine::StepTrace>> take_trace(bool now) = 0;
  virtual void load_adapter(const std::string& name, const std::string& path,
                            std::function<void(const std::optional<Error>&)> done) = 0;
  virtual void unload_adapter(const std::string& name) = 0;
  [[nodiscard]] virtual std::vector<engine::AdapterTable::Named> adapters() const = 0;
};

// Ids to text as they come: pieces are whole characters.
class TokenStream {
 public:
  virtual ~TokenStream() = default;
  [[nodiscard]] virtual std::string push(int32_t id) = 0;
  [[nodiscard]] virtual std::string flush() = 0;
};

struct ChatText {
  std::string messages;  // JSON array
  std::string tools;     // JSON array, or empty
  std::string kwargs;    // JSON object, or empty
  std::string source;    // a template instead of the model's own, or empty
};

// Const methods from any thread.
class TextPort {
 public:
  virtual ~TextPort() = default;
  [[nodiscard]] virtual std::vector<int32_t> encode(std::string_view text, bool add_special) const = 0;
  [[nodiscard]] virtual std::string decode(std::span<const int32_t> ids, bool skip_special) const = 0;
  [[nodiscard]] virtual std::string token_text(int32_t id) const = 0;
  [[nodiscard]] virtual std::string token_bytes(int32_t id) const = 0;
  [[nodiscard]] virtual std::unique_ptr<TokenStream> open(bool skip_special) const = 0;
  [[nodiscard]] virtual bool has_chat_template() const = 0;
  // Throws Error(kInvalidArgument) with what the template says.
  [[nodiscard]] virtual std::string render_chat(const ChatText& chat) const = 0;
  // Throws Error(kInvalidArgument) with what is wrong with the grammar.
  [[nodiscard]] virtual std::unique_ptr<text::GrammarWalker> compile(
      const text::GrammarSpec& spec) const = 0;
};

// The server's work threads, for as long as there is a server.
class WorkQueue {
 public:
  void open(Server* server) {
    const std::unique_lock lock(mutex_);
    server_ = server;
  }
  void close() { open(nullptr); }
  void post(std::function<void()> work) {
    const std::shared_lock lock(mutex_);
    if (server_ != nullptr) server_->post_work(std::move(work));
  }

 private:
  std::shared_mutex mutex_;
  Server* server_ = nullptr;
};

}  // namespace phalanx::api
