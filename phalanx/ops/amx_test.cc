// The tile kernels over tiles in memory that do what Intel's manual says. On machines with AMX the
// tests of the other files run over its registers too, as those of the path "amx".

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "phalanx/base/check.h"
#include "phalanx/ops/cpu/amx.h"
#include "phalanx/ops/cpu/amx_tiles.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/moe.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/scratch.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

using quant::Storage;

enum class Arithmetic { kManual, kOneChain, kAddsEachProduct, kSubnormalInputs, kSubnormalSums };

// LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS and TDPBSUD as the Intel SDM has them in pseudo code.
template <Arithmetic kArithmetic = Arithmetic::kManual>
class EmulatedTiles {
 public:
  ~EmulatedTiles() { EXPECT_FALSE(configured_) << "tiles were not released"; }
  void configure(int64_t first, int64_t second) {
    PHALANX_CHECK(first > 0 && first <= 16 && second >= 0 && second <= 16);
    const int64_t rows[8] = {first, first, second > 0 ? second : first, second > 0 ? second : first,
                             first, second, 16, 16};
    for (size_t t = 0; t < 8; ++t) tiles_[t] = {.rows = static_cast<size_t>(rows[t])};
    configured_ = true;
  }
  void release() { configured_ = false; }
  template <int kTile>
  void zero() {
    tile(kTile).memory.fill({});
  }
  template <int kTile>
  void load(const std::byte* from, int64_t stride) {
    Tile& t = tile(kTile);
    t.memory.fill({});
    for (size_t r = 0; r < t.rows; ++r)
      std::memcpy(t.memory.data() + r * 64, from + static_cast<int64_t>(r) * stride, 64);
  }
  template <int kTile>
  void store(std::byte* to, int64_t stride) {
    const Tile& t = tile(kTile);
    for (size_t r = 0; r < t.rows; ++r)
      std::memcpy(to + static_cast<int64_t>(r) * stride, t.memory.data() + r * 64, 64);
  }
  template <int kC, int kA, int kB>
  void bf16() {
    Tile& c = tile(kC);
    const Tile& a = tile(kA);
    const Tile& b = tile(kB);
    PHALANX_CHECK(c.rows == a.rows && b.rows == 16);
    for (size_t m = 0; m < c.rows; ++m) {
      for (size_t n = 0; n < 16; ++n) {
        float sums[2] = {};
        auto sum = c.template get<float>(m, n);
        for (size_t k = 0; k < 16; ++k) {
          for (size_t i = 0; i < 2; ++i) {
            const float x = input(a.template get<uint16_t>(m, 2 * k + i));
            const float w = input(b.template get<uint16_t>(k, 2 * n + i));
            float& into = kArithmetic == Arithmetic::kAddsEachProduct ? sum
                          : kArithmetic == Arithmetic::kOneChain      ? sums[0]
                                                                      : sums[i];
            into = result(std::fma(x, w, into));
          }
        }
        c.set(m, n, result(result(sum) + result(sums[0] + sums[1])));
      }
    }
  }
  template <int kC, int kA, int kB>
  void signed_unsigned() {
    Tile& c = tile(kC);
    const Tile& a = tile(kA);
    const Tile& b = tile(kB);
    PHALANX_CHECK(c.rows == a.rows && b.rows == 16);
    for (size_t m = 0; m < c.rows; ++m) {
      for (size_t n = 0; n < 16; ++n) {
        auto sum = c.template get<uint32_t>(m, n);
        for (size_t k = 0; k < 64; ++k)
          sum += static_cast<uint32_t>(a.template get<int8_t>(m, k) *
                                       b.template get<uint8_t>(k / 4, 4 * n + k % 4));
        c.set(m, n, sum);
      }
    }
  }

 private:
  struct Tile {
    size_t rows = 0;
    std::array<std::byte, 1024> memory{};

    template <typename T>
    [[nodiscard]] T get(size_t row, size_t i) const {
      T value;
      std::memcpy(&value, memory.data() + row * 64 + i * sizeof(T), sizeof(T));
      return value;
    }
    template <typename T>
    void set(size_t row, size_t i, T value) {
      std::memcpy(memory.data() + row * 64 + i * sizeof(T), &value, sizeof(T));
    }
  };
  Tile& tile(size_t t) {
    PHALANX_CHECK(configured_ && tiles_[t].rows > 0);
    return tiles_[t];
  }
  static float flush(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
  }
  static float input(uint16_t bits) {
    const float x = tensor::bf16_to_f32(bits);
    return kArithmetic == Arithmetic::kSubnormalInputs ? x : flush(x);
  }
  static float result(float x) { return kArithmetic == Arithmetic::kSubnormalSums ? x : flush(x); }
  std::array<Tile, 8> tiles_;
  bool configured_ = false;
};

