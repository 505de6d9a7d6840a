#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace phalanx::api {

struct HttpRequest {
  std::string method;
  std::string path;                                          // without the query
  std::string query;
  std::vector<std::pair<std::string, std::string>> headers;  // names lower-cased
  std::string body;
  std::string peer;                                          // "127.0.0.1:51234"
  std::string id;    // X-Request-Id as sent, else of our making
  std::string user;  // who asks: "key 1", the subject of a client certificate, or empty
  [[nodiscard]] std::string_view header(std::string_view lower_name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

// How a handler answers, now or later, from any thread. Exactly one of respond(), or
// start_stream() followed by write()... end(). Once the client is gone the calls have no effect. A
// responder dropped without an answer answers 500; one dropped in the middle of a stream cuts it.
class Responder {
 public:
  virtual ~Responder() = default;
  virtual void respond(HttpResponse response) = 0;
  virtual void start_stream(int status, std::string content_type,
                            std::vector<std::pair<std::string, std::string>> headers = {}) = 0;
  virtual void write(std::string bytes) = 0;
  virtual void end() = 0;
  // Called once, from an io thread, if the client leaves (or the server stops) before the answer is
  // complete; at once, from any thread, if it has left already.
  virtual void on_disconnect(std::function<void()> callback) = 0;
};

// Called on an io thread; long work (tokenising a big prompt) should go to `Server::post_work`.
using Handler = std::function<void(HttpRequest, std::shared_ptr<Responder>)>;

enum Plane : unsigned { kBusiness = 1, kManagement = 2, kMetrics = 4 };

}  // namespace phalanx::api
