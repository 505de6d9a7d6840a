#pragma once

#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace phalanx {

// Names and numbers follow gRPC's status codes, so that the two map one to one.
enum class Code {
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
};

[[nodiscard]] std::string_view code_name(Code code);

// What ends an operation. Ordinary answers (queue full, no free block) are values instead. Copies
// share their text and may be read and destroyed in different threads.
class Error : public std::exception {
 public:
  Error(Code code, std::string message)
      : code_(code), message_(std::make_shared<const std::string>(std::move(message))) {}
  // Declared, so that a move copies: an error that was moved from still has its text.
  Error(const Error&) = default;
  Error& operator=(const Error&) = default;
  [[nodiscard]] Code code() const { return code_; }
  [[nodiscard]] const char* what() const noexcept override { return message_->c_str(); }

 private:
  Code code_;
  std::shared_ptr<const std::string> message_;  // no copy of an exception may throw
};

// One finding of a validation: what is wrong, where, what was found, what was expected, how to fix.
struct Problem {
  std::string what;
  std::string where;     // file and key path, or command-line option
  std::string found;     // may be empty
  std::string expected;  // may be empty
  std::string fix;       // may be empty
};

// "what: where: found X, expected Y. Fix: ..." on one line.
[[nodiscard]] std::string to_string(const Problem& problem);

// Collects findings so that all are shown at once. Not thread-safe.
class Problems {
 public:
  void add(Problem problem) { problems_.push_back(std::move(problem)); }
  void add_all(const Problems& other);
  [[nodiscard]] bool empty() const { return problems_.empty(); }
  [[nodiscard]] const std::vector<Problem>& list() const { return problems_; }
  // One numbered line per problem.
  [[nodiscard]] std::string to_string() const;
  // Throws Error(kInvalidArgument, title + all problems) unless empty.
  void throw_if_any(std::string_view title) const;

 private:
  std::vector<Problem> problems_;
};

}  // namespace phalanx
