#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "phalanx/models/model.h"

namespace phalanx::models {

// What the KV cache of a model holds.
struct KvFormat {
  tensor::DType dtype = tensor::DType::kBF16;
  // Of int8: by the checkpoint's scales per channel (msModelSlim's C8), or one scale per token and
  // head, found while storing.
  bool fixed_scales = false;
  bool row_scales = false;
};
[[nodiscard]] KvFormat kv_format(const ModelInfo& info, KvDtype choice);

// "int8 (scales of the checkpoint, per channel)", for the start-up report.
[[nodiscard]] std::string kv_format_text(const ModelInfo& info, KvDtype choice);

// As options spell it: auto, bf16, int8, and vLLM's bfloat16. nullopt: none of them.
[[nodiscard]] std::optional<KvDtype> kv_dtype_of(std::string_view name);
[[nodiscard]] std::string_view kv_dtype_name(KvDtype choice);
inline constexpr std::string_view kKvDtypeNames = "auto, bf16 (bfloat16) or int8";

}  // namespace phalanx::models
