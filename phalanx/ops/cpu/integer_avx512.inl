// int8 products by vpdpbusd: sign-turned weights as unsigned bytes, inputs as signed ones.

template <int kRows, int kPanels, bool kStream>
__attribute__((noinline)) void run_tile(const Int8Product& a, int64_t row, int64_t panel) {
  constexpr int64_t kAheadBytes = 4096;
  __m512i acc[kRows][kPanels];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
      acc[m][p] = a.accumulate ? _mm512_loadu_si512(a.c + (row + m) * a.c_stride + 16 * (panel + p))
                               : _mm512_set1_epi32(-128 * a.x_sum[row + m]);
  const std::byte* w = a.w + panel * a.panel_stride;
  const std::byte* ahead = w + kAheadBytes;
  const std::byte* next = kStream && a.next != nullptr ? a.next + panel * a.panel_stride : nullptr;
  const int8_t* x = a.x + row * a.x_stride;
  int64_t steps = a.k / 4;
  const auto step = [&] {
    __m512i v[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) v[p] = _mm512_loadu_si512(w + p * a.panel_stride);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      int32_t four = 0;
      __builtin_memcpy(&four, x + m * a.x_stride, 4);
      const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], v[p], value);
    }
    w += 64;
    x += 4;
  };
  if constexpr (kStream) {
    const int64_t near = steps > kAheadBytes / 64 ? steps - kAheadBytes / 64 : 0;
    for (int64_t s = 0; s < near; ++s) {
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * a.panel_stride, 0, 2);
      ahead += 64;
      step();
    }
    steps -= near;
    if (next != nullptr) {
      for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(next + p * a.panel_stride, 0, 2);
        next += 64;
        step();
      }
      steps = 0;
    }
  }
  for (int64_t s = 0; s < steps; ++s) step();
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
      _mm512_storeu_si512(a.c + (row + m) * a.c_stride + 16 * (panel + p), acc[m][p]);
}

template <int kRows>
void run_rows(const Int8Product& a, int64_t row, bool stream) {
  int64_t p = 0;
  if (stream) {
    if constexpr (kRows <= 2) {
      for (; p + 8 <= a.panels; p += 8) run_tile<kRows, 8, true>(a, row, p);
    }
    for (; p + 4 <= a.panels; p += 4) run_tile<kRows, 4, true>(a, row, p);
    for (; p + 2 <= a.panels; p += 2) run_tile<kRows, 2, true>(a, row, p);
    for (; p < a.panels; ++p) run_tile<kRows, 1, true>(a, row, p);
    return;
  }
  for (; p + 4 <= a.panels; p += 4) run_tile<kRows, 4, false>(a, row, p);
  for (; p + 2 <= a.panels; p += 2) run_tile<kRows, 2, false>(a, row, p);
  for (; p < a.panels; ++p) run_tile<kRows, 1, false>(a, row, p);
}

void multiply_int8(const Int8Product& a) {
  constexpr int64_t kTile = 6;
  const int64_t passes = (a.rows + kTile - 1) / kTile;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t row = a.rows * pass / passes;
    const bool stream = passes == 1;
    switch (a.rows * (pass + 1) / passes - row) {
      case 1: run_rows<1>(a, row, stream); break;
      case 2: run_rows<2>(a, row, stream); break;
      case 3: run_rows<3>(a, row, stream); break;
      case 4: run_rows<4>(a, row, stream); break;
      case 5: run_rows<5>(a, row, stream); break;
      default: run_rows<6>(a, row, stream); break;
    }
  }
}

int64_t peak(int64_t steps) {
  constexpr int kChains = 12;
  __m512i acc[kChains];
  for (__m512i& v : acc) v = _mm512_setzero_si512();
  __m512i w = _mm512_set1_epi8(3);
  __asm__ volatile("" : "+v"(w));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], w, w);
  }
  for (__m512i& v : acc) __asm__ volatile("" : "+v"(v));
  return steps * kChains * 128;
}
