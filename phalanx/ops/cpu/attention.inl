// The products of attention over the KV cache as it is stored, and int8 KV. Included by kernels.inl.

// Units of keys against all rows, kPanels at a time.
template <int kRows, int kPanels, typename W>
__attribute__((noinline)) void score_tile(const Scores& a, int64_t row, int64_t unit, bool ahead) {
  Tile<kRows, kPanels> t;
  const std::byte* w[kPanels];
  const std::byte* next[kPanels];
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) {
    w[p] = a.units[unit + p];
    next[p] = ahead ? a.next[unit + p] : nullptr;
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) t.acc[m][p] = zero();
  }
  const auto* x = static_cast<const typename W::X*>(a.q) + row * a.q_stride;
  // Units that follow each other in memory, as they do within a block, need one address only.
  bool even = true;
#pragma GCC unroll 4
  for (int p = 1; p < kPanels; ++p) even &= w[p] - w[p - 1] == w[kPanels > 1 ? 1 : 0] - w[0];
  const int64_t steps = a.k / W::kStep;
  if (even) {
    const int64_t stride = kPanels > 1 ? w[kPanels > 1 ? 1 : 0] - w[0] : 0;
    for (int64_t s = 0; s < steps; ++s) {
      if (ahead) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(next[p] + s * W::kBytes, 0, 2);
      }
      t.step(W{}, w[0] + s * W::kBytes, stride, x + s * W::kStep, a.q_stride);
    }
    if (W::kStep == 2 && a.k % 2 != 0)
      t.last(W{}, w[0] + steps * W::kBytes, stride, x + steps * W::kStep, a.q_stride);
  } else {
    // One panel after the other: small blocks only.
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      Tile<kRows, 1> one;
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) one.acc[m][0] = zero();
      for (int64_t s = 0; s < steps; ++s) {
        if (ahead) __builtin_prefetch(next[p] + s * W::kBytes, 0, 2);
        one.step(W{}, w[p] + s * W::kBytes, 0, x + s * W::kStep, a.q_stride);
      }
      if (W::kStep == 2 && a.k % 2 != 0)
        one.last(W{}, w[p] + steps * W::kBytes, 0, x + steps * W::kStep, a.q_stride);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) t.acc[m][p] = one.acc[m][0];
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
      store(a.s + (row + m) * a.s_stride + 16 * (unit + p), t.acc[m][p]);
}

template <int kRows, typename W>
void score_rows(const Scores& a, int64_t row, int64_t unit, int64_t count, bool ahead) {
  constexpr int kWide = kTilePanels(kRows);
  int64_t u = unit;
  for (; u + kWide <= unit + count; u += kWide) score_tile<kRows, kWide, W>(a, row, u, ahead);
  for (; u < unit + count; ++u) score_tile<kRows, 1, W>(a, row, u, ahead);
}

// Calls tile(rows as a constant, first row, is it the first tile) for tiles of equal height.
template <typename Call>
inline void for_row_tiles(int64_t rows, Call call) {
  const int64_t passes = (rows + kTileRows - 1) / kTileRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t row = rows * pass / passes;
    switch (rows * (pass + 1) / passes - row) {
      case 1: call.template run<1>(row, pass == 0); break;
      case 2: call.template run<2>(row, pass == 0); break;
      case 3: call.template run<3>(row, pass == 0); break;
      case 4: call.template run<4>(row, pass == 0); break;
      case 5: call.template run<5>(row, pass == 0); break;
      default: call.template run<6>(row, pass == 0); break;
    }
  }
}

template <typename W>
struct ScoreCall {
  const Scores& a;
  int64_t unit;
  int64_t count;
  template <int kRows>
  void run(int64_t row, bool first) {
    score_rows<kRows, W>(a, row, unit, count, first && a.next != nullptr);
  }
};

// Four units stay in the L1 cache while all rows pass.
template <typename W>
void scores_of(const Scores& a) {
  for (int64_t u = 0; u < a.count; u += 4)
    for_row_tiles(a.rows, ScoreCall<W>{a, u, a.count - u < 4 ? a.count - u : 4});
}

// kPanels * 16 channels of kRows rows over all positions.
template <int kRows, int kPanels, typename W>
__attribute__((noinline)) void value_tile(const Values& a, int64_t row, int64_t panel, bool ahead) {
  constexpr int64_t kSteps = 16 / W::kStep;  // of a unit
  const int32_t* begin = a.begin + row;
  const int32_t* end = a.end + row;
  // Steps that all rows take whole, and those that any row takes.
  int64_t low = 1 << 30, high = 0, common_low = 0, common_high = 1 << 30;
  for (int m = 0; m < kRows; ++m) {
    if (begin[m] >= end[m]) continue;
    const int64_t b = begin[m] / W::kStep;
    const int64_t e = (end[m] + W::kStep - 1) / W::kStep;
    const int64_t whole_b = (begin[m] + W::kStep - 1) / W::kStep;
    const int64_t whole_e = end[m] / W::kStep;
    low = b < low ? b : low;
    high = e > high ? e : high;
    common_low = whole_b > common_low ? whole_b : common_low;
    common_high = whole_e < common_high ? whole_e : common_high;
  }
  if (low >= high) return;
  if (common_high <= common_low) common_low = common_high = high;

  Tile<kRows, kPanels> t;
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) t.acc[m][p] = zero();
  const auto* x = static_cast<const typename W::X*>(a.p) + row * a.p_stride;
  const int64_t row_bytes = a.panels * W::kBytes;
  auto at = [&](const std::byte* const* units, int64_t s) {
    return units[s / kSteps] + s % kSteps * row_bytes + panel * W::kBytes;
  };
  auto ragged = [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s)
      t.ragged(W{}, at(a.units, s), W::kBytes, x + s * W::kStep, a.p_stride, s * W::kStep, begin,
               end);
  };
  ragged(low, common_low);
  for (int64_t s = common_low; s < common_high;) {
    const int64_t stop = (s / kSteps + 1) * kSteps;
    const int64_t until = stop < common_high ? stop : common_high;
    const std::byte* w = at(a.units, s);
    const std::byte* next = ahead ? at(a.next, s) : nullptr;
    for (; s < until; ++s) {
      if (ahead) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(next + p * W::kBytes, 0, 2);
        next += row_bytes;
      }
      t.step(W{}, w, W::kBytes, x + s * W::kStep, a.p_stride);
      w += row_bytes;
    }
  }
  ragged(common_high, high);
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
      store(a.o + (row + m) * a.o_stride + 16 * (panel + p), t.acc[m][p]);
}

