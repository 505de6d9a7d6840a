#include "phalanx/comm/sum.h"

#include <cstring>

namespace phalanx::comm {

namespace {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline void load(Lanes* lanes, const float* from) { std::memcpy(lanes, from, sizeof *lanes); }

}  // namespace

void sum_in_order(float* out, std::span<const float* const> sources, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes sum;
    load(&sum, sources[0] + i);
    for (size_t s = 1; s < sources.size(); ++s) {
      Lanes term;
      load(&term, sources[s] + i);
      sum += term;
    }
    std::memcpy(out + i, &sum, sizeof sum);
  }
  for (; i < count; ++i) {
    float sum = sources[0][i];
    for (size_t s = 1; s < sources.size(); ++s) sum += sources[s][i];
    out[i] = sum;
  }
}

}  // namespace phalanx::comm
