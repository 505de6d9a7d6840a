#include <immintrin.h>

#include "phalanx/ops/cpu/kernels.h"

#define PHALANX_PAIRS 1

namespace {
#include "phalanx/ops/cpu/vector_avx512.inl"

// bf16 weights times bf16 inputs, two k at a time, by vdpbf16ps.
struct WeightsPairs {
  using X = uint16_t;
  static constexpr int kStep = 2;
  static constexpr int64_t kBytes = 64;
};

#include "phalanx/ops/cpu/kernels.inl"
}  // namespace

const phalanx::ops::cpu::Kernels& phalanx::ops::cpu::avx512bf16_kernels() {
  static constinit Kernels kernels = make_kernels();
  return kernels;
}