template <typename W>
struct ValueCall {
  const Values& a;
  int64_t panel;
  int64_t count;
  template <int kRows>
  void run(int64_t row, bool first) {
    constexpr int kWide = kTilePanels(kRows);
    const bool ahead = first && a.next != nullptr;
    int64_t p = panel;
    for (; p + kWide <= panel + count; p += kWide) value_tile<kRows, kWide, W>(a, row, p, ahead);
    for (; p < panel + count; ++p) value_tile<kRows, 1, W>(a, row, p, ahead);
  }
};

template <typename W>
void values_of(const Values& a) {
  for (int64_t p = 0; p < a.panels; p += 4)
    for_row_tiles(a.rows, ValueCall<W>{a, p, a.panels - p < 4 ? a.panels - p : 4});
}

void scores(const Scores& a) {
#ifdef PHALANX_PAIRS
  if (a.pairs)
    return a.type == KvType::kI8 ? scores_of<WeightsPairsI8>(a) : scores_of<WeightsPairs>(a);
#endif
  switch (a.type) {
    case KvType::kF32: return scores_of<WeightsF32>(a);
    case KvType::kBF16: return scores_of<WeightsBf16>(a);
    case KvType::kI8: return scores_of<WeightsI8>(a);
  }
}

void values(const Values& a) {
#ifdef PHALANX_PAIRS
  if (a.pairs)
    return a.type == KvType::kI8 ? values_of<WeightsPairsI8>(a) : values_of<WeightsPairs>(a);
#endif
  switch (a.type) {
    case KvType::kF32: return values_of<WeightsF32>(a);
    case KvType::kBF16: return values_of<WeightsBf16>(a);
    case KvType::kI8: return values_of<WeightsI8>(a);
  }
}

// bf16 as vdpbf16ps takes it: subnormal numbers are zeros.
inline void store_weight(uint16_t* p, V v) {
#ifdef PHALANX_PAIRS
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v.v));
#else
  store_bf16(p, v);
#endif
}

void softmax(const float* s, int64_t begin, int64_t end, float scale, const float* key_scale,
             const float* value_scale, void* p_out, bool p_bf16, float* max_out, float* sum_out) {
  const int64_t first = begin / 16 * 16;
  const V factor = set1(scale);
  auto score = [&](int64_t j) {
    const V v = load(s + j);
    return key_scale != nullptr ? mul(v, load(key_scale + j)) : v;
  };
  auto full = [&](int64_t j) { return j >= begin && j + 16 <= end; };
  V top = set1(-__builtin_inff());
  for (int64_t j = first; j < end; j += 16)
    top = max(top, full(j) ? score(j) : keep(score(j), begin - j, end - j, -__builtin_inff()));
  const float m = largest(top) * scale;
  const V shift = set1(-m);
  V total = zero();
  for (int64_t j = first; j < end; j += 16) {
    V p = exp_to_88(fma(score(j), factor, shift));
    if (!full(j)) p = keep(p, begin - j, end - j, 0.0f);
    total = add(total, p);
    if (value_scale != nullptr) {
      p = mul(p, load(value_scale + j));
      if (!full(j)) p = keep(p, begin - j, end - j, 0.0f);
    }
    if (p_bf16)
      store_weight(static_cast<uint16_t*>(p_out) + j, p);
    else
      store(static_cast<float*>(p_out) + j, p);
  }
  *max_out = m;
  *sum_out = sum(total);
}

void scale(const void* in, bool in_bf16, const float* factors, int64_t n, void* out,
           bool out_bf16) {
  for (int64_t i = 0; i < n; i += 16)
    store_any(out, out_bf16, i, n,
              mul(load_any(in, in_bf16, i, n), load_any(factors, false, i, n)));
}

float quantise(const float* x, const float* scales, const float* offsets, int64_t n, int8_t* out) {
  if (scales != nullptr) {
    for (int64_t i = 0; i < n; i += 16) {
      V v = div(load_any(x, false, i, n), load_any(scales, false, i, n));
      v = add(v, offsets != nullptr ? load_any(offsets, false, i, n) : zero());
      store_i8_n(out + i, n - i, v);
    }
    return 0;
  }
  V top = zero();
  for (int64_t i = 0; i < n; i += 16) top = max(magnitude(load_any(x, false, i, n)), top);
  const float most = largest(top);
  const V inverse = set1(most > 0 ? 127.0f / most : 0.0f);
  for (int64_t i = 0; i < n; i += 16)
    store_i8_n(out + i, n - i, mul(load_any(x, false, i, n), inverse));
  return most / 127.0f;
}

void widen_i8(const int8_t* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) store_bf16(out + i, load_i8(in + i));
}
