#include "phalanx/api/gate.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "phalanx/net/digest.h"

namespace phalanx::api {
namespace {

constexpr std::string_view kAllMethods = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT";
constexpr int kPreflightSeconds = 600;

// In a time that does not depend on where they differ.
bool same_digest(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i)
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  return difference == 0;
}

std::string_view presented_key(const HttpRequest& head) {
  constexpr std::string_view kBearer = "bearer ";
  const std::string_view value = head.header("authorization");
  if (value.size() > kBearer.size() &&
      std::equal(kBearer.begin(), kBearer.end(), value.begin(),
                 [](char a, char b) { return a == (b | 0x20); })) {
    std::string_view key = value.substr(kBearer.size());
    while (!key.empty() && key.front() == ' ') key.remove_prefix(1);
    return key;
  }
  return head.header("x-api-key");
}

bool is_health(std::string_view path) {
  return path == "/health" || path.starts_with("/v2/health/");
}

std::string listed(const std::vector<std::string>& values, std::string_view all) {
  const bool every = std::find(values.begin(), values.end(), "*") != values.end();
  return every ? std::string(all) : fmt::format("{}", fmt::join(values, ", "));
}

}  // namespace

bool Gate::origin_allowed(std::string_view origin) const {
  return !origin.empty() && std::any_of(options_.origins.begin(), options_.origins.end(),
                                        [&](const auto& o) { return o == "*" || o == origin; });
}

std::string Gate::header_lines(const HttpRequest& head) const {
  const std::string_view origin = head.header("origin");
  if (!origin_allowed(origin)) return options_.origins.empty() ? "" : "Vary: Origin\r\n";
  const bool any = !options_.credentials &&
                   std::find(options_.origins.begin(), options_.origins.end(), "*") !=
                       options_.origins.end();
  return fmt::format("Access-Control-Allow-Origin: {}\r\n{}{}"
                     "Access-Control-Expose-Headers: X-Request-Id, X-Phalanx-Ignored\r\n",
                     any ? "*" : origin, any ? "" : "Vary: Origin\r\n",
                     options_.credentials ? "Access-Control-Allow-Credentials: true\r\n" : "");
}

std::optional<HttpResponse> Gate::answer(const HttpRequest& head, std::string* user) const {
  if (!options_.origins.empty() && head.method == "OPTIONS" &&
      !head.header("access-control-request-method").empty()) {
    if (!origin_allowed(head.header("origin")))
      return HttpResponse{.status = 400,
                          .content_type = "text/plain",
                          .body = "Disallowed CORS origin",
                          .headers = {}};
    return HttpResponse{
        .status = 200,
        .content_type = "text/plain",
        .body = "OK",
        .headers = {{"Access-Control-Allow-Methods", listed(options_.methods, kAllMethods)},
                    {"Access-Control-Allow-Headers",
                     listed(options_.headers, head.header("access-control-request-headers"))},
                    {"Access-Control-Max-Age", std::to_string(kPreflightSeconds)}}};
  }
  if (options_.key_digests.empty() || is_health(head.path)) return std::nullopt;
  const std::string_view key = presented_key(head);
  const std::string digest = net::sha256_hex(key);
  size_t found = 0;
  for (size_t i = 0; i < options_.key_digests.size(); ++i)
    if (same_digest(options_.key_digests[i], digest)) found = i + 1;
  if (found > 0 && !key.empty()) {
    *user = fmt::format("key {}", found);
    return std::nullopt;
  }
  const std::string_view text =
      key.empty() ? "You did not provide an API key. Send it as 'Authorization: Bearer <key>'."
                  : "Incorrect API key provided.";
  return HttpResponse{
      .status = 401,
      .body = fmt::format("{{\"error\":{{\"message\":\"{}\",\"type\":\"invalid_request_error\","
                          "\"param\":null,\"code\":\"invalid_api_key\"}}}}",
                          text),
      .headers = {{"WWW-Authenticate", "Bearer"}}};
}

}  // namespace phalanx::api
