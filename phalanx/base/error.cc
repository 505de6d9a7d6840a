#include "phalanx/base/error.h"

#include <fmt/format.h>

namespace phalanx {

std::string_view code_name(Code code) {
  switch (code) {
    case Code::kCancelled: return "cancelled";
    case Code::kUnknown: return "unknown";
    case Code::kInvalidArgument: return "invalid argument";
    case Code::kDeadlineExceeded: return "deadline exceeded";
    case Code::kNotFound: return "not found";
    case Code::kAlreadyExists: return "already exists";
    case Code::kPermissionDenied: return "permission denied";
    case Code::kResourceExhausted: return "resource exhausted";
    case Code::kFailedPrecondition: return "failed precondition";
    case Code::kAborted: return "aborted";
    case Code::kOutOfRange: return "out of range";
    case Code::kUnimplemented: return "unimplemented";
    case Code::kInternal: return "internal";
    case Code::kUnavailable: return "unavailable";
    case Code::kDataLoss: return "data loss";
  }
  return "unknown";
}

std::string to_string(const Problem& p) {
  std::string text = p.where.empty() ? p.what : fmt::format("{}: {}", p.where, p.what);
  if (!p.found.empty()) text += fmt::format(", found {}", p.found);
  if (!p.expected.empty()) text += fmt::format(", expected {}", p.expected);
  if (!p.fix.empty()) text += fmt::format(". Fix: {}", p.fix);
  return text;
}

void Problems::add_all(const Problems& other) {
  problems_.insert(problems_.end(), other.problems_.begin(), other.problems_.end());
}

std::string Problems::to_string() const {
  std::string text;
  for (size_t i = 0; i < problems_.size(); ++i) {
    if (i > 0) text += '\n';
    text += fmt::format("  {}. {}", i + 1, phalanx::to_string(problems_[i]));
  }
  return text;
}

void Problems::throw_if_any(std::string_view title) const {
  if (problems_.empty()) return;
  throw Error(Code::kInvalidArgument,
              fmt::format("{} ({} problem{})\n{}", title, problems_.size(),
                          problems_.size() == 1 ? "" : "s", to_string()));
}

}  // namespace phalanx
