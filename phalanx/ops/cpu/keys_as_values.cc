#include "phalanx/ops/cpu/keys_as_values.h"

#if defined(__x86_64__)
#include "phalanx/ops/cpu/transpose.h"
#endif

namespace phalanx::ops::cpu {
namespace {

#if defined(__x86_64__)

__m256i load(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
void store(std::byte* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

// Rows of four 8-byte words: word i of row j becomes word j of row i.
void transpose4(__m256i (&r)[4]) {
  const __m256i a = _mm256_unpacklo_epi64(r[0], r[1]);
  const __m256i b = _mm256_unpackhi_epi64(r[0], r[1]);
  const __m256i c = _mm256_unpacklo_epi64(r[2], r[3]);
  const __m256i d = _mm256_unpackhi_epi64(r[2], r[3]);
  r[0] = _mm256_permute2x128_si256(a, c, 0x20);
  r[1] = _mm256_permute2x128_si256(b, d, 0x20);
  r[2] = _mm256_permute2x128_si256(a, c, 0x31);
  r[3] = _mm256_permute2x128_si256(b, d, 0x31);
}

// [i / 2][16][2] to [8][i][2]: a word of two positions by two channels moves as a whole.
void turn_bf16(const std::byte* keys, int64_t channels, std::byte* values) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1,
                                         4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int64_t i = 0; i < channels; i += 8) {
    for (int64_t j = 0; j < 8; j += 4) {
      __m256i r[4];
      for (int64_t p = 0; p < 4; ++p)
        r[p] = _mm256_shuffle_epi8(load(keys + (i / 2 + p) * 64 + j * 8), order);
      transpose4(r);
      for (int64_t p = 0; p < 4; ++p) store(values + ((j + p) * channels + i) * 4, r[p]);
    }
  }
}

void turn_i8(const std::byte* keys, int64_t channels, std::byte* values) {
  const __m256i order =
      _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7,
                       8, 10, 9, 11, 12, 14, 13, 15);
  for (int64_t i = 0; i < channels; i += 16) {
    __m256i r[8];
    for (int64_t p = 0; p < 8; ++p)
      r[p] = _mm256_shuffle_epi8(load(keys + (i / 2 + p) * 32), order);
    transpose8(r);
    for (int64_t j = 0; j < 8; ++j) store(values + (j * channels + i) * 2, r[j]);
  }
}

// [i][16] to [16][i].
void turn_f32(const std::byte* keys, int64_t channels, std::byte* values) {
  for (int64_t i = 0; i < channels; i += 8) {
    for (int64_t j = 0; j < 16; j += 8) {
      __m256i r[8];
      for (int64_t p = 0; p < 8; ++p) r[p] = load(keys + ((i + p) * 16 + j) * 4);
      transpose8(r);
      for (int64_t p = 0; p < 8; ++p) store(values + ((j + p) * channels + i) * 4, r[p]);
    }
  }
}

#endif

}  // namespace

void keys_as_values([[maybe_unused]] KvType type, [[maybe_unused]] const std::byte* keys,
                    [[maybe_unused]] int64_t channels, [[maybe_unused]] std::byte* values) {
#if defined(__x86_64__)
  switch (type) {
    case KvType::kF32: return turn_f32(keys, channels, values);
    case KvType::kBF16: return turn_bf16(keys, channels, values);
    case KvType::kI8: return turn_i8(keys, channels, values);
  }
#endif
}

}  // namespace phalanx::ops::cpu
