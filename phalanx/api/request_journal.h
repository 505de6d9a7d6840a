#pragma once

#include <memory>

#include "phalanx/api/http_server.h"
#include "phalanx/api/journal_file.h"

namespace phalanx::api {

// Accepted requests outlive this process: each generation that is no stream is in a file, on the disk,
// before it begins, and leaves it when its client has the answer, or has left. The next process
// answers what it finds there, through the same routes, and keeps the answers to be fetched:
//
//   GET /v1/requests/ID   ID: the X-Request-Id that the request came with
//
// gives the answer as the client would have had it, once; 202 while it is being made; 404 otherwise.
// Answers that nobody fetches are kept for an hour. Who fetches must be who asked (the same API key or
// certificate). The file holds prompts in clear (mode 0600), never API keys.
class RequestJournal {
 public:
  explicit RequestJournal(JournalFile file);
  ~RequestJournal();
  // Before the routes that are to be kept are mounted; mounts the route above.
  void mount(Server& server);
  // After Server::start(): answers what was left.
  void answer_what_was_left();

 private:
  struct State;
  class KeptAnswer;
  class WatchedAnswer;
  std::shared_ptr<State> state_;
};

}  // namespace phalanx::api
