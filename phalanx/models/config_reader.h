#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"

namespace phalanx::models {

// Typed look at a JSON object of config.json. A wrong type or value becomes a Problem naming file,
// key, found and expected, and the default (or the least allowed value) is returned, so that all
// problems show at once. null counts as absent. Keys in messages are whole paths
// ("rope_scaling.factor").
class ConfigReader {
 public:
  // Throws Error naming the file when it is missing, too large or not a JSON object.
  ConfigReader(const std::string& path, Problems& problems);

  [[nodiscard]] bool has(std::string_view key) const;
  // Without a default the key is required.
  int64_t integer(std::string_view key, int64_t least, int64_t most,
                  std::optional<int64_t> absent = std::nullopt) const;
  double number(std::string_view key, double least, double most,
                std::optional<double> absent = std::nullopt) const;
  bool boolean(std::string_view key, bool absent) const;
  std::string text(std::string_view key, std::optional<std::string> absent = std::nullopt) const;
  // Lists; empty when absent.
  std::vector<std::string> texts(std::string_view key) const;
  std::vector<int64_t> integers(std::string_view key, int64_t least, int64_t most) const;
  // nullopt when absent or (after adding a problem) no object.
  std::optional<ConfigReader> object(std::string_view key) const;

  // Adds a problem about `key`.
  void refuse(std::string_view key, std::string what, std::string expected,
              std::string fix = "") const;
  [[nodiscard]] const std::string& path() const;

 private:
  struct Node;
  ConfigReader(std::shared_ptr<const Node> node, Problems& problems);
  std::shared_ptr<const Node> node_;
  Problems* problems_;
};

}  // namespace phalanx::models
