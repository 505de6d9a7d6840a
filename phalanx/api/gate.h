#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/http_message.h"

namespace phalanx::api {

struct GateOptions {
  std::vector<std::string> key_digests;  // SHA-256 of the API keys, hexadecimal; none: no key asked
  std::vector<std::string> origins;      // allowed by CORS; {"*"}: all; none: no CORS headers
  std::vector<std::string> methods = {"*"};
  std::vector<std::string> headers = {"*"};
  bool credentials = false;
};

// Who may ask: API keys and cross-origin rules, decided by a request's head, before its body is
// read. Thread-safe.
class Gate {
 public:
  explicit Gate(GateOptions options) : options_(std::move(options)) {}

  // The answer to a request that does not come through: a CORS preflight, or 401 for a missing or
  // wrong key. Nothing: go on; `user` is then "key <n>" if keys are asked for. The health routes
  // need no key.
  [[nodiscard]] std::optional<HttpResponse> answer(const HttpRequest& head, std::string* user) const;
  // Header lines ("Name: value\r\n") that every answer to `head` carries.
  [[nodiscard]] std::string header_lines(const HttpRequest& head) const;

 private:
  [[nodiscard]] bool origin_allowed(std::string_view origin) const;
  GateOptions options_;
};

}  // namespace phalanx::api
