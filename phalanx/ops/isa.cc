#include "phalanx/ops/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "phalanx/base/error.h"
#include "phalanx/ops/cpu/amx.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace phalanx::ops {
namespace {

constexpr Isa kAll[] = {Isa::kRef, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

constexpr bool bit(uint32_t word, int n) { return (word >> n & 1u) != 0; }

// Which register states the operating system saves on a switch.
uint64_t saved_states() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool machine_has(Isa isa) {
  const uint64_t saved = saved_states();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = (saved & 0xe6) == 0xe6;
  const Registers one = cpuid(1, 0);
  const Registers seven = cpuid(7, 0);
  const Registers seven_one = seven.eax >= 1 ? cpuid(7, 1) : Registers{};
  const bool avx2 = ymm && bit(one.ecx, 28) && bit(one.ecx, 12) && bit(one.ecx, 29) &&
                    bit(seven.ebx, 5);  // AVX, FMA, F16C, AVX2
  const bool avx512 = avx2 && zmm && bit(seven.ebx, 16) && bit(seven.ebx, 17) &&
                      bit(seven.ebx, 30) && bit(seven.ebx, 31);  // F, DQ, BW, VL
  switch (isa) {
    case Isa::kRef:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && bit(seven_one.eax, 5);
    case Isa::kAmx:
      return cpu::amx_refusal().empty();
  }
  return false;
}

// Tiles of the size that the kernels are written for, with products of bf16 and of int8, and an
// operating system that saves them.
bool has_amx() {
  const uint32_t features = cpuid(7, 0).edx;
  const Registers palette = cpuid(0x1d, 1);
  return (saved_states() & 0x60000) == 0x60000 && bit(features, 22) && bit(features, 24) &&
         bit(features, 25) && (palette.ebx & 0xffff) == 64 && palette.ebx >> 16 >= 8 &&
         (palette.ecx & 0xffff) == 16;
}

std::string find_amx_refusal() {
  if (!has_amx()) return std::string(cpu::kNoAmx);
  if (!machine_has(Isa::kAvx512Bf16) || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("avx512vnni"))
    return "no AVX-512 with bf16, VNNI and VBMI beside it";
  if (std::string refusal = cpu::ask_for_tiles(); !refusal.empty()) return refusal;
  if (!cpu::tiles_agree(cpu::amx_kernels().multiply_bf16, cpu::amx_integer_kernels().multiply_int8))
    return "its products are not those of the reference";
  return "";
}

#else

std::string find_amx_refusal() { return std::string(cpu::kNoAmx); }
bool machine_has(Isa isa) { return isa == Isa::kRef; }

#endif

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kRef:
      return "ref";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "?";
}

std::string_view numeric_class_name(NumericClass c) {
  switch (c) {
    case NumericClass::kFma32:
      return "fma32";
    case NumericClass::kBf16Dp:
      return "bf16dp";
    case NumericClass::kAmx:
      return "amx";
  }
  return "?";
}

NumericClass numeric_class_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return NumericClass::kBf16Dp;
    case Isa::kAmx:
      return NumericClass::kAmx;
    default:
      return NumericClass::kFma32;
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (const Isa isa : kAll)
    if (machine_has(isa)) found.push_back(isa);
  return found;
}

Isa best_isa_of(NumericClass c) {
  const std::vector<Isa> available = available_isas();
  for (auto it = available.rbegin(); it != available.rend(); ++it)
    if (numeric_class_of(*it) == c) return *it;
  throw Error(Code::kInvalidArgument,
              "this machine or this build has no kernels of the numeric class " +
                  std::string(numeric_class_name(c)));
}

const std::string& cpu::amx_refusal() {
  static const std::string refusal = find_amx_refusal();
  return refusal;
}

std::string isa_note(Isa used) {
  if (used == Isa::kAmx || cpu::amx_refusal() == cpu::kNoAmx) return {};
  return ", AMX present, not used: " +
         (cpu::amx_refusal().empty() ? "PHALANX_CPU_ISA=amx asks for it" : cpu::amx_refusal());
}

Isa default_isa() {
  std::vector<Isa> available = available_isas();
  std::erase(available, Isa::kAmx);
  return available.back();
}

Isa choose_isa() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("PHALANX_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return default_isa();
  std::string names;
  for (const Isa isa : available) {
    if (isa_name(isa) == wanted) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  const bool known = std::any_of(std::begin(kAll), std::end(kAll),
                                 [&](Isa isa) { return isa_name(isa) == wanted; });
  throw Error(
      Code::kInvalidArgument,
      to_string(Problem{
          .what = known ? "kernels that this machine or this build lacks" : "unknown kernel path",
          .where = "environment variable PHALANX_CPU_ISA",
          .found = "\"" + std::string(wanted) + "\"" +
                   (wanted == isa_name(Isa::kAmx) ? " (" + cpu::amx_refusal() + ")" : ""),
          .expected = "one of " + names,
          .fix = "unset it to use \"" + std::string(isa_name(default_isa())) +
                 "\", the best one here"}));
}

}  // namespace phalanx::ops
