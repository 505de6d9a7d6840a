#include "phalanx/models/kv_format.h"

namespace phalanx::models {

using tensor::DType;

KvFormat kv_format(const ModelInfo& info, KvDtype choice) {
  const bool stored = info.formats != nullptr && info.formats->kv_int8;
  if (choice == KvDtype::kBf16) return {.dtype = DType::kBF16};
  if (choice == KvDtype::kCheckpoint && !stored) return {.dtype = info.act};
  return {.dtype = DType::kI8, .fixed_scales = stored, .row_scales = !stored};
}

std::string kv_format_text(const ModelInfo& info, KvDtype choice) {
  const KvFormat format = kv_format(info, choice);
  if (format.fixed_scales) return "int8 (C8: the checkpoint's scales per channel)";
  if (format.row_scales) return "int8 (a scale per token and head)";
  const bool unused = info.formats != nullptr && info.formats->kv_int8;
  return std::string(tensor::dtype_name(format.dtype)) +
         (unused ? " (the checkpoint's scales for int8 are not used)" : "");
}

std::string_view kv_dtype_name(KvDtype choice) {
  switch (choice) {
    case KvDtype::kCheckpoint: return "auto";
    case KvDtype::kBf16: return "bf16";
    case KvDtype::kInt8: return "int8";
  }
  return "";
}

std::optional<KvDtype> kv_dtype_of(std::string_view name) {
  if (name == "auto") return KvDtype::kCheckpoint;
  if (name == "bf16" || name == "bfloat16") return KvDtype::kBf16;
  if (name == "int8") return KvDtype::kInt8;
  return std::nullopt;
}

}  // namespace phalanx::models
