#include "phalanx/api/refusal.h"

#include <nlohmann/json.hpp>

namespace phalanx::api {

std::string to_json(const Refusal& refusal) {
  nlohmann::ordered_json body;
  body["error"] = refusal.error;
  body["error_type"] = refusal.error_type;
  return body.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

HttpResponse to_response(const Refusal& refusal) {
  HttpResponse response{.status = refusal.status, .body = to_json(refusal), .headers = {}};
  if (refusal.retry_after_s > 0)
    response.headers.emplace_back("Retry-After", std::to_string(refusal.retry_after_s));
  return response;
}

Refusal not_found(std::string error) { return {404, "NotFoundError", std::move(error), 0}; }
Refusal generation_error(std::string error) { return {424, "Generation Error", std::move(error), 0}; }
Refusal incomplete_generation(std::string error) {
  return {500, "Incomplete Generation", std::move(error), 0};
}
Refusal unavailable(std::string error, int retry_after_s) {
  return {503, "Service Unavailable", std::move(error), retry_after_s};
}

}  // namespace phalanx::api
