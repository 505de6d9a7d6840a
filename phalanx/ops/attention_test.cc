#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "phalanx/base/sanitizer.h"
#include "phalanx/ops/kv_layout.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

// Whole sequences of random q, k and v, paged in a random order, and the attention of any part.
struct Case {
  struct Shape {
    int64_t q_heads = 4;
    int64_t q_head_begin = 0;
    int64_t group = 2;
    int64_t head_dim = 64;
    int64_t block_size = 16;
    int64_t window = 0;
    DType act = DType::kBF16;
    DType kv = DType::kBF16;
    bool dynamic = false;  // scales of int8
    bool offsets = false;
    bool shared = false;  // keys are values
    std::vector<int32_t> contexts;
  };

  explicit Case(const Shape& s)
      : shape(s),
        total(std::accumulate(s.contexts.begin(), s.contexts.end(), int64_t{0})),
        qkv(random_matrix(s.act, total, s.q_heads * s.head_dim, 1, 2.0f,
                          s.q_heads * s.head_dim + 8)),
        layer{.dtype = s.kv, .block_size = s.block_size, .head_dim = s.head_dim} {
    attention_shape = {.q_heads = s.q_heads,
                       .q_head_begin = s.q_head_begin,
                       .group = s.group,
                       .kv_head_begin = s.q_head_begin / s.group,
                       .head_dim = s.head_dim,
                       .scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim)),
                       .window = s.window};
    layer.kv_heads = (s.q_head_begin + s.q_heads - 1) / s.group - attention_shape.kv_head_begin + 1;
    layer.blocks = 1;
    for (const int32_t c : s.contexts) layer.blocks += (c + s.block_size - 1) / s.block_size;
    const int64_t positions = layer.blocks * layer.kv_heads * s.block_size;
    const int64_t channels = layer.kv_heads * s.head_dim;
    for (Aligned* memory : {&k, &v})
      *memory = Aligned(positions * s.head_dim * static_cast<int64_t>(tensor::dtype_bytes(s.kv)));
    layer.k = k.data();
    layer.v = s.shared ? layer.k : v.data();
    if (s.kv == DType::kI8 && s.dynamic) {
      row_scales = random_matrix(DType::kF32, 2, positions, 5, 0.01f);
      layer.k_row_scale = row_scales.view().row<float>(0);
      layer.v_row_scale = row_scales.view().row<float>(s.shared ? 0 : 1);
    } else if (s.kv == DType::kI8) {
      channel_scales = random_matrix(DType::kF32, 4, channels, 6, 0.01f);
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t r = 0; r < 2; ++r) {
          channel_scales.set(r, i, std::fabs(channel_scales.get(r, i)) + 0.005f);
          channel_scales.set(2 + r, i, 1000 * channel_scales.get(2 + r, i));
        }
      layer.k_scale = channel_scales.view().row<float>(0);
      layer.v_scale = channel_scales.view().row<float>(1);
      if (s.offsets) {
        layer.k_offset = channel_scales.view().row<float>(2);
        layer.v_offset = channel_scales.view().row<float>(3);
      }
    }
    std::mt19937 random(2);
    auto any = [&] { return static_cast<float>(random() % 4001) / 1000.0f - 2.0f; };
    for (int64_t b = 0; b < layer.blocks; ++b)
      for (int64_t h = 0; h < layer.kv_heads; ++h)
        for (int64_t j = 0; j < s.block_size; ++j)
          for (int64_t i = 0; i < s.head_dim; ++i) {
            set(true, b, h, j, i, any());
            if (!s.shared) set(false, b, h, j, i, any() / 2);
          }
    std::vector<int32_t> ids(static_cast<size_t>(layer.blocks));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(4));
    for (const int32_t c : s.contexts) {
      tables.emplace_back();
      for (int64_t b = 0; b < (c + s.block_size - 1) / s.block_size; ++b) {
        tables.back().push_back(ids.back());
        ids.pop_back();
      }
      // What lies in a block behind the sequence is nobody's business.
      for (int64_t j = c; j < static_cast<int64_t>(tables.back().size()) * s.block_size; ++j) {
        for (int64_t h = 0; h < layer.kv_heads; ++h) {
          const int64_t b = tables.back().back();
          const int64_t offset = j % s.block_size;
          if (layer.k_row_scale != nullptr) {
            const int64_t at = kv_scale_index(layer, b, h, offset);
            layer.k_row_scale[at] = layer.v_row_scale[at] = std::numeric_limits<float>::quiet_NaN();
          }
          for (int64_t i = 0; i < s.head_dim; ++i) {
            set(true, b, h, offset, i, std::numeric_limits<float>::quiet_NaN());
            if (!s.shared) set(false, b, h, offset, i, std::numeric_limits<float>::infinity());
          }
        }
      }
    }
  }

  // int8: the stored number, 50 times the value.
  void set(bool key, int64_t block, int64_t head, int64_t offset, int64_t i, float value) {
    const int64_t at = key ? kv_key_index(layer, block, head, offset, i)
                           : kv_value_index(layer, block, head, offset, i);
    std::byte* to = key ? layer.k : layer.v;
    switch (layer.dtype) {
      case DType::kI8:
        reinterpret_cast<int8_t*>(to)[at] =
            static_cast<int8_t>(std::isfinite(value) ? std::lround(value * 50) : 99);
        break;
      case DType::kBF16:
        reinterpret_cast<uint16_t*>(to)[at] = tensor::f32_to_bf16(value);
        break;
      default:
        reinterpret_cast<float*>(to)[at] = value;
    }
  }
  // The value that the cache stands for.
  [[nodiscard]] double get(bool key, int64_t block, int64_t head, int64_t offset, int64_t i) const {
    const int64_t at = key ? kv_key_index(layer, block, head, offset, i)
                           : kv_value_index(layer, block, head, offset, i);
    const std::byte* from = key ? layer.k : layer.v;
    switch (layer.dtype) {
      case DType::kI8: {
        const double stored = reinterpret_cast<const int8_t*>(from)[at];
        const int64_t channel = head * layer.head_dim + i;
        if (layer.k_row_scale != nullptr)
          return stored * (key ? layer.k_row_scale
                               : layer.v_row_scale)[kv_scale_index(layer, block, head, offset)];
        const float* shift = key ? layer.k_offset : layer.v_offset;
        return (stored - (shift != nullptr ? shift[channel] : 0.0f)) *
               (key ? layer.k_scale : layer.v_scale)[channel];
      }
      case DType::kBF16:
        return tensor::bf16_to_f32(reinterpret_cast<const uint16_t*>(from)[at]);
      default:
        return reinterpret_cast<const float*>(from)[at];
    }
  }

  // All tokens of all sequences in one step.
  [[nodiscard]] std::vector<SequenceSlice> whole() const {
    std::vector<SequenceSlice> slices;
    int32_t at = 0;
    for (size_t s = 0; s < tables.size(); ++s) {
      slices.push_back({at, shape.contexts[s], shape.contexts[s], tables[s].data()});
      at += shape.contexts[s];
    }
    return slices;
  }

  [[nodiscard]] Matrix reference(NumericClass numeric_class) const {
    Matrix out(shape.act, total, shape.q_heads * shape.head_dim);
    ref::attention(qkv.view(), whole(), attention_shape, layer, out.view(), numeric_class);
    return out;
  }

  [[nodiscard]] Matrix run(Context& ctx) const {
    Matrix out(shape.act, total, shape.q_heads * shape.head_dim);
    attention(ctx, qkv.view(), whole(), attention_shape, layer, out.view());
    return out;
  }

  // Each sequence in pieces of `piece` tokens, all sequences together in each step, as in
  // continuous batching.
  [[nodiscard]] Matrix run_in_pieces(Context& ctx, int32_t piece) const {
    const int64_t width = shape.q_heads * shape.head_dim;
    Matrix out(shape.act, total, width);
    const int32_t longest = *std::max_element(shape.contexts.begin(), shape.contexts.end());
    const auto size = tensor::dtype_bytes(shape.act);
    for (int32_t done = 0; done < longest; done += piece) {
      std::vector<SequenceSlice> slices;
      std::vector<int64_t> rows;
      int32_t first = 0;
      for (size_t s = 0; s < tables.size(); ++s) {
        const int32_t count = std::min(piece, shape.contexts[s] - done);
        if (count > 0)
          slices.push_back(
              {static_cast<int32_t>(rows.size()), count, done + count, tables[s].data()});
        for (int32_t i = 0; i < count; ++i) rows.push_back(first + done + i);
        first += shape.contexts[s];
      }
      Matrix step(shape.act, static_cast<int64_t>(rows.size()), width);
      Matrix result(shape.act, static_cast<int64_t>(rows.size()), width, width + 5);
      for (size_t r = 0; r < rows.size(); ++r)
        std::memcpy(step.view().row<std::byte>(0) + r * static_cast<size_t>(width) * size,
                    qkv.row_bits(rows[r]).data(), static_cast<size_t>(width) * size);
      attention(ctx, step.view(), slices, attention_shape, layer, result.view());
      for (size_t r = 0; r < rows.size(); ++r)
        std::memcpy(out.view().row<std::byte>(0) + rows[r] * width * static_cast<int64_t>(size),
                    result.row_bits(static_cast<int64_t>(r)).data(),
                    static_cast<size_t>(width) * size);
    }
    return out;
  }

  Shape shape;
  int64_t total;
  AttentionShape attention_shape;
  Matrix qkv;
  Aligned k{64};
  Aligned v{64};
  Matrix row_scales{DType::kF32, 0, 0};
  Matrix channel_scales{DType::kF32, 0, 0};
  std::vector<std::vector<int32_t>> tables;
  KvLayer layer;
};