template <Arithmetic kArithmetic>
bool agree() {
  return cpu::tiles_agree(cpu::multiply_bf16_tiles<EmulatedTiles<kArithmetic>>,
                          cpu::multiply_int8_tiles<EmulatedTiles<kArithmetic>>);
}

TEST(Amx, SelfCheckKnowsTheManualFromOtherArithmetic) {
  EXPECT_TRUE(agree<Arithmetic::kManual>());
  EXPECT_FALSE(agree<Arithmetic::kOneChain>());
  EXPECT_FALSE(agree<Arithmetic::kAddsEachProduct>());
  EXPECT_FALSE(agree<Arithmetic::kSubnormalInputs>());
  EXPECT_FALSE(agree<Arithmetic::kSubnormalSums>());
  EXPECT_FALSE(cpu::tiles_agree(
      cpu::multiply_bf16_tiles<EmulatedTiles<>>, [](const cpu::Int8Product& a) {
        cpu::multiply_int8_tiles<EmulatedTiles<>>(a);
        a.c[a.c_stride * (a.rows - 1)] += 1;
      }));
}

TEST(Amx, TileSumsEvenAndOddApart) {
  float w[32] = {};
  float x[32];
  std::fill_n(x, 32, 1.0f);
  w[0] = 16777216.0f;  // 2^24 + 1 is 2^24
  w[2] = 1.0f;
  w[1] = -16777216.0f;
  w[3] = 1.0f;
  EXPECT_EQ(ref::dot_tile(0.5f, w, x), 1.5f);
  w[3] = 0.0f;
  EXPECT_EQ(ref::dot_tile(0.5f, w, x), 0.5f);
}

TEST(Amx, SystemWithoutTilesRefuses) {
  if (cpu::amx_refusal() != cpu::kNoAmx) GTEST_SKIP() << "this machine has AMX";
  const std::string refusal = cpu::ask_for_tiles();
  EXPECT_NE(refusal.find("arch_prctl: "), std::string::npos) << refusal;
}

// What a layer owns, to the byte, so that the address sanitizer sees reads beyond it.
template <typename T>
std::unique_ptr<T[]> exactly(const Matrix& m) {
  std::unique_ptr<T[]> copy(new T[m.bits().size() / sizeof(T)]);
  std::memcpy(copy.get(), m.bits().data(), m.bits().size());
  return copy;
}

TEST(Amx, Bf16KernelGivesTheBitsOfItsClass) {
  for (const int64_t k : {1, 31, 32, 70, 129}) {
    for (const int64_t panels : {1, 2, 3, 4, 7, 8}) {
      const int64_t n = panels * 16 - 3;
      const Matrix w = random_matrix(DType::kBF16, n, k, 1);
      Aligned memory(packed_bytes(n, k, DType::kBF16, Isa::kAmx));
      pack_rows(w.view(), 0, n, memory.data(), Isa::kAmx);
      const PackedLinear packed{.data = memory.data(), .rows = n, .k = k, .dtype = DType::kBF16};
      for (const int64_t m : {1, 2, 7, 16, 17, 32, 33, 100, 512}) {
        if (m > 33 && (k > 70 || panels > 4)) continue;
        const Matrix x = random_matrix(DType::kBF16, m, k, 2);
        const auto input = exactly<uint16_t>(x);
        Matrix expected(DType::kF32, m, n);
        ref::linear(x.view(), packed, nullptr, expected.view(), NumericClass::kAmx);
        for (const int64_t step : {k, int64_t{64}}) {
          const int64_t stride = panels * 16 + 5;
          std::vector<float> found(static_cast<size_t>(m * stride), -7.0f);
          for (int64_t at = 0; at < k; at += step)
            cpu::multiply_bf16_tiles<EmulatedTiles<>>(
                {.x = input.get() + at, .x_stride = k, .rows = m,
                 .w = packed.data + at * 32, .panel_stride = panel_bytes(k, DType::kBF16),
                 .panels = panels, .k = std::min(step, k - at), .c = found.data(),
                 .c_stride = stride, .accumulate = at > 0, .next = packed.data});
          for (int64_t t = 0; t < m; ++t) {
            const float* row = found.data() + t * stride;
            ASSERT_EQ(std::memcmp(row, expected.view().row<float>(t), static_cast<size_t>(n * 4)), 0)
                << n << " x " << k << ", m " << m << ", token " << t << ", step " << step;
            for (int64_t i = panels * 16; i < stride; ++i) ASSERT_EQ(row[i], -7.0f);
          }
        }
      }
    }
  }
}

