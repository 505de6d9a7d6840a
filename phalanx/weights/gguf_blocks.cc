#include "phalanx/weights/gguf_blocks.h"

#include <fmt/format.h>

#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::weights {
namespace {

using Bytes = const uint8_t*;

uint16_t load_u16(Bytes p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
uint32_t load_u32(Bytes p) { return load_u16(p) | static_cast<uint32_t>(load_u16(p + 2)) << 16; }
float load_half(Bytes p) { return tensor::f16_to_f32(load_u16(p)); }

// Layouts of 32 values: values 0..15 in the low halves of the bytes, 16..31 in the high halves.

// half d, 16 bytes: d * (q - 8)
void q4_0(Bytes p, float* y) {
  const float d = load_half(p);
  for (int j = 0; j < 16; ++j) {
    y[j] = static_cast<float>((p[2 + j] & 15) - 8) * d;
    y[j + 16] = static_cast<float>((p[2 + j] >> 4) - 8) * d;
  }
}

// half d, half m, 16 bytes: d * q + m
void q4_1(Bytes p, float* y) {
  const float d = load_half(p);
  const float m = load_half(p + 2);
  for (int j = 0; j < 16; ++j) {
    y[j] = static_cast<float>(p[4 + j] & 15) * d + m;
    y[j + 16] = static_cast<float>(p[4 + j] >> 4) * d + m;
  }
}

// The fifth bits of 32 values lie in one 32-bit word.
int fifth_bit(uint32_t word, int j) { return static_cast<int>(word >> j & 1) << 4; }

// half d, 4 bytes of fifth bits, 16 bytes: d * (q - 16)
void q5_0(Bytes p, float* y) {
  const float d = load_half(p);
  const uint32_t high = load_u32(p + 2);
  for (int j = 0; j < 16; ++j) {
    y[j] = static_cast<float>(((p[6 + j] & 15) | fifth_bit(high, j)) - 16) * d;
    y[j + 16] = static_cast<float>(((p[6 + j] >> 4) | fifth_bit(high, j + 16)) - 16) * d;
  }
}

// half d, half m, 4 bytes of fifth bits, 16 bytes: d * q + m
void q5_1(Bytes p, float* y) {
  const float d = load_half(p);
  const float m = load_half(p + 2);
  const uint32_t high = load_u32(p + 4);
  for (int j = 0; j < 16; ++j) {
    y[j] = static_cast<float>((p[8 + j] & 15) | fifth_bit(high, j)) * d + m;
    y[j + 16] = static_cast<float>((p[8 + j] >> 4) | fifth_bit(high, j + 16)) * d + m;
  }
}

// half d, 32 signed bytes: d * q
void q8_0(Bytes p, float* y) {
  const float d = load_half(p);
  for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(static_cast<int8_t>(p[2 + j])) * d;
}

// K-quants: 256 values in 8 groups of 32; scale and minimum of each group have 6 bits, packed in 12
// bytes.
struct GroupScale {
  float scale;
  float minimum;
};
GroupScale group_scale(Bytes scales, int group, float d, float dmin) {
  int scale;
  int minimum;
  if (group < 4) {
    scale = scales[group] & 63;
    minimum = scales[group + 4] & 63;
  } else {
    scale = (scales[group + 4] & 15) | (scales[group - 4] >> 6) << 4;
    minimum = (scales[group + 4] >> 4) | (scales[group] >> 6) << 4;
  }
  return {d * static_cast<float>(scale), dmin * static_cast<float>(minimum)};
}

// 16 bytes of 4-bit scales and minima (one per 16 values), 64 bytes of bit pairs, half d, half dmin
void q2_k(Bytes p, float* y) {
  const float d = load_half(p + 80);
  const float dmin = load_half(p + 82);
  for (int i = 0; i < 256; ++i) {
    const int scale = p[i / 16];
    const int value = p[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    y[i] = d * static_cast<float>(scale & 15) * static_cast<float>(value) -
           dmin * static_cast<float>(scale >> 4);
  }
}

// 32 bytes of third bits (clear: minus 4), 64 bytes of bit pairs, 12 bytes of 6-bit scales less 32
// (one per 16 values), half d
void q3_k(Bytes p, float* y) {
  Bytes scales = p + 96;
  const float d = load_half(p + 108);
  for (int i = 0; i < 256; ++i) {
    const int n = i / 16;
    const int low = n < 8 ? scales[n] & 15 : scales[n - 8] >> 4;
    const int high = scales[8 + n % 4] >> (n / 4 * 2) & 3;
    const int pair = p[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    const int third = p[i % 32] >> (i / 32) & 1;
    y[i] = d * static_cast<float>((low | high << 4) - 32) *
           static_cast<float>(pair - (third != 0 ? 0 : 4));
  }
}

// half d, half dmin, 12 bytes of scales, 128 bytes; every 32 bytes hold two groups
void q4_k(Bytes p, float* y) {
  const float d = load_half(p);
  const float dmin = load_half(p + 2);
  for (int group = 0; group < 8; ++group) {
    const GroupScale s = group_scale(p + 4, group, d, dmin);
    Bytes q = p + 16 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int l = 0; l < 32; ++l)
      y[group * 32 + l] = s.scale * static_cast<float>(q[l] >> shift & 15) - s.minimum;
  }
}

// as q4_k with 32 bytes of fifth bits (bit `group` of byte l) before the 128 bytes
void q5_k(Bytes p, float* y) {
  const float d = load_half(p);
  const float dmin = load_half(p + 2);
  for (int group = 0; group < 8; ++group) {
    const GroupScale s = group_scale(p + 4, group, d, dmin);
    Bytes high = p + 16;
    Bytes q = p + 48 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int l = 0; l < 32; ++l) {
      const int value = (q[l] >> shift & 15) | (high[l] >> group & 1) << 4;
      y[group * 32 + l] = s.scale * static_cast<float>(value) - s.minimum;
    }
  }
}

// 128 bytes low halves, 64 bytes of bit pairs, 16 signed scales (one per 16 values), half d
void q6_k(Bytes p, float* y) {
  const float d = load_half(p + 208);
  for (int half = 0; half < 2; ++half) {
    Bytes low = p + half * 64;
    Bytes high = p + 128 + half * 32;
    Bytes scales = p + 192 + half * 8;
    for (int part = 0; part < 4; ++part) {
      for (int l = 0; l < 32; ++l) {
        const int nibble = low[part % 2 * 32 + l] >> (part / 2 * 4) & 15;
        const int value = (nibble | (high[l] >> (part * 2) & 3) << 4) - 32;
        const int scale = static_cast<int8_t>(scales[part * 2 + l / 16]);
        y[half * 128 + part * 32 + l] = d * static_cast<float>(scale) * static_cast<float>(value);
      }
    }
  }
}

void f32(Bytes p, float* y) { std::memcpy(y, p, sizeof(float)); }
void f16(Bytes p, float* y) { *y = load_half(p); }
void bf16(Bytes p, float* y) { *y = tensor::bf16_to_f32(load_u16(p)); }

using Decode = void (*)(Bytes, float*);
Decode decoder(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return f32;
    case GgufType::kF16:
      return f16;
    case GgufType::kBF16:
      return bf16;
    case GgufType::kQ4_0:
      return q4_0;
    case GgufType::kQ4_1:
      return q4_1;
    case GgufType::kQ5_0:
      return q5_0;
    case GgufType::kQ5_1:
      return q5_1;
    case GgufType::kQ8_0:
      return q8_0;
    case GgufType::kQ2_K:
      return q2_k;
    case GgufType::kQ3_K:
      return q3_k;
    case GgufType::kQ4_K:
      return q4_k;
    case GgufType::kQ5_K:
      return q5_k;
    case GgufType::kQ6_K:
      return q6_k;
  }
  return nullptr;
}

constexpr const char* kNames[] = {
    "F32",   "F16",   "Q4_0",       "Q4_1",       "Q4_2",       "Q4_3",     "Q5_0",
    "Q5_1",  "Q8_0",  "Q8_1",       "Q2_K",       "Q3_K",       "Q4_K",     "Q5_K",
    "Q6_K",  "Q8_K",  "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",    "IQ1_S",    "IQ4_NL",
    "IQ3_S", "IQ2_S", "IQ4_XS",     "I8",         "I16",        "I32",      "I64",
    "F64",   "IQ1_M", "BF16",       "Q4_0_4_4",   "Q4_0_4_8",   "Q4_0_8_8", "",
    "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"};

}  // namespace

