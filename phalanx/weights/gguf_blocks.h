#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace phalanx::weights {

// Tensor types of GGUF files, with the numbers that stand in the files (ggml's ggml_type).
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

// "Q4_1", also for types that cannot be read ("IQ2_XS"); "type 77" for unknown numbers.
[[nodiscard]] std::string gguf_type_name(uint32_t type);
[[nodiscard]] bool gguf_type_supported(uint32_t type);

// Storage of a supported type: `elements` consecutive values lie in `bytes`.
struct GgufBlock {
  int64_t elements;
  int64_t bytes;
};
[[nodiscard]] GgufBlock gguf_block(GgufType type);

// Whole blocks to floats, exactly as the format defines them: out.size() is a multiple of the
// block's elements and `blocks` holds as many bytes as they need.
void gguf_dequantize(GgufType type, std::span<const std::byte> blocks, std::span<float> out);

}  // namespace phalanx::weights
