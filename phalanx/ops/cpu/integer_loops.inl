// Loops over plain memory for quantised weights, which the compiler turns into the vector
// instructions of the path that includes them (inside an unnamed namespace). Lanes are spelled out
// where they fix the order of sums.

using phalanx::ops::cpu::Codes;
using phalanx::ops::cpu::CodesProduct;
using phalanx::ops::cpu::Int8Product;
using phalanx::ops::cpu::IntegerKernels;

struct Tables {
  uint16_t bf16_4[16];
  uint16_t f16_4[16];
  uint16_t bf16_8[256];
  uint16_t f16_8[256];
  uint16_t bf16_fp8[256];
  uint16_t f16_fp8[256];
};

// value = m * 2^e with 0 < m < 256 exactly; the formats' common case of small numbers.
constexpr uint16_t float_bits(bool negative, int m, int e, bool bf16) {
  if (m == 0) return negative ? 0x8000 : 0;
  int top = 0;
  while ((m >> (top + 1)) != 0) ++top;
  const int mantissa_bits = bf16 ? 7 : 10;
  const int bias = bf16 ? 127 : 15;
  const int mantissa = (m << mantissa_bits >> top) & ((1 << mantissa_bits) - 1);
  return static_cast<uint16_t>((negative ? 0x8000 : 0) | ((top + e + bias) << mantissa_bits) |
                               mantissa);
}

constexpr Tables make_tables() {
  Tables t{};
  for (int i = 0; i < 16; ++i) {
    const int q = i - 8;
    t.bf16_4[i] = float_bits(q < 0, q < 0 ? -q : q, 0, true);
    t.f16_4[i] = float_bits(q < 0, q < 0 ? -q : q, 0, false);
  }
  for (int i = 0; i < 256; ++i) {
    const bool negative = i >= 128;
    const int j = 2 * (i & 127) + 1;
    t.bf16_8[i] = float_bits(negative, j, -1, true);
    t.f16_8[i] = float_bits(negative, j, -1, false);
    const int exponent = i >> 3 & 15;
    const int mantissa = i & 7;
    const int m = exponent == 0 ? mantissa : 8 + mantissa;
    const int e = exponent == 0 ? -9 : exponent - 10;
    t.bf16_fp8[i] = float_bits(negative, m, e, true);
    t.f16_fp8[i] = float_bits(negative, m, e, false);
    if (exponent == 15 && mantissa == 7) {
      t.bf16_fp8[i] = negative ? 0xffc0 : 0x7fc0;
      t.f16_fp8[i] = negative ? 0xfe00 : 0x7e00;
    }
  }
  return t;
}
alignas(64) constexpr Tables kTables = make_tables();