std::string gguf_type_name(uint32_t type) {
  constexpr size_t known = sizeof(kNames) / sizeof(kNames[0]);
  if (type < known && kNames[type][0] != '\0') return kNames[type];
  // Refused by its number.
  return fmt::format("type {}", type);
}

bool gguf_type_supported(uint32_t type) { return decoder(static_cast<GgufType>(type)) != nullptr; }

GgufBlock gguf_block(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return {1, 4};
    case GgufType::kF16:
      return {1, 2};
    case GgufType::kBF16:
      return {1, 2};
    case GgufType::kQ4_0:
      return {32, 18};
    case GgufType::kQ4_1:
      return {32, 20};
    case GgufType::kQ5_0:
      return {32, 22};
    case GgufType::kQ5_1:
      return {32, 24};
    case GgufType::kQ8_0:
      return {32, 34};
    case GgufType::kQ2_K:
      return {256, 84};
    case GgufType::kQ3_K:
      return {256, 110};
    case GgufType::kQ4_K:
      return {256, 144};
    case GgufType::kQ5_K:
      return {256, 176};
    case GgufType::kQ6_K:
      return {256, 210};
  }
  return {0, 0};
}

void gguf_dequantize(GgufType type, std::span<const std::byte> blocks, std::span<float> out) {
  const GgufBlock block = gguf_block(type);
  const Decode decode = decoder(type);
  PHALANX_CHECK(decode != nullptr);
  const auto count = static_cast<int64_t>(out.size()) / block.elements;
  PHALANX_CHECK(count * block.elements == static_cast<int64_t>(out.size()));
  PHALANX_CHECK(count * block.bytes == static_cast<int64_t>(blocks.size()));
  const auto* p = reinterpret_cast<Bytes>(blocks.data());
  for (int64_t i = 0; i < count; ++i) decode(p + i * block.bytes, out.data() + i * block.elements);
}

}  // namespace phalanx::weights
