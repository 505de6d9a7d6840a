#pragma once

#include <cstdint>
#include <span>

namespace phalanx::comm {

// out[i] = ((sources[0][i] + sources[1][i]) + sources[2][i]) + ... `out` may be one of the sources.
void sum_in_order(float* out, std::span<const float* const> sources, int64_t count);

}  // namespace phalanx::comm
