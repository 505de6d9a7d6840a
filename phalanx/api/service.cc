#include "phalanx/api/service.h"

#include <cstdlib>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string_view>

#include "phalanx/api/core.h"
#include "phalanx/text/chat_template.h"
#include "phalanx/text/detokenizer.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::api {
namespace {

// The engine until detach(); then one that takes nothing, for handlers that are still running.
class RealEngine final : public EnginePort {
 public:
  explicit RealEngine(engine::Engine& engine) : engine_(&engine) {}
  void detach() {
    const std::unique_lock lock(mutex_);
    engine_ = nullptr;
  }
  engine::SubmitResult submit(engine::GenerateRequest request,
                              std::shared_ptr<engine::EventSink> sink, std::string* detail) override {
    const std::shared_lock lock(mutex_);
    return engine_ != nullptr ? engine_->submit(std::move(request), std::move(sink), detail)
                              : engine::SubmitResult::kStopped;
  }
  void cancel(const std::string& id) override {
    const std::shared_lock lock(mutex_);
    if (engine_ != nullptr) engine_->cancel(id);
  }
  engine::EngineStats stats() const override {
    const std::shared_lock lock(mutex_);
    return engine_ != nullptr ? engine_->stats() : engine::EngineStats{};
  }
  int64_t max_queue() const override {
    const std::shared_lock lock(mutex_);
    return engine_ != nullptr ? engine_->options().max_queue : 0;
  }
  bool begin_trace(int64_t steps) override {
    const std::shared_lock lock(mutex_);
    return engine_ != nullptr && engine_->begin_trace(steps);
  }
  std::optional<std::vector<engine::StepTrace>> take_trace(bool now) override {
    const std::shared_lock lock(mutex_);
    return engine_ != nullptr ? engine_->take_trace(now) : std::nullopt;
  }
  void load_adapter(const std::string& name, const std::string& path,
                    std::function<void(const std::optional<Error>&)> done) override {
    const std::shared_lock lock(mutex_);
    require_engine();
    engine_->load_adapter(name, path, std::move(done));
  }
  void unload_adapter(const std::string& name) override {
    const std::shared_lock lock(mutex_);
    require_engine();
    engine_->unload_adapter(name);
  }
  std::vector<engine::AdapterTable::Named> adapters() const override {
    const std::shared_lock lock(mutex_);
    return engine_ != nullptr ? engine_->adapters() : std::vector<engine::AdapterTable::Named>{};
  }

 private:
  void require_engine() const {
    if (engine_ == nullptr) throw Error(Code::kUnavailable, "The service has been stopped");
  }

  mutable std::shared_mutex mutex_;
  engine::Engine* engine_;
};

class RealStream final : public TokenStream {
 public:
  RealStream(std::shared_ptr<const text::Tokenizer> tokenizer, bool skip_special)
      : detokenizer_(std::move(tokenizer), {.skip_special_tokens = skip_special}) {}
  std::string push(int32_t id) override { return detokenizer_.push(id); }
  std::string flush() override { return detokenizer_.flush(); }

 private:
  text::Detokenizer detokenizer_;
};

class RealText final : public TextPort {
 public:
  RealText(std::shared_ptr<const text::Tokenizer> tokenizer,
           std::shared_ptr<const text::ChatTemplate> chat_template, int64_t vocab,
           std::span<const int32_t> end_tokens)
      : tokenizer_(std::move(tokenizer)), template_(std::move(chat_template)) {
    try {
      grammars_ = std::make_unique<text::Grammars>(*tokenizer_, vocab, end_tokens);
    } catch (const Error& error) {
      no_grammars_ = error.what();
    }
  }
  std::vector<int32_t> encode(std::string_view text, bool add_special) const override {
    return tokenizer_->encode(text, add_special);
  }
  std::string decode(std::span<const int32_t> ids, bool skip_special) const override {
    return tokenizer_->decode(ids, skip_special);
  }
  std::string token_text(int32_t id) const override { return tokenizer_->token_text(id); }
  std::string token_bytes(int32_t id) const override { return tokenizer_->token_bytes(id); }
  std::unique_ptr<TokenStream> open(bool skip_special) const override {
    return std::make_unique<RealStream>(tokenizer_, skip_special);
  }
  bool has_chat_template() const override { return template_ && !template_->empty(); }
  std::string render_chat(const ChatText& chat) const override {
    const std::shared_ptr<const text::ChatTemplate> own =
        chat.source.empty() ? nullptr : template_->with_source(chat.source, "chat_template of the request");
    return (own ? *own : *template_).render({.messages_json = chat.messages,
                              .tools_json = chat.tools,
                              .documents_json = {},
                              .add_generation_prompt = true,
                              .extra_json = chat.kwargs,
                              .now = std::nullopt});
  }
  std::unique_ptr<text::GrammarWalker> compile(const text::GrammarSpec& spec) const override {
    if (!grammars_) throw Error(Code::kInvalidArgument, no_grammars_);
    return grammars_->compile(spec);
  }

 private:
  std::shared_ptr<const text::Tokenizer> tokenizer_;
  std::shared_ptr<const text::ChatTemplate> template_;
  std::unique_ptr<const text::Grammars> grammars_;
  std::string no_grammars_;  // why there are none
};

bool monitor_wanted() {
  const char* value = std::getenv("MIES_SERVICE_MONITOR_MODE");
  return value != nullptr && std::string_view(value) == "1";
}

}  // namespace

struct Service::State {
  std::shared_ptr<RealEngine> engine;
  std::shared_ptr<Core> core;
};

Service::Service(ServiceOptions options, engine::Engine& engine,
                 std::shared_ptr<const text::Tokenizer> tokenizer,
                 std::shared_ptr<const text::ChatTemplate> chat_template,
                 std::function<InstanceHealth()> health, std::function<std::string()> status_json,
                 std::function<void()> stop)
    : state_(new State{std::make_shared<RealEngine>(engine), nullptr}) {
  auto text = std::make_shared<RealText>(std::move(tokenizer), std::move(chat_template),
                                         options.vocab_size, options.defaults.eos_token_ids);
  state_->core = std::make_shared<Core>(
      std::move(options), state_->engine, std::move(text), std::move(health),
      std::move(status_json), std::move(stop), monitor_wanted());
}

Service::~Service() {
  state_->core->shut_down();
  state_->engine->detach();
}

void Service::mount(Server& server) { mount_all(state_->core, server); }

}  // namespace phalanx::api
