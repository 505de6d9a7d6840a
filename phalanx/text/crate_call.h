#pragma once

#include <string>
#include <string_view>

#include "phalanx/text/crate/phalanx_text.h"

namespace phalanx::text {

[[nodiscard]] inline PtxText lend(std::string_view text) { return {text.data(), text.size()}; }

[[nodiscard]] inline std::string take(PtxBytes bytes) {
  std::string text(reinterpret_cast<const char*>(bytes.data), bytes.size);
  ptx_bytes_free(bytes);
  return text;
}

}  // namespace phalanx::text
