#pragma once

#include <exception>
#include <string>
#include <utility>

#include "phalanx/api/http_server.h"

namespace phalanx::api {

// What a request gets instead of its result: status, and a body {"error", "error_type"}.
struct Refusal {
  int status = 422;
  std::string error_type = "Input Validation Error";
  std::string error;
  int retry_after_s = 0;  // > 0: a Retry-After header
};

// Thrown by parsers, caught where the request was received.
class Refused : public std::exception {
 public:
  explicit Refused(Refusal refusal) : refusal_(std::move(refusal)) {}
  explicit Refused(std::string error) { refusal_.error = std::move(error); }
  [[nodiscard]] const Refusal& refusal() const { return refusal_; }
  [[nodiscard]] const char* what() const noexcept override { return refusal_.error.c_str(); }

 private:
  Refusal refusal_;
};

[[nodiscard]] std::string to_json(const Refusal& refusal);
[[nodiscard]] HttpResponse to_response(const Refusal& refusal);

// The refusals that several routes share.
[[nodiscard]] Refusal not_found(std::string error);
[[nodiscard]] Refusal generation_error(std::string error);        // 424
[[nodiscard]] Refusal incomplete_generation(std::string error);   // 500
[[nodiscard]] Refusal unavailable(std::string error, int retry_after_s = 0);

}  // namespace phalanx::api
