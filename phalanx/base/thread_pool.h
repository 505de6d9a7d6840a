#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace phalanx {

// The compute threads of one rank. The caller is thread 0 of the pool; the others wait by spinning
// for a short while, then parked (no CPU time when idle).
class ThreadPool {
 public:
  struct Options {
    int threads = 1;                // including the caller, >= 1
    std::vector<int> cpus;          // one per thread to pin to; empty: not pinned
    int spin_us = 50;               // then park
  };
  explicit ThreadPool(const Options& options);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  [[nodiscard]] int size() const;

  // Calls body(thread) once on each thread, 0 on the caller, and returns when all have returned.
  // The first exception is rethrown on the caller. Not reentrant.
  template <typename Body>
  void run(Body&& body) {
    run_raw([](void* b, int thread) { (*static_cast<std::remove_reference_t<Body>*>(b))(thread); },
            &body);
  }
  // Calls body(i) for 0 <= i < count, handed out dynamically in pieces of `grain`. Which thread
  // runs which i never changes a result.
  template <typename Body>
  void for_each(int64_t count, int64_t grain, Body&& body) {
    for_each_raw(count, grain,
                 [](void* b, int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     (*static_cast<std::remove_reference_t<Body>*>(b))(i);
                 },
                 &body);
  }

  void run_raw(void (*body)(void*, int), void* context);
  void for_each_raw(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                    void* context);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx
