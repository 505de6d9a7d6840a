#pragma once

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/api/core.h"
#include "phalanx/api/request_journal.h"
#include "phalanx/api/testing_client.h"

// An engine that follows a script, a text side in which every byte is a token, and both served.
namespace phalanx::api::testing {

inline constexpr int32_t kEos = 256;
inline constexpr int32_t kVocab = 300;

class ByteText final : public TextPort {
 public:
  explicit ByteText(bool chat_template = true) : template_(chat_template) {}
  std::vector<int32_t> encode(std::string_view text, bool) const override {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string decode(std::span<const int32_t> ids, bool) const override {
    std::string out;
    for (const int32_t id : ids) out += token_bytes(id);
    return out;
  }
  std::string token_text(int32_t id) const override {
    return id < 128 ? token_bytes(id) : id == kEos ? "</s>" : "\xEF\xBF\xBD";
  }
  std::string token_bytes(int32_t id) const override {
    return id < 256 ? std::string(1, static_cast<char>(id)) : "</s>";
  }
  std::unique_ptr<TokenStream> open(bool skip_special) const override {
    return std::make_unique<Stream>(skip_special);
  }
  bool has_chat_template() const override { return template_; }
  std::string render_chat(const ChatText& chat) const override {
    return chat.messages + chat.tools + chat.kwargs + chat.source;
  }
  // Allows the bytes of the spec's text, one after the other, then the end token.
  std::unique_ptr<text::GrammarWalker> compile(const text::GrammarSpec& spec) const override {
    if (spec.text.find("impossible") != std::string::npos)
      throw Error(Code::kInvalidArgument, "the grammar is impossible");
    return std::make_unique<Walker>(spec.text);
  }

 private:
  // Holds back the bytes of an unfinished character.
  class Stream final : public TokenStream {
   public:
    explicit Stream(bool skip_special) : skip_(skip_special) {}
    std::string push(int32_t id) override {
      if (id >= 256) return skip_ ? "" : "</s>";
      held_ += static_cast<char>(id);
      const auto first = static_cast<unsigned char>(held_[0]);
      const size_t need = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
      return held_.size() < need ? "" : std::exchange(held_, {});
    }
    std::string flush() override { return std::exchange(held_, {}); }

   private:
    bool skip_;
    std::string held_;
  };
  class Walker final : public text::GrammarWalker {
   public:
    explicit Walker(std::string text) : text_(std::move(text)) {}
    void mask(std::span<uint32_t> out) override {
      std::fill(out.begin(), out.end(), 0u);
      const size_t id = at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : kEos;
      out[id / 32] |= 1u << (id % 32);
    }
    void accept(int32_t) override { ++at_; }
    bool ended() const override { return at_ >= text_.size(); }
    std::unique_ptr<text::GrammarWalker> clone() const override {
      return std::make_unique<Walker>(*this);
    }

   private:
    std::string text_;
    size_t at_ = 0;
  };
  bool template_;
};

// Answers every request with `script`, one byte per step, then the end token; past the script of a
// request that does not stop, with dots.
class ScriptEngine final : public EnginePort {
 public:
  ScriptEngine() : thread_([this](const std::stop_token& stop) { run(stop); }) {}
  ~ScriptEngine() override {
    thread_.request_stop();
    changed_.notify_all();
    thread_.join();
  }

  std::string script = "Hello.";
  std::chrono::microseconds step{200};
  std::atomic<bool> hold{false};  // accepts, answers nothing
  std::atomic<engine::SubmitResult> result{engine::SubmitResult::kAccepted};
  std::string detail;

