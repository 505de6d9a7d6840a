#include "phalanx/text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace phalanx::text {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : stops_(std::move(stops)), include_stop_(include_stop) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

StopMatcher::Result StopMatcher::push(std::string_view piece) {
  Result result;
  if (stopped_) return result;
  held_ += piece;
  size_t end = std::string::npos;
  const std::string* found = nullptr;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    const size_t stop_end = at + stop.size();
    if (found == nullptr || stop_end < end || (stop_end == end && stop.size() > found->size())) {
      end = stop_end;
      found = &stop;
    }
  }
  if (found != nullptr) {
    stopped_ = true;
    result.stopped = true;
    result.matched = *found;
    result.emit = held_.substr(0, include_stop_ ? end : end - found->size());
    held_.clear();
    return result;
  }
  const size_t decided = held_.size() - undecided();
  result.emit = held_.substr(0, decided);
  held_.erase(0, decided);
  return result;
}

std::string StopMatcher::flush() { return std::exchange(held_, {}); }

size_t StopMatcher::undecided() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(held_.size(), stop.size() - 1); n > longest; --n) {
      if (held_.ends_with(std::string_view(stop).substr(0, n))) {
        longest = n;
        break;
      }
    }
  }
  return longest;
}

}  // namespace phalanx::text