inline float widen(uint16_t v) {
  const uint32_t u = static_cast<uint32_t>(v) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// f(pointer to 16 floats, first, count): blocks of a row, widened; the last may be short.
template <typename Use>
inline __attribute__((always_inline)) void for_blocks(const void* x, bool bf16, int64_t begin,
                                                      int64_t end, Use use) {
  float block[16];
  for (int64_t i = begin; i < end; i += 16) {
    const int64_t count = end - i < 16 ? end - i : 16;
    if (count < 16)
      for (float& v : block) v = 0;
    if (bf16) {
      const uint16_t* in = static_cast<const uint16_t*>(x) + i;
      if (count == 16)
        for (int l = 0; l < 16; ++l) block[l] = widen(in[l]);
      else
        for (int64_t l = 0; l < count; ++l) block[l] = widen(in[l]);
    } else {
      const float* in = static_cast<const float*>(x) + i;
      if (count == 16)
        for (int l = 0; l < 16; ++l) block[l] = in[l];
      else
        for (int64_t l = 0; l < count; ++l) block[l] = in[l];
    }
    use(block, i);
  }
}

inline float lane_sum(float (&lanes)[16]) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

void quantise(const void* x, bool bf16, const float* input, int64_t k, int8_t* out, float* scale,
              int32_t* sum) {
  float largest[16] = {};
  float bad[16] = {};
  for_blocks(x, bf16, 0, k, [&](const float* v, int64_t) {
    for (int l = 0; l < 16; ++l) {
      const float a = __builtin_fabsf(v[l]);
      largest[l] = a > largest[l] ? a : largest[l];
      bad[l] = __builtin_fmaf(v[l], 0.0f, bad[l]);
    }
  });
  for (int l = 1; l < 16; ++l) {
    largest[0] = largest[l] > largest[0] ? largest[l] : largest[0];
    bad[0] += bad[l];
  }
  float divisor = 1;
  float offset = 0;
  float s = 1;
  if (input != nullptr) {
    divisor = input[0];
    offset = input[1];
  } else {
    s = largest[0] / 127.0f;
    if (s > 0) divisor = s;
  }
  *scale = s + __builtin_fabsf(bad[0]);
  int32_t sums[16] = {};
  for_blocks(x, bf16, 0, k, [&](const float* v, int64_t i) {
    const int64_t count = k - i < 16 ? k - i : 16;
    for (int l = 0; l < 16; ++l) {
      float r = __builtin_rintf(v[l] / divisor) + offset;
      r = r <= 127.0f ? r : 127.0f;
      r = r < -128.0f ? -128.0f : r;
      const int32_t q = l < count ? static_cast<int32_t>(r) : 0;
      sums[l] += q;
      out[i + l] = static_cast<int8_t>(q);
    }
  });
  for (int64_t i = (k + 15) / 16 * 16; i < (k + 63) / 64 * 64; ++i) out[i] = 0;
  for (int l = 1; l < 16; ++l) sums[0] += sums[l];
  *sum = sums[0];
}

void finish_int8(float* c, int64_t c_stride, int64_t rows, int64_t panels,
                 const std::byte* parameters, int64_t panel_stride, const float* token_scale,
                 const int32_t* token_sum) {
  for (int64_t m = 0; m < rows; ++m) {
    const float s = token_scale[m];
    const auto x_sum = static_cast<float>(token_sum[m]);
    for (int64_t p = 0; p < panels; ++p) {
      const std::byte* at = parameters + p * panel_stride;
      const auto* scale = reinterpret_cast<const float*>(at);
      const auto* zero = reinterpret_cast<const float*>(at + 64);
      const auto* add = reinterpret_cast<const int32_t*>(at + 128);
      float* to = c + m * c_stride + 16 * p;
      int32_t sums[16];
      __builtin_memcpy(sums, to, 64);
      for (int l = 0; l < 16; ++l) {
        const float y = __builtin_fmaf(-zero[l], x_sum, static_cast<float>(sums[l] + add[l]));
        to[l] = y * s * scale[l];
      }
    }
  }
}

void sum_groups(const void* x, bool bf16, int64_t k, int64_t group, float* out) {
  for (int64_t begin = 0; begin < k; begin += group) {
    float lanes[16] = {};
    for_blocks(x, bf16, begin, k - begin < group ? k : begin + group,
               [&](const float* v, int64_t) {
                 for (int l = 0; l < 16; ++l) lanes[l] += v[l];
               });
    *out++ = lane_sum(lanes);
  }
}

void apply(float* total, const float* part, int64_t c_stride, int64_t rows, int64_t panels,
           const std::byte* parameters, int64_t panel_stride, const float* x_sums,
           int64_t x_sums_stride, bool first) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t p = 0; p < panels; ++p) {
      const auto* scale = reinterpret_cast<const float*>(parameters + p * panel_stride);
      const float* in = part + m * c_stride + 16 * p;
      float* to = total + m * c_stride + 16 * p;
      float y[16];
      if (x_sums != nullptr) {
        const float x_sum = x_sums[m * x_sums_stride];
        for (int l = 0; l < 16; ++l) y[l] = __builtin_fmaf(-scale[16 + l], x_sum, in[l]);
      } else {
        for (int l = 0; l < 16; ++l) y[l] = in[l];
      }
      if (first)
        for (int l = 0; l < 16; ++l) to[l] = __builtin_fmaf(scale[l], y[l], 0.0f);
      else
        for (int l = 0; l < 16; ++l) to[l] = __builtin_fmaf(scale[l], y[l], to[l]);
    }
  }
}

inline const uint16_t* table_of(Codes codes, bool pairs) {
  switch (codes) {
    case Codes::k4: return pairs ? kTables.bf16_4 : kTables.f16_4;
    case Codes::k8: return pairs ? kTables.bf16_8 : kTables.f16_8;
    default: return pairs ? kTables.bf16_fp8 : kTables.f16_fp8;
  }
}

void expand(Codes codes, const std::byte* in, int64_t k, bool pairs, std::byte* out) {
  const uint16_t* table = table_of(codes, pairs);
  auto* to = reinterpret_cast<uint16_t*>(out);
  // Place of (row, k) among 16 values of one k, or 32 of a pair.
  if (codes == Codes::k4) {
    const auto* words = reinterpret_cast<const uint16_t*>(in);
    for (int64_t block = 0; block < k; block += 8, words += 32) {
      for (int n = 0; n < 4 && block + 2 * n < k; ++n) {
        if (pairs) {
          for (int i = 0; i < 32; ++i) to[i] = table[words[i] >> (4 * n) & 15];
        } else {
          for (int i = 0; i < 32; ++i) to[i % 2 * 16 + i / 2] = table[words[i] >> (4 * n) & 15];
        }
        to += 32;
      }
    }
    return;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(in);
  for (int64_t block = 0; block < k; block += 4, bytes += 64) {
    for (int half = 0; half < 2 && block + 2 * half < k; ++half) {
      for (int row = 0; row < 16; ++row) {
        const uint8_t* at = bytes + row / 4 * 16 + half * 8 + row % 4 * 2;
        if (pairs) {
          to[2 * row] = table[at[0]];
          to[2 * row + 1] = table[at[1]];
        } else {
          to[row] = table[at[0]];
          to[16 + row] = table[at[1]];
        }
      }
      to += 32;
    }
  }
}
