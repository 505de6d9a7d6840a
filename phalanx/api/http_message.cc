#include "phalanx/api/http_message.h"

namespace phalanx::api {

std::string_view HttpRequest::header(std::string_view lower_name) const {
  for (const auto& [name, value] : headers)
    if (name == lower_name) return value;
  return {};
}

}  // namespace phalanx::api
