#pragma once

// For the tests that feed parsers with damaged input. Header only; no product code includes it.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <random>
#include <string>
#include <vector>

namespace phalanx {

// Time for one parser: PHALANX_FUZZ_SECONDS, 1 without it (make fuzz and CI give more).
inline std::chrono::duration<double> fuzz_time() {
  const char* text = std::getenv("PHALANX_FUZZ_SECONDS");
  return std::chrono::duration<double>(text != nullptr ? std::atof(text) : 1.0);
}

// Draws from one seed, so that a failure comes again: its number is printed by the caller.
class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  uint64_t below(uint64_t n) { return n == 0 ? 0 : random_() % n; }

  // One to eight changes: bits, bytes, little-endian numbers that parsers trip over, digits, copied,
  // removed or doubled pieces, a cut.
  std::string mutate(std::string bytes) {
    const uint64_t changes = 1 + below(8);
    for (uint64_t i = 0; i < changes && !bytes.empty(); ++i) change(bytes);
    return bytes;
  }

 private:
  void change(std::string& bytes) {
    static constexpr uint64_t kNumbers[] = {0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x7fffffff, 0x80000000,
                                            0xffffffff, 0x7fffffffffffffff, 0x8000000000000000,
                                            0xfffffffffffffff8, 0xffffffffffffffff};
    static constexpr const char* kTexts[] = {"-1", "0", "9223372036854775807",
                                             "18446744073709551615", "1e308", "[]", "{}", "null",
                                             "\"\"", "true", "../", "\\u0000"};
    const size_t at = below(bytes.size());
    switch (below(8)) {
      case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8))); break;
      case 1: bytes[at] = static_cast<char>(below(256)); break;
      case 2: {
        const uint64_t number = kNumbers[below(std::size(kNumbers))];
        for (size_t i = 0; i < 8 && at + i < bytes.size(); ++i)
          bytes[at + i] = static_cast<char>(number >> (8 * i));
        break;
      }
      case 3: bytes.replace(at, below(4), kTexts[below(std::size(kTexts))]); break;
      case 4: bytes.erase(at, 1 + below(16)); break;
      case 5: bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(64))); break;
      case 6: bytes[at] = static_cast<char>('0' + below(10)); break;
      default:
        if (below(4) == 0) bytes.resize(at);
    }
  }

  std::mt19937_64 random_;
};

// try_one(input) for mutations of the seeds until the time is over; says how many were tried.
template <typename TryOne>
int64_t fuzz(const std::vector<std::string>& seeds, TryOne try_one) {
  const auto end = std::chrono::steady_clock::now() + fuzz_time();
  int64_t tried = 0;
  do {
    Mutator mutator(static_cast<uint64_t>(tried) + 1);
    try_one(mutator.mutate(seeds[mutator.below(seeds.size())]), tried);
    ++tried;
  } while (std::chrono::steady_clock::now() < end);
  return tried;
}

}  // namespace phalanx
