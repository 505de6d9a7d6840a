#pragma once

#include <cstddef>
#include <cstdint>

#include "phalanx/ops/cpu/kernels.h"

namespace phalanx::ops::cpu {

// The keys of one unit (16 positions of `channels`, in panels as kv_layout.h says) as values: the
// same elements in the other order. channels: a multiple of 16. Needs AVX2.
void keys_as_values(KvType type, const std::byte* keys, int64_t channels, std::byte* values);

}  // namespace phalanx::ops::cpu