// Layers on the path of AVX-512 with bf16, whose kernels are replaced by those of emulated tiles.
struct TileRunner {
  explicit TileRunner(int threads)
      : pool({.threads = threads, .spin_us = 5}),
        ctx({.isa = Isa::kAvx512Bf16, .max_tokens = 600, .max_k = 2304, .max_rows = 512,
             .quantised = true},
            pool) {
    kernels = *ctx.scratch().kernels;
    kernels.multiply_bf16 = cpu::multiply_bf16_tiles<EmulatedTiles<>>;
    integers = *ctx.scratch().integers;
    integers.multiply_int8 = cpu::multiply_int8_tiles<EmulatedTiles<>>;
    ctx.scratch().kernels = &kernels;
    ctx.scratch().integers = &integers;
  }
  ThreadPool pool;
  Context ctx;
  cpu::Kernels kernels;
  cpu::IntegerKernels integers;
};

class AmxLayers : public testing::TestWithParam<Storage> {
 protected:
  void SetUp() override {
    const auto isas = available_isas();
    if (std::find(isas.begin(), isas.end(), Isa::kAvx512Bf16) == isas.end())
      GTEST_SKIP() << "needs AVX-512 with bf16";
  }
  struct Layer {
    std::unique_ptr<Aligned> memory;
    PackedLinear w;  // of gated ones the panels
  };
  // step 2: gate and up.
  static Layer layer(int64_t n, int64_t k, int64_t step, uint32_t seed) {
    const Storage storage = GetParam();
    Layer l{.w = {.rows = step == 1 ? n : 2 * panels_of(n) * 16, .k = k, .dtype = DType::kBF16,
                  .isa = Isa::kAmx, .storage = storage,
                  .group = storage == Storage::kFloat ? 0 : storage == Storage::kInt8 ? k : 32}};
    l.memory = std::make_unique<Aligned>(packed_bytes(l.w));
    for (int64_t half = 0; half < step; ++half) {
      std::mt19937 random(seed + static_cast<uint32_t>(half));
      if (storage == Storage::kFloat) {
        const Matrix source = random_matrix(DType::kBF16, n, k, random());
        if (step == 1)
          pack_rows(source.view(), 0, n, l.memory->data(), Isa::kAmx);
        else
          pack_gated_rows(source.view(), 0, n, static_cast<int>(half), l.memory->data(), Isa::kAmx);
        continue;
      }
      const auto groups = static_cast<size_t>((k + l.w.group - 1) / l.w.group);
      quant::Rows rows{.storage = storage, .rows = n, .k = k, .group = l.w.group};
      const uint32_t codes = storage == Storage::kInt8 ? 256 : 16;
      for (int64_t i = 0; i < n * k; ++i)
        rows.codes.push_back(static_cast<uint8_t>(random() % codes));
      rows.scale.assign(static_cast<size_t>(n) * groups, 0.01f);
      pack_quantised(rows, 0, n, l.w, step, half, l.memory->data());
    }
    l.w.data = l.memory->data();
    return l;
  }
  // The class's reference; float layers and quantised ones.
  static void expect(const MatrixView& x, const PackedLinear& w, const MatrixView& out) {
    if (GetParam() == Storage::kFloat)
      ref::linear(x, w, nullptr, out, NumericClass::kAmx);
    else
      ref::linear_quantised(x, w, nullptr, out, NumericClass::kAmx);
  }
  static void expect_gated(const MatrixView& x, const PackedGated& w, const MatrixView& out) {
    if (GetParam() == Storage::kFloat)
      ref::gated_linear(x, w, nullptr, nullptr, out, NumericClass::kAmx);
    else
      ref::gated_quantised(x, w, nullptr, nullptr, out, NumericClass::kAmx);
  }
};

