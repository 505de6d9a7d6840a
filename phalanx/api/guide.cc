#include "phalanx/api/guide.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "phalanx/base/error.h"

namespace phalanx::api {
namespace {

// A walker with the mask of its place. advance() queues the work; whoever needs the mask first, a
// thread or the engine, does it.
class Place final : public std::enable_shared_from_this<Place> {
 public:
  Place(std::unique_ptr<text::GrammarWalker> walker, int64_t vocab)
      : walker_(std::move(walker)), mask_(static_cast<size_t>((vocab + 31) / 32)) {
    walker_->mask(mask_);
  }

  void advance(int32_t token, GuideThreads& threads) {
    {
      const std::lock_guard lock(mutex_);
      token_ = token;
      state_ = State::kQueued;
    }
    threads.post([self = shared_from_this()] { self->work(); });
  }

  std::span<const uint32_t> mask() {
    work();
    std::unique_lock lock(mutex_);
    // The work is bounded by the grammar's own limits.
    changed_.wait(lock, [this] { return state_ == State::kReady; });
    if (error_) throw Error(*error_);
    return mask_;
  }

 private:
  enum class State { kReady, kQueued, kRunning };

  void work() {
    {
      const std::lock_guard lock(mutex_);
      if (state_ != State::kQueued) return;
      state_ = State::kRunning;
    }
    std::optional<Error> error;
    try {
      walker_->accept(token_);
      walker_->mask(mask_);
    } catch (const Error& e) {
      error = e;
    } catch (const std::exception& e) {
      error = Error(Code::kInternal, e.what());
    }
    const std::lock_guard lock(mutex_);
    if (error) error_ = std::move(error);
    state_ = State::kReady;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  State state_ = State::kReady;
  std::unique_ptr<text::GrammarWalker> walker_;
  std::vector<uint32_t> mask_;
  int32_t token_ = -1;
  std::optional<Error> error_;
};

class Guide final : public engine::TokenGuide {
 public:
  Guide(GuideOptions options, std::unique_ptr<text::GrammarWalker> walker,
        std::shared_ptr<GuideThreads> threads)
      : options_(std::move(options)), threads_(std::move(threads)), reasoning_(options_.reasoning) {
    if (walker) place_ = std::make_shared<Place>(std::move(walker), options_.vocab_size);
    if (options_.reasoning_end.empty()) reasoning_ = false;
  }

  std::span<const uint32_t> allowed() override {
    if (!reasoning_) return place_ ? place_->mask() : std::span<const uint32_t>();
    if (options_.reasoning_budget < 0 || reasoned_ < options_.reasoning_budget) return {};
    only_.assign(static_cast<size_t>((options_.vocab_size + 31) / 32), 0);
    const auto id = static_cast<size_t>(options_.reasoning_end[matched_]);
    only_[id / 32] |= uint32_t{1} << (id % 32);
    return only_;
  }

  void accept(int32_t token) override {
    if (!reasoning_) {
      if (place_) place_->advance(token, *threads_);
      return;
    }
    ++reasoned_;
    const auto& end = options_.reasoning_end;
    if (token != end[matched_]) matched_ = 0;
    if (token == end[matched_]) ++matched_;
    if (matched_ == end.size()) reasoning_ = false;
  }

 private:
  const GuideOptions options_;
  std::shared_ptr<GuideThreads> threads_;
  std::shared_ptr<Place> place_;
  bool reasoning_;
  int64_t reasoned_ = 0;
  size_t matched_ = 0;  // ids of the end seen so far
  std::vector<uint32_t> only_;
};

}  // namespace

GuideThreads::GuideThreads(int threads) {
  for (int i = 0; i < threads; ++i)
    threads_.emplace_back([this](const std::stop_token& stop) { run(stop); });
}

GuideThreads::~GuideThreads() {
  for (auto& thread : threads_) thread.request_stop();
  changed_.notify_all();
}

void GuideThreads::post(std::function<void()> work) {
  {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
  }
  changed_.notify_one();
}

void GuideThreads::run(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [this] { return !work_.empty(); })) {
    auto work = std::move(work_.front());
    work_.pop_front();
    lock.unlock();
    work();
    work = nullptr;
    lock.lock();
  }
}

std::shared_ptr<engine::TokenGuide> make_guide(GuideOptions options,
                                               std::unique_ptr<text::GrammarWalker> walker,
                                               std::shared_ptr<GuideThreads> threads) {
  return std::make_shared<Guide>(std::move(options), std::move(walker), std::move(threads));
}

}  // namespace phalanx::api
