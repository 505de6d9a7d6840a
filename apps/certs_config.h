#pragma once

#include <string>

namespace phalanx::apps {

// A config.json in which HTTPS and TLS between nodes are switched on, everything else as it was.
class SecureConfig {
 public:
  // Throws Error naming the file: unreadable, no JSON, or without ServerConfig or BackendConfig.
  [[nodiscard]] static SecureConfig read(const std::string& path);
  // In one step; the file keeps its mode.
  void write() const;

 private:
  std::string path_, text_;
  unsigned mode_ = 0640;
};

}  // namespace phalanx::apps
