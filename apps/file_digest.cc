#include "apps/file_digest.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/net/digest.h"

namespace phalanx::apps {
namespace {

// Enough to tell files apart in a table that people read.
std::string digest(std::string_view bytes) { return net::sha256_hex(bytes).substr(0, 16); }

}  // namespace

std::string file_digest(const std::string& path) {
  constexpr int64_t kMostBytes = 500 << 20;
  try {
    return digest(read_text_file(path, kMostBytes));
  } catch (const Error& e) {
    if (e.code() == Code::kNotFound) return "absent";
    throw;
  }
}

std::string weights_digest(const std::string& directory) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  // Headers were verified by check_checkpoint before, so the length is sane.
  std::string all = file_digest(directory + "/model.safetensors.index.json");
  for (const std::filesystem::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    uint64_t length = 0;
    file.read(reinterpret_cast<char*>(&length), sizeof length);
    std::string header(static_cast<size_t>(std::min<uint64_t>(length, 500u << 20)), '\0');
    file.read(header.data(), static_cast<std::streamsize>(header.size()));
    all += path.filename().string() + digest(header);
  }
  return digest(all);
}

}  // namespace phalanx::apps