std::string name_of(const testing::TestParamInfo<Storage>& info) {
  return info.param == Storage::kFloat  ? "bf16"
         : info.param == Storage::kInt8 ? "int8"
                                        : "codes4";
}
INSTANTIATE_TEST_SUITE_P(Formats, AmxLayers,
                         testing::Values(Storage::kFloat, Storage::kInt8, Storage::kCodes4),
                         name_of);

TEST_P(AmxLayers, GiveTheBitsOfTheClassForAnyTokensAndThreads) {
  struct Shape {
    int64_t n, k, most;
  };
  for (const Shape s : {Shape{37, 71, 512}, {200, 96, 33}, {24, 2111, 33}}) {
    const Layer one = layer(s.n, s.k, 1, 3);
    const Layer two = layer(s.n, s.k, 2, 4);
    const PackedGated gated{.panels = two.w, .rows = s.n};
    const Matrix x = random_matrix(DType::kBF16, s.most, s.k, 5, 1.0f, s.k + 3);
    Matrix expected(DType::kF32, s.most, s.n);
    Matrix expected_gated(DType::kBF16, s.most, s.n);
    expect(x.view(), one.w, expected.view());
    expect_gated(x.view(), gated, expected_gated.view());
    for (const int threads : {1, 3}) {
      TileRunner runner(threads);
      for (const int64_t m : {1, 2, 7, 16, 17, 32, 512}) {
        if (m > s.most) continue;
        Matrix out(DType::kF32, m, s.n, s.n + 1);
        Matrix out_gated(DType::kBF16, m, s.n);
        const MatrixView in = x.view().rows_of(s.most - m, m);
        linear(runner.ctx, in, one.w, nullptr, out.view());
        gated_linear(runner.ctx, in, gated, nullptr, nullptr, out_gated.view());
        for (int64_t t = 0; t < m; ++t) {
          ASSERT_EQ(out.row_bits(t), expected.row_bits(s.most - m + t))
              << s.n << " x " << s.k << ", m " << m << ", token " << t << ", threads " << threads;
          ASSERT_EQ(out_gated.row_bits(t), expected_gated.row_bits(s.most - m + t)) << m;
        }
      }
    }
  }
}

TEST_P(AmxLayers, OfExpertsGiveTheBitsOfTheClass) {
  constexpr int64_t kN = 70;
  constexpr int64_t kK = 75;
  std::vector<Layer> layers;
  std::vector<PackedGated> gated;
  std::vector<ExpertLinear> experts;
  std::vector<ExpertGated> gated_experts;
  const int64_t rows[] = {1, 0, 2, 17, 40, 1, 7};
  for (uint32_t e = 0; e < std::size(rows); ++e) {
    layers.push_back(layer(kN, kK, 1, 10 * e));
    layers.push_back(layer(kN, kK, 2, 10 * e + 5));
    gated.push_back({.panels = layers.back().w, .rows = kN});
  }
  int64_t end = 0;
  for (size_t e = 0; e < std::size(rows); ++e) {
    experts.push_back({&layers[2 * e].w, {end, end + rows[e]}});
    gated_experts.push_back({&gated[e], {end, end + rows[e]}});
    end += rows[e];
  }
  const Matrix x = random_matrix(DType::kBF16, end, kK, 8);
  Matrix expected(DType::kF32, end, kN);
  Matrix expected_gated(DType::kBF16, end, kN);
  for (size_t e = 0; e < std::size(rows); ++e) {
    const MatrixView in = x.view().rows_of(experts[e].rows.begin, rows[e]);
    expect(in, *experts[e].w, expected.view().rows_of(experts[e].rows.begin, rows[e]));
    expect_gated(in, gated[e], expected_gated.view().rows_of(experts[e].rows.begin, rows[e]));
  }
  for (const int threads : {1, 3}) {
    TileRunner runner(threads);
    Matrix found(DType::kF32, end, kN);
    Matrix found_gated(DType::kBF16, end, kN);
    linear_of_experts(runner.ctx, x.view(), experts, found.view());
    gated_linear_of_experts(runner.ctx, x.view(), gated_experts, found_gated.view());
    EXPECT_EQ(found.bits(), expected.bits()) << threads;
    EXPECT_EQ(found_gated.bits(), expected_gated.bits()) << threads;
  }
}

}  // namespace
}  // namespace phalanx::ops
