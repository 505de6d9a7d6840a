#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace phalanx::text {

// Looks for stop strings in a stream of text pieces, cut at any byte. Text that may begin a stop
// string is held back until that is decided, so nothing of a stop string ever leaves (unless
// include_stop). The match that ends first wins, of two that end together the longer one; so the
// answer does not depend on how the text was cut. Not thread-safe.
class StopMatcher {
 public:
  // Empty stop strings are ignored.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  struct Result {
    std::string emit;  // to hand on
    bool stopped = false;
    std::string matched;  // the stop string, when stopped
  };
  // After a match nothing more is emitted.
  [[nodiscard]] Result push(std::string_view piece);
  // What was held back, at the end of a stream that met no stop string.
  [[nodiscard]] std::string flush();

 private:
  // Bytes at the end of held_ that are a proper prefix of some stop string.
  [[nodiscard]] size_t undecided() const;

  std::vector<std::string> stops_;
  bool include_stop_;
  bool stopped_ = false;
  std::string held_;
};

}  // namespace phalanx::text
