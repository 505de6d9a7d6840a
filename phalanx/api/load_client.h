#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace phalanx::api {

struct LoadTarget {
  std::string host = "127.0.0.1";
  uint16_t port = 1025;
  std::string path = "/v1/completions";
  double timeout_seconds = 600;  // of one request, from its connection on
};

struct LoadRequest {
  double at_seconds = 0;  // after the start
  std::string body;       // JSON; "stream": true is answered by events
};

// One `data:` line of a stream, or the whole body of another answer.
struct LoadPiece {
  int64_t at_ns = 0;
  std::string text;
};

struct LoadAnswer {
  int status = 0;      // of HTTP; 0: none came
  std::string error;   // why there is none, or why it broke off; empty: whole
  int64_t due_ns = 0;  // when the request should have been sent
  int64_t sent_ns = 0;
  int64_t end_ns = 0;
  std::vector<LoadPiece> pieces;
};

// Sends every request at its time, each on a connection of its own, at most `most_open` at once, and
// returns when all have ended. One thread. Never throws for what a server does.
[[nodiscard]] std::vector<LoadAnswer> run_load(const LoadTarget& target,
                                               const std::vector<LoadRequest>& requests,
                                               int64_t most_open);
// One request without a body. As run_load.
[[nodiscard]] LoadAnswer get_once(const LoadTarget& target);

}  // namespace phalanx::api
