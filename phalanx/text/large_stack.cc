#include "phalanx/text/large_stack.h"

#include <fmt/format.h>
#include <pthread.h>

#include <cstring>
#include <exception>

#include "phalanx/base/error.h"

namespace phalanx::text {
namespace {

struct Work {
  const std::function<void()>& body;
  std::exception_ptr thrown = nullptr;
};

void* run(void* argument) {
  auto& work = *static_cast<Work*>(argument);
  try {
    work.body();
  } catch (...) {
    work.thrown = std::current_exception();
  }
  return nullptr;
}

}  // namespace

void on_large_stack(size_t bytes, const std::function<void()>& work) {
  Work shared{work};
  pthread_attr_t attributes;
  pthread_t thread{};
  int failed = pthread_attr_init(&attributes);
  if (failed == 0) {
    failed = pthread_attr_setstacksize(&attributes, bytes);
    if (failed == 0) failed = pthread_create(&thread, &attributes, run, &shared);
    (void)pthread_attr_destroy(&attributes);
  }
  if (failed != 0)
    throw Error(Code::kResourceExhausted,
                fmt::format("no thread with a stack of {} MB: {}", bytes >> 20, std::strerror(failed)));
  (void)pthread_join(thread, nullptr);
  if (shared.thrown) std::rethrow_exception(shared.thrown);
}

}  // namespace phalanx::text
