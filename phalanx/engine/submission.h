#pragma once

#include <memory>
#include <string>

#include "phalanx/engine/engine_options.h"
#include "phalanx/engine/request.h"
#include "phalanx/engine/sequence.h"

namespace phalanx::engine {

// What a request is worth before the engine has been touched: a sequence ready for its queue, or
// why not, with the numbers.
struct Submission {
  SubmitResult result = SubmitResult::kAccepted;
  std::string detail;                  // with anything but kAccepted
  std::unique_ptr<Sequence> sequence;  // with kAccepted
};

// Pure but for the seed, which is drawn if the request has none.
[[nodiscard]] Submission make_sequence(GenerateRequest request, std::shared_ptr<EventSink> sink,
                                       const EngineOptions& options);

}  // namespace phalanx::engine
