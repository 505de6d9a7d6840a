#include "phalanx/engine/rank_page.h"

#include <new>

#include "phalanx/base/sealed_memory.h"

namespace phalanx::engine {

namespace {
constexpr int64_t kPageBytes = 4096;
}

UniqueFd create_rank_page() { return create_sealed_memory("phalanx-rank-page", kPageBytes); }

RankPage* map_rank_page(int fd, SealedMapping& mapping) {
  mapping = SealedMapping(fd, kPageBytes, "rank page");
  // All-zero bytes are a RankPage with every counter at zero; constructing one here would wipe
  // what the other side has already counted.
  return std::launder(reinterpret_cast<RankPage*>(mapping.data()));
}

RankPage* map_rank_page(int fd) {
  SealedMapping mapping;
  RankPage* page = map_rank_page(fd, mapping);
  (void)mapping.release();
  return page;
}

}  // namespace phalanx::engine
