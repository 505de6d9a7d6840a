// Quantised weights on AVX-512 with VNNI.

#include <immintrin.h>

#include "phalanx/ops/cpu/integer_kernels.h"

namespace {

#include "phalanx/ops/cpu/integer_loops.inl"

#include "phalanx/ops/cpu/integer_avx512.inl"

}  // namespace

const phalanx::ops::cpu::IntegerKernels& phalanx::ops::cpu::avx512_integer_kernels() {
  static constexpr IntegerKernels kernels{.multiply_int8 = multiply_int8,
                                          .quantise = quantise,
                                          .finish_int8 = finish_int8,
                                          .expand = expand,
                                          .sum_groups = sum_groups,
                                          .apply = apply,
                                          .peak = peak};
  return kernels;
}
