#pragma once

#include <cstddef>
#include <functional>

namespace phalanx::text {

// Runs `work` on a thread of its own whose stack may grow to `bytes`, and waits for its end: for
// libraries that recurse as deep as what a client sent is nested. Memory is taken as it is touched and
// given back at the end. Rethrows what `work` throws; throws kResourceExhausted without such a thread.
void on_large_stack(size_t bytes, const std::function<void()>& work);

}  // namespace phalanx::text