class AttentionOf : public testing::TestWithParam<Isa> {
 protected:
  NumericClass numeric_class() const { return numeric_class_of(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(AllPaths, AttentionOf, testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(AttentionOf, AgreesWithSoftmaxInDoublePrecision) {
  std::vector<Case::Shape> shapes;
  for (const int64_t head_dim : {24, 32}) {
    for (const DType kv : {DType::kBF16, DType::kF32})
      shapes.push_back({.q_heads = 3,
                        .group = 3,
                        .head_dim = head_dim,
                        .act = DType::kF32,
                        .kv = kv,
                        .contexts = {1, 2, 300, 37}});
    for (const bool dynamic : {false, true})
      shapes.push_back({.q_heads = 3,
                        .group = 3,
                        .head_dim = head_dim,
                        .act = DType::kF32,
                        .kv = DType::kI8,
                        .dynamic = dynamic,
                        .offsets = !dynamic,
                        .contexts = {1, 2, 300, 37}});
    // Weights and scaled queries are rounded to bf16.
    shapes.push_back({.q_heads = 3, .group = 3, .head_dim = head_dim, .contexts = {1, 2, 300, 37}});
    shapes.push_back({.q_heads = 3,
                      .group = 3,
                      .head_dim = head_dim,
                      .kv = DType::kI8,
                      .offsets = true,
                      .contexts = {1, 2, 300, 37}});
  }
  for (const Case::Shape& shape : shapes) {
    const Case c(shape);
    const int64_t d = shape.head_dim;
    Runner runner(GetParam(), 2);
    const Matrix out = c.run(runner.ctx);
    const double tolerance = shape.act == DType::kBF16 ? 2e-2 : 1e-5;
    int64_t row = 0;
    for (size_t s = 0; s < c.tables.size(); ++s) {
      for (int64_t p = 0; p < c.shape.contexts[s]; ++p, ++row) {
        for (int64_t h = 0; h < 3; ++h) {
          double total = 0;
          std::vector<double> expected(static_cast<size_t>(d));
          for (int64_t j = 0; j <= p; ++j) {
            const int64_t block = c.tables[s][static_cast<size_t>(j / 16)];
            double score = 0;
            for (int64_t i = 0; i < d; ++i)
              score +=
                  static_cast<double>(c.qkv.get(row, h * d + i)) * c.get(true, block, 0, j % 16, i);
            const double weight = std::exp(score * c.attention_shape.scale);
            total += weight;
            for (int64_t i = 0; i < d; ++i)
              expected[static_cast<size_t>(i)] += weight * c.get(false, block, 0, j % 16, i);
          }
          for (int64_t i = 0; i < d; ++i)
            ASSERT_NEAR(out.get(row, h * d + i), expected[static_cast<size_t>(i)] / total,
                        tolerance)
                << "sequence " << s << ", position " << p << ", head_dim " << d;
        }
      }
    }
  }
}

TEST_P(AttentionOf, GivesTheBitsOfItsClass) {
  std::vector<Case::Shape> shapes;
  for (const int64_t head_dim : {8, 12, 64, 80, 96, 128})
    shapes.push_back({.head_dim = head_dim, .contexts = {1, 33, 5}});
  for (const int64_t group : {1, 2, 3, 4, 8})
    shapes.push_back({.q_heads = group, .group = group, .head_dim = 16, .contexts = {1, 20, 90}});
  // A range of heads that begins and ends in the middle of a group.
  shapes.push_back({.q_heads = 5, .q_head_begin = 2, .group = 3, .contexts = {18, 3}});
  shapes.push_back({.q_heads = 9, .q_head_begin = 7, .group = 4, .head_dim = 9, .contexts = {50}});
  for (const int64_t block_size : {1, 5, 16, 128})
    shapes.push_back(
        {.q_heads = 2, .head_dim = 16, .block_size = block_size, .contexts = {300, 17, 129}});
  for (const int64_t window : {1, 7, 64, 300})
    shapes.push_back({.q_heads = 2, .head_dim = 16, .window = window, .contexts = {600, 7}});
  shapes.push_back(
      {.q_heads = 2, .head_dim = 16, .act = DType::kF32, .kv = DType::kF32, .contexts = {530, 31}});
  shapes.push_back(
      {.q_heads = 2, .head_dim = 16, .act = DType::kF32, .kv = DType::kBF16, .contexts = {270}});
  for (const int64_t head_dim : {9, 64}) {
    for (const DType act : {DType::kBF16, DType::kF32}) {
      shapes.push_back({.q_heads = 3,
                        .group = 3,
                        .head_dim = head_dim,
                        .act = act,
                        .kv = DType::kI8,
                        .offsets = true,
                        .contexts = {300, 17}});
      shapes.push_back({.q_heads = 3,
                        .group = 3,
                        .head_dim = head_dim,
                        .act = act,
                        .kv = DType::kI8,
                        .dynamic = true,
                        .contexts = {300, 17}});
    }
  }
  // Few and many rows of a block, so that int8 is read as it is and widened.
  for (const int64_t heads : {2, 14})
    for (const int64_t head_dim : {9, 48})
      for (const auto& [act, kv] :
           {std::pair(DType::kBF16, DType::kBF16), std::pair(DType::kBF16, DType::kI8),
            std::pair(DType::kF32, DType::kF32), std::pair(DType::kF32, DType::kI8)})
        shapes.push_back({.q_heads = heads,
                          .group = heads,
                          .head_dim = head_dim,
                          .block_size = heads == 2 ? 32 : 16,
                          .act = act,
                          .kv = kv,
                          .dynamic = kv == DType::kI8,
                          .shared = true,
                          .contexts = {heads == 2 ? 260 : 20, 7}});
  shapes.push_back({.q_heads = 2,
                    .head_dim = 16,
                    .block_size = 128,
                    .window = 37,
                    .kv = DType::kI8,
                    .dynamic = true,
                    .contexts = {600, 7}});
  for (const Case::Shape& shape : shapes) {
    const Case c(shape);
    const Matrix expected = c.reference(numeric_class());
    for (const int threads : {3, 2, 1}) {
      Runner runner(GetParam(), threads);
      ASSERT_EQ(c.run(runner.ctx).bits(), expected.bits())
          << "head_dim " << shape.head_dim << ", group " << shape.group << ", block "
          << shape.block_size << ", window " << shape.window << ", threads " << threads;
      if (GetParam() == Isa::kRef) break;
      for (const int32_t piece : {1, 7, 64})
        ASSERT_EQ(c.run_in_pieces(runner.ctx, piece).bits(), expected.bits())
            << "head_dim " << shape.head_dim << ", group " << shape.group << ", block "
            << shape.block_size << ", window " << shape.window << ", threads " << threads
            << ", pieces of " << piece;
      if (kThreadSanitizer) break;
    }
  }
}

// Long contexts: decoding one by one, whole prefill and chunked prefill agree.
TEST_P(AttentionOf, LongContextsDoNotDependOnTheWay) {
  std::vector<int32_t> contexts = {1500, 256, 257};
  if (GetParam() == Isa::kRef || kThreadSanitizer) contexts = {257, 30};
  const Case c({.q_heads = 4, .group = 4, .head_dim = 64, .block_size = 128, .contexts = contexts});
  Runner one(GetParam(), 1);
  Runner three(GetParam(), 3);
  const Matrix expected = c.run(one.ctx);
  ASSERT_EQ(c.run(three.ctx).bits(), expected.bits());
  ASSERT_EQ(c.run_in_pieces(one.ctx, 1).bits(), expected.bits());
  ASSERT_EQ(c.run_in_pieces(three.ctx, 1).bits(), expected.bits());
  ASSERT_EQ(c.run_in_pieces(three.ctx, 100).bits(), expected.bits());
  ASSERT_EQ(c.run_in_pieces(one.ctx, 512).bits(), expected.bits());
}

TEST_P(AttentionOf, BadNumbersStayInTheirSequence) {
  const Case clean({.head_dim = 32, .contexts = {40, 9, 70}});
  Case bad({.head_dim = 32, .contexts = {40, 9, 70}});
  // Position 3 of the second sequence, every KV head.
  for (int64_t h = 0; h < bad.layer.kv_heads; ++h) {
    bad.set(true, bad.tables[1][0], h, 3, 0, std::numeric_limits<float>::quiet_NaN());
    bad.set(false, bad.tables[1][0], h, 3, 1, std::numeric_limits<float>::infinity());
  }
  bad.qkv.set(100, 0, std::numeric_limits<float>::infinity());
  Runner runner(GetParam(), 2);
  const Matrix expected = clean.run(runner.ctx);
  const Matrix out = bad.run(runner.ctx);
  for (int64_t t = 0; t < out.view().rows; ++t) {
    if ((t >= 43 && t < 49) || t == 100) {
      EXPECT_FALSE(std::isfinite(out.get(t, 0))) << t;
    } else {
      EXPECT_EQ(out.row_bits(t), expected.row_bits(t)) << t;
    }
  }
}

}  // namespace
}  // namespace phalanx::ops
