#include "phalanx/engine/rank_page.h"

#include <new>

#include "phalanx/base/sealed_memory.h"

namespace phalanx::engine {

namespace {
constexpr int64_t kPageBytes = 4096;
}

UniqueFd create_rank_page() { return create_sealed_memory("phalanx-rank-page", kPageBytes); }

RankPage* map_rank_page(int fd) {
  // All-zero bytes are a RankPage with every counter at zero; constructing one here would wipe
  // what the other side has already counted.
  return std::launder(
      reinterpret_cast<RankPage*>(SealedMapping(fd, kPageBytes, "rank page").release()));
}

}  // namespace phalanx::engine
