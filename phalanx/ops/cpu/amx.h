#pragma once

// The path `amx`: that of AVX-512 with bf16, but for products of bf16 weights (class amx) and of
// int8 weights with more than a few rows (the same sums as everywhere), which go by tiles. A product
// that accumulates begins at a k that is a multiple of a tile's: 32, of int8 64.

#include <string>
#include <string_view>

#include "phalanx/ops/cpu/integer_kernels.h"
#include "phalanx/ops/cpu/kernels.h"

namespace phalanx::ops::cpu {

// Why Isa::kAmx is not among available_isas(); "" where it is, kNoAmx where the machine has no AMX.
// Found out once: ask_for_tiles(), then tiles_agree().
inline constexpr std::string_view kNoAmx = "no AMX";
[[nodiscard]] const std::string& amx_refusal();

// Only where ask_for_tiles() gave "".
const Kernels& amx_kernels();
const IntegerKernels& amx_integer_kernels();

// Asks the system to let this process use tile registers. "": it does; else why not.
[[nodiscard]] std::string ask_for_tiles();

// Whether random products (rows, panels and k that do not fill tiles; numbers near the smallest
// normal one) are those of ops/ref, bit for bit.
[[nodiscard]] bool tiles_agree(void (*multiply_bf16)(const Product&),
                               void (*multiply_int8)(const Int8Product&));

}  // namespace phalanx::ops::cpu
