#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace phalanx::ops {

// Kernel paths, weakest first. kRef is the portable reference; it shares the numeric class of
// kAvx2 and kAvx512 (fma32) and gives their bits.
enum class Isa { kRef, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// What fixes the bits of a product (design.md, "Numbers"): all ranks of an instance must agree.
enum class NumericClass { kFma32, kBf16Dp, kAmx };

[[nodiscard]] std::string_view isa_name(Isa isa);  // "ref", "avx2", "avx512", "avx512bf16", "amx"
[[nodiscard]] std::string_view numeric_class_name(NumericClass c);
[[nodiscard]] NumericClass numeric_class_of(Isa isa);
// The best path of this machine that belongs to a class.
[[nodiscard]] Isa best_isa_of(NumericClass c);

// Paths this machine can run (and this build has), weakest first.
[[nodiscard]] std::vector<Isa> available_isas();

// The best of available_isas() but for kAmx, which nobody has measured on hardware: it has to be named.
[[nodiscard]] Isa default_isa();

// default_isa(), or the one named by PHALANX_CPU_ISA. Throws Error(kInvalidArgument) naming the choices
// when the machine lacks it.
[[nodiscard]] Isa choose_isa();

// To follow the name of the path in use: ", AMX present, not used: " and why, or "".
[[nodiscard]] std::string isa_note(Isa used);

// Rises whenever the bits of any kernel change; must agree between nodes.
inline constexpr int kNumericsVersion = 4;

}  // namespace phalanx::ops
