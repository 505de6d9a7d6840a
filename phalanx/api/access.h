#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "phalanx/api/http_message.h"

namespace phalanx::api {

// One request that is over, for the access log. Never a body, a query, or a key.
struct AccessRecord {
  std::string peer;        // "127.0.0.1:51234"
  std::string user;        // "key 1", the subject of a client certificate, or empty
  std::string method;
  std::string path;        // without the query
  std::string request_id;  // of X-Request-Id, else ours
  std::string trace;       // traceparent, or the b3 headers, as they came; may be empty
  unsigned planes = 0;     // of the listener
  int status = 0;          // 499: the client left before the answer was complete
  bool stream = false;
  uint64_t bytes = 0;      // of the answer, heads included
  double first_byte_seconds = 0;  // from the whole request to the answer's beginning
  double seconds = 0;             // to its end
};

// `access 127.0.0.1:51234 - "POST /v1/completions" 200 512 bytes 0.012 s ...` on one line.
[[nodiscard]] std::string to_line(const AccessRecord& record);

// The client's name for its request: X-Request-Id, if it is 1 to 128 visible ASCII characters
// without quotes and backslashes, else empty.
[[nodiscard]] std::string_view own_request_id(const HttpRequest& request);
// `traceparent` (W3C) if well-formed, else "b3=..." of the b3 headers, else empty.
[[nodiscard]] std::string trace_of(const HttpRequest& request);
// Random, of version 4.
[[nodiscard]] std::string make_uuid();

}  // namespace phalanx::api
