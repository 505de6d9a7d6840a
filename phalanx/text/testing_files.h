#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace phalanx::text {

inline std::string testdata(const std::string& name) {
  return std::string(PHALANX_TESTDATA) + "/" + name;
}

// The imported demo model, or "" where it has not been fetched.
inline std::string demo_model() {
  std::filesystem::path cache;
  if (const char* dir = std::getenv("XDG_CACHE_HOME"); dir != nullptr && *dir != '\0')
    cache = dir;
  else if (const char* home = std::getenv("HOME"))
    cache = std::filesystem::path(home) / ".cache";
  const auto model = cache / "phalanx" / "SmolLM2-135M-Instruct";
  return std::filesystem::exists(model / "tokenizer.json") ? model.string() : "";
}

}  // namespace phalanx::text
