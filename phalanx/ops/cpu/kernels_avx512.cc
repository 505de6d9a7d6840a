#include <immintrin.h>

#include "phalanx/ops/cpu/kernels.h"

namespace {
#include "phalanx/ops/cpu/vector_avx512.inl"
//
#include "phalanx/ops/cpu/kernels.inl"
}  // namespace

const phalanx::ops::cpu::Kernels& phalanx::ops::cpu::avx512_kernels() {
  static constinit Kernels kernels = make_kernels();
  return kernels;
}
