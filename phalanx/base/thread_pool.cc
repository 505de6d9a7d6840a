#include "phalanx/base/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

#include "phalanx/base/check.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"

namespace phalanx {
namespace {

// A word on which one side waits for a change: spins, then sleeps in the kernel. Sequentially
// consistent, so that either the waiter sees the new value or the writer sees the sleeper.
class alignas(64) WaitWord {
 public:
  [[nodiscard]] uint32_t load() const { return word_.load(std::memory_order_acquire); }
  void store_and_wake(uint32_t value) {
    word_.store(value, std::memory_order_seq_cst);
    wake();
  }
  // Returns the value after the subtraction; wakes sleepers when it is zero.
  void subtract_one_and_wake_at_zero() {
    if (word_.fetch_sub(1, std::memory_order_seq_cst) == 1) wake();
  }
  void store_quietly(uint32_t value) { word_.store(value, std::memory_order_release); }

  template <typename Ready>
  void wait(int64_t spin_ns, Ready ready) {
    if (ready(load())) return;
    const int64_t until = now_ns() + spin_ns;
    do {
      for (int i = 0; i < 16; ++i) {
        if (ready(load())) return;
        pause();
      }
    } while (now_ns() < until);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    for (uint32_t v; !ready(v = word_.load(std::memory_order_seq_cst));) {
      syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, v, nullptr, nullptr, 0);
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  void wake() {
    if (sleepers_.load(std::memory_order_seq_cst) != 0)
      syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  std::atomic<uint32_t> word_{0};
  std::atomic<uint32_t> sleepers_{0};
};
static_assert(sizeof(std::atomic<uint32_t>) == 4);

void set_control_word() {
#if defined(__x86_64__)
  _mm_setcsr(0x1f80);  // round to nearest, no flushing of denormals, exceptions masked
#endif
}

void pin(pthread_t thread, int cpu) {
  if (cpu < 0 || cpu >= CPU_SETSIZE)
    throw Error(Code::kInvalidArgument,
                "thread pool: cpu number " + std::to_string(cpu) + " is out of range");
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  if (const int e = pthread_setaffinity_np(thread, sizeof set, &set); e != 0)
    throw Error(Code::kInvalidArgument, "thread pool: cannot pin a thread to cpu " +
                                            std::to_string(cpu) + ": " + std::strerror(e) +
                                            " (not in this process's cpu set?)");
}

}  // namespace

struct ThreadPool::State {
  int64_t spin_ns = 0;
  WaitWord generation;  // rises with every run
  WaitWord pending;     // workers that have not finished this run
  // Written by the caller before `generation`, read by workers after it.
  void (*body)(void*, int) = nullptr;
  void* context = nullptr;
  bool stop = false;
  bool running = false;  // caller's thread only

  std::mutex mutex;
  std::exception_ptr failure;  // guarded by mutex

  alignas(64) std::atomic<int64_t> next{0};  // of for_each

  std::vector<std::thread> workers;

  void call(int thread) {
    try {
      body(context, thread);
    } catch (...) {
      std::scoped_lock lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  }

  void work(int thread) {
    set_control_word();
    for (uint32_t seen = 0;; ++seen) {
      generation.wait(spin_ns, [&](uint32_t g) { return g != seen; });
      if (stop) return;
      call(thread);
      pending.subtract_one_and_wake_at_zero();
    }
  }

  void start(void (*b)(void*, int), void* c) {
    body = b;
    context = c;
    pending.store_quietly(static_cast<uint32_t>(workers.size()));
    generation.store_and_wake(generation.load() + 1);
  }

  void end() {
    stop = true;
    generation.store_and_wake(generation.load() + 1);
    for (std::thread& w : workers) w.join();
  }
};

ThreadPool::ThreadPool(const Options& options) : state_(std::make_unique<State>()) {
  if (options.threads < 1)
    throw Error(Code::kInvalidArgument, "thread pool: found " + std::to_string(options.threads) +
                                            " threads, expected at least 1");
  if (!options.cpus.empty() && options.cpus.size() != static_cast<size_t>(options.threads))
    throw Error(Code::kInvalidArgument,
                "thread pool: found " + std::to_string(options.cpus.size()) + " cpus for " +
                    std::to_string(options.threads) + " threads, expected one for each or none");
  state_->spin_ns = std::max(0, options.spin_us) * int64_t{1000};
  set_control_word();
  try {
    for (int t = 1; t < options.threads; ++t) {
      state_->workers.emplace_back([s = state_.get(), t] { s->work(t); });
      if (!options.cpus.empty())
        pin(state_->workers.back().native_handle(), options.cpus[static_cast<size_t>(t)]);
    }
    if (!options.cpus.empty()) pin(pthread_self(), options.cpus[0]);
  } catch (...) {
    state_->end();
    throw;
  }
}

ThreadPool::~ThreadPool() { state_->end(); }

int ThreadPool::size() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::run_raw(void (*body)(void*, int), void* context) {
  State& s = *state_;
  PHALANX_CHECK(!s.running);
  if (s.workers.empty()) {
    s.running = true;
    struct Reset {
      bool& running;
      ~Reset() { running = false; }
    } reset{s.running};
    body(context, 0);
    return;
  }
  s.running = true;
  s.start(body, context);
  s.call(0);
  s.pending.wait(s.spin_ns, [](uint32_t left) { return left == 0; });
  s.running = false;
  std::exception_ptr failure;
  {
    std::scoped_lock lock(s.mutex);
    std::swap(failure, s.failure);
  }
  if (failure) std::rethrow_exception(failure);
}

void ThreadPool::for_each_raw(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                              void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (size() == 1 || count <= grain) {
    body(context, 0, count);
    return;
  }
  std::atomic<int64_t>& next = state_->next;
  next.store(0, std::memory_order_relaxed);
  auto take = [&](int) {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, std::min(begin + grain, count));
    }
  };
  run(take);
}

}  // namespace phalanx