  engine::SubmitResult submit(engine::GenerateRequest request,
                              std::shared_ptr<engine::EventSink> sink, std::string* why) override {
    const std::lock_guard lock(mutex_);
    *why = detail;
    if (result != engine::SubmitResult::kAccepted) return result;
    ++stats_.received;
    ++stats_.running;
    requests.push_back(request);
    const std::string id = request.id;
    running_.emplace(id, Running{std::move(request), std::move(sink), 0});
    changed_.notify_all();
    return engine::SubmitResult::kAccepted;
  }
  void cancel(const std::string& id) override {
    std::shared_ptr<engine::EventSink> sink;
    {
      const std::lock_guard lock(mutex_);
      const auto it = running_.find(id);
      if (it == running_.end()) return;
      sink = std::move(it->second.sink);
      running_.erase(it);
      --stats_.running;
      ++stats_.cancelled;
    }
    sink->on_event({.finish = engine::FinishReason::kCancelled});
  }
  engine::EngineStats stats() const override {
    const std::lock_guard lock(mutex_);
    return stats_;
  }
  int64_t max_queue() const override { return 10; }
  // Gives `steps_to_trace` when as many were asked for.
  bool begin_trace(int64_t steps) override {
    const std::lock_guard lock(mutex_);
    if (trace_wanted_ > 0) return false;
    trace_wanted_ = steps;
    return true;
  }
  std::optional<std::vector<engine::StepTrace>> take_trace(bool now) override {
    const std::lock_guard lock(mutex_);
    if (!now && std::ssize(steps_to_trace) < trace_wanted_) return std::nullopt;
    trace_wanted_ = 0;
    return steps_to_trace;
  }
  // Adapters are a list; a path with "bad" in it cannot be loaded.
  void load_adapter(const std::string& name, const std::string& path,
                    std::function<void(const std::optional<Error>&)> done) override {
    if (path.find("bad") != std::string::npos)
      return done(Error(Code::kInvalidArgument, "rank 1: tensor missing"));
    {
      const std::lock_guard lock(mutex_);
      if (std::any_of(adapters_.begin(), adapters_.end(), [&](const auto& a) { return a.name == name; }))
        throw Error(Code::kAlreadyExists, "the LoRA adapter '" + name + "' is loaded already");
      adapters_.push_back({name, path});
    }
    done(std::nullopt);
  }
  void unload_adapter(const std::string& name) override {
    const std::lock_guard lock(mutex_);
    if (std::erase_if(adapters_, [&](const auto& a) { return a.name == name; }) == 0)
      throw Error(Code::kNotFound, "the LoRA adapter '" + name + "' is not loaded");
  }
  std::vector<engine::AdapterTable::Named> adapters() const override {
    const std::lock_guard lock(mutex_);
    return adapters_;
  }
  void set_waiting(int64_t waiting) {
    const std::lock_guard lock(mutex_);
    stats_.waiting = waiting;
  }
  // Ends everything as a broken group does.
  void fail(const Error& error) {
    std::map<std::string, Running> all;
    {
      const std::lock_guard lock(mutex_);
      all.swap(running_);
      stats_.running = 0;
    }
    for (auto& [id, running] : all)
      running.sink->on_event({.finish = engine::FinishReason::kError, .error = error});
  }
  // Waits until `running` requests are left.
  bool wait_running(int64_t running) {
    const Deadline deadline = Deadline::in_seconds(60);
    while (!deadline.passed()) {
      if (stats().running == running) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }

  std::vector<engine::GenerateRequest> requests;  // as submitted; read when idle
  std::vector<engine::StepTrace> steps_to_trace;

 private:
  std::vector<engine::AdapterTable::Named> adapters_;
  struct Running {
    engine::GenerateRequest request;
    std::shared_ptr<engine::EventSink> sink;
    int32_t given = 0;
  };

  void run(const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      std::vector<std::pair<std::shared_ptr<engine::EventSink>, engine::GenerateEvent>> events;
      {
        std::unique_lock lock(mutex_);
        changed_.wait_for(lock, std::chrono::milliseconds(20), [&] {
          return stop.stop_requested() || (!hold && !running_.empty());
        });
        if (!hold) {
          for (auto it = running_.begin(); it != running_.end();) {
            auto event = next(it->second);
            events.emplace_back(it->second.sink, event);
            const bool ended = event.finish != engine::FinishReason::kNone;
            if (ended) --stats_.running;
            it = ended ? running_.erase(it) : std::next(it);
          }
        }
      }
      for (auto& [sink, event] : events) sink->on_event(std::move(event));
      if (!events.empty()) std::this_thread::sleep_for(step);
    }
  }

  engine::GenerateEvent next(Running& running) {
    const auto& sampling = running.request.sampling;
    engine::GenerateEvent event;
    const auto at = static_cast<size_t>(running.given);
    event.token = at < script.size() ? static_cast<unsigned char>(script[at]) : '.';
    const auto& stops = sampling.stop_token_ids;
    const auto stops_at = [&](int32_t id) { return std::find(stops.begin(), stops.end(), id) != stops.end(); };
    if (at == script.size() && stops_at(kEos)) event.token = kEos;
    ++running.given;
    event.prompt_tokens = static_cast<int32_t>(running.request.prompt.size());
    event.output_tokens = running.given;
    if (sampling.logprobs >= 0) event.logprob = -0.5f;
    for (int i = 0; i < sampling.logprobs; ++i)
      event.top.push_back({i == 0 ? event.token : 'a' + i, -0.5f * static_cast<float>(i + 1)});
    if (stops_at(event.token)) {
      event.finish = engine::FinishReason::kStop;
      event.stop_token = event.token;
    } else if (running.given >= sampling.max_tokens) {
      event.finish = engine::FinishReason::kLength;
    }
    return event;
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Running> running_;
  int64_t trace_wanted_ = 0;
  engine::EngineStats stats_{.blocks_total = 100, .blocks_free = 100};
  std::jthread thread_;
};

// A served instance on a free port of 127.0.0.1, all planes on one listener.
struct Instance {
  explicit Instance(ServiceOptions service = default_options(), ServerOptions http = {},
                    bool chat_template = true, RequestJournal* journal = nullptr)
      : text(std::make_shared<ByteText>(chat_template)), server(listening(std::move(http))) {
    core = std::make_shared<Core>(
        std::move(service), std::shared_ptr<EnginePort>(std::shared_ptr<void>(), &engine), text,
        [this] {
          const std::lock_guard lock(mutex);
          return health;
        },
        [] { return std::string("{\"ranks\":2}"); }, [this] { stops.fetch_add(1); }, true);
    if (journal != nullptr) journal->mount(server);
    mount_all(core, server);
    server.start();
    if (journal != nullptr) journal->answer_what_was_left();
    port = server.ports()[0];
  }
  ~Instance() {
    server.stop(Deadline::in_seconds(1));
    core->shut_down();
  }
  static ServiceOptions default_options() {
    ServiceOptions options;
    options.model_name = "demo";
    options.model_path = "/data/models/demo";
    options.model_dtype = "bfloat16";
    options.vocab_size = kVocab;
    options.defaults.eos_token_ids = {kEos};
    return options;
  }
  static ServerOptions listening(ServerOptions http) {
    http.listeners = {{"127.0.0.1", 0, kBusiness | kManagement | kMetrics}};
    http.work_threads = 2;
    return http;
  }
  void set_health(InstanceHealth value) {
    const std::lock_guard lock(mutex);
    health = std::move(value);
  }

  std::mutex mutex;
  InstanceHealth health{.state = InstanceState::kServing, .lost = {}, .reason = {}};
  std::atomic<int> stops{0};
  ScriptEngine engine;
  std::shared_ptr<ByteText> text;
  Server server;
  std::shared_ptr<Core> core;
  uint16_t port = 0;
};

}  // namespace phalanx::api::testing
