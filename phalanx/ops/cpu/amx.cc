#include "phalanx/ops/cpu/amx.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <vector>

#include "phalanx/base/check.h"
#include "phalanx/ops/cpu/amx_tiles.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"
#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops::cpu {
namespace {

// The tile registers. Written as assembly: the compiler's intrinsics take literal numbers only, and
// GCC's do not tell it that they touch memory.
struct HardwareTiles {
  void configure(int64_t first, int64_t second) {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes[16] = {};  // of a row
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    const auto set = [&](int tile, int64_t rows) {
      config.rows[tile] = static_cast<uint8_t>(rows);
      config.bytes[tile] = rows > 0 ? kTileLine : 0;
    };
    for (const int tile : {0, 1, 4}) set(tile, first);
    for (const int tile : {2, 3}) set(tile, second > 0 ? second : first);
    set(5, second);
    for (const int tile : {6, 7}) set(tile, kTileLines);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  // Idle threads have no tiles that the system would have to save.
  void release() { __asm__ volatile("tilerelease"); }
  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const std::byte* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(std::byte* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  void bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  void signed_unsigned() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

// Rows from which tiles are worth their configuration; below, weights pass by once at the speed of
// memory.
constexpr int64_t kFewRows = kTileRows;

void multiply_int8(const Int8Product& a) {
  if (a.rows <= kFewRows)
    avx512bf16_integer_kernels().multiply_int8(a);
  else
    multiply_int8_tiles<HardwareTiles>(a);
}

// Operations of `steps` steps of four independent products of whole tiles.
template <bool kBf16>
int64_t peak_of_tiles(int64_t steps) {
  HardwareTiles tiles;
  tiles.configure(kTileLines, kTileLines);
  for (int64_t s = 0; s < steps; ++s)
    for_constants<4>([&]<int kC>() {
      if constexpr (kBf16)
        tiles.bf16<kC, 4 + kC / 2, 6 + kC % 2>();
      else
        tiles.signed_unsigned<kC, 4 + kC / 2, 6 + kC % 2>();
    });
  tiles.release();
  return steps * 4 * 16 * 16 * (kBf16 ? 64 : 128);
}

int64_t peak(int64_t steps, bool pairs) {
  return pairs ? peak_of_tiles<true>(steps) : avx512bf16_kernels().peak(steps, false);
}

constexpr int64_t kRows = 19;
constexpr int64_t kPanels = 3;
constexpr int64_t kOutputs = kPanels * 16;

// A tenth of them far smaller than the others.
std::vector<uint16_t> random_bf16(std::mt19937& random, int64_t count, uint32_t least_exponent) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  for (uint16_t& v : values) {
    const auto exponent = random() % 10 == 0 ? random() % 4 : least_exponent + random() % 24;
    v = static_cast<uint16_t>((random() % 2) << 15 | exponent << 7 | random() % 128);
  }
  return values;
}

bool bf16_agrees(void (*multiply)(const Product&), uint32_t x_exponent, uint32_t w_exponent) {
  constexpr int64_t kK = 101;
  std::mt19937 random(w_exponent);
  const std::vector<uint16_t> x = random_bf16(random, kRows * kK, x_exponent);
  std::vector<uint16_t> w = random_bf16(random, kOutputs * (kK + 1), w_exponent);
  for (int64_t n = 0; n < kOutputs; ++n)  // the odd k's partner
    w[static_cast<size_t>(n / 16 * 16 * (kK + 1) + panel_index(n % 16, kK, DType::kBF16))] = 0;
  const PackedLinear packed{.data = reinterpret_cast<const std::byte*>(w.data()),
                            .rows = kOutputs, .k = kK};
  alignas(64) float found[kRows * kOutputs];
  alignas(64) float expected[kRows * kOutputs];
  ref::linear({const_cast<uint16_t*>(x.data()), DType::kBF16, kRows, kK, kK}, packed, nullptr,
              {expected, DType::kF32, kRows, kOutputs, kOutputs}, NumericClass::kAmx);
  multiply({.x = x.data(), .x_stride = kK, .rows = kRows, .w = packed.data,
            .panel_stride = panel_bytes(kK, DType::kBF16), .panels = kPanels, .k = kK, .c = found,
            .c_stride = kOutputs});
  return std::memcmp(found, expected, sizeof found) == 0;
}

bool int8_agrees(void (*multiply)(const Int8Product&)) {
  constexpr int64_t kK = 180;
  constexpr int64_t kStride = 192;
  std::mt19937 random(1);
  std::vector<int8_t> x(kRows * kStride);
  std::vector<int32_t> sums(kRows);
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t k = 0; k < kK; ++k)
      sums[static_cast<size_t>(m)] += x[static_cast<size_t>(m * kStride + k)] =
          static_cast<int8_t>(random());
  std::vector<std::byte> w(kPanels * 16 * kK);
  for (std::byte& v : w) v = static_cast<std::byte>(random());
  alignas(64) int32_t found[kRows * kOutputs];
  multiply({.x = x.data(), .x_stride = kStride, .rows = kRows, .x_sum = sums.data(), .w = w.data(),
            .panel_stride = 16 * kK, .panels = kPanels, .k = kK, .c = found, .c_stride = kOutputs});
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t n = 0; n < kOutputs; ++n) {
      const std::byte* panel = w.data() + n / 16 * 16 * kK;
      int32_t sum = 0;
      for (int64_t k = 0; k < kK; ++k)
        sum += x[static_cast<size_t>(m * kStride + k)] *
               static_cast<int8_t>(packed_code(quant::Storage::kInt8, panel, n % 16, k));
      if (found[m * kOutputs + n] != sum) return false;
    }
  return true;
}

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512bf16_kernels();
    k.multiply_bf16 = multiply_bf16_tiles<HardwareTiles>;
    k.peak = peak;
    return k;
  }();
  return kernels;
}

const IntegerKernels& amx_integer_kernels() {
  static const IntegerKernels kernels = [] {
    IntegerKernels k = avx512bf16_integer_kernels();
    k.multiply_int8 = multiply_int8;
    k.peak = peak_of_tiles<false>;
    return k;
  }();
  return kernels;
}

std::string ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  if (::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("the system does not lend its tile registers (arch_prctl: ") +
         std::strerror(errno) + ")";
}

bool tiles_agree(void (*multiply_bf16)(const Product&), void (*multiply_int8)(const Int8Product&)) {
  // Ordinary numbers; sums below and above the smallest normal one; subnormal inputs that would count.
  return bf16_agrees(multiply_bf16, 116, 116) && bf16_agrees(multiply_bf16, 1, 86) &&
         bf16_agrees(multiply_bf16, 1, 110) && int8_agrees(multiply_int8);
}

}  // namespace phalanx::ops::cpu
