#include "phalanx/engine/engine_options.h"

#include <fmt/format.h>

#include <algorithm>

#include "phalanx/base/error.h"

namespace phalanx::engine {

void check_options(const EngineOptions& o) {
  Problems problems;
  const auto at_least = [&](const char* name, int64_t value, int64_t least) {
    if (value >= least) return;
    problems.add({.what = fmt::format("{} is out of range", name),
                  .where = "engine options",
                  .found = fmt::format("{}", value),
                  .expected = fmt::format("at least {}", least)});
  };
  at_least("vocab_size", o.vocab_size, 1);
  at_least("block_size", o.block_size, 1);
  at_least("blocks", o.blocks, 1);
  at_least("max_sequence", o.max_sequence, 2);
  at_least("max_input_tokens", o.max_input_tokens, 1);
  at_least("max_prefill_tokens", o.max_prefill_tokens, 1);
  at_least("max_prefill_batch", o.max_prefill_batch, 1);
  at_least("max_batch", o.max_batch, 1);
  at_least("max_output_tokens", o.max_output_tokens, 1);
  at_least("max_step_tokens", o.max_step_tokens, std::max<int64_t>(1, o.max_batch));
  if (o.max_step_rows != 0) at_least("max_step_rows", o.max_step_rows, o.max_batch);
  at_least("draft_tokens", o.draft_tokens, o.draft_model ? 1 : 0);
  if (o.draft_tokens > kMostDraftTokens)
    problems.add({.what = "draft_tokens is out of range",
                  .where = "engine options",
                  .found = fmt::format("{}", o.draft_tokens),
                  .expected = fmt::format("at most {}", kMostDraftTokens)});
  at_least("draft_least", o.draft_least, 1);
  at_least("draft_most", o.draft_most, o.draft_least);
  at_least("max_adapters", o.max_adapters, 0);
  at_least("max_queue", o.max_queue, 1);
  if (o.blocks > 0 && o.block_size > 0 && o.blocks > INT32_MAX / o.block_size) {
    problems.add({.what = "the KV cache has more slots than a 32-bit slot number can name",
                  .where = "engine options",
                  .found = fmt::format("{} blocks of {}", o.blocks, o.block_size),
                  .expected = fmt::format("at most {} slots", INT32_MAX)});
  }
  problems.throw_if_any("the engine cannot start");
}

}  // namespace phalanx::engine
