#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/http_message.h"

namespace phalanx::api {

// Which handler answers which path. Filled before the server starts, only read afterwards.
class Router {
 public:
  // `pattern` matches exactly, or as a prefix when it ends in '*'; the first match in order of
  // adding wins.
  void add(Plane plane, std::string method, std::string pattern, Handler handler);
  // Null when there is none; then `status` is 404, or 405 with the methods of that path in `allow`.
  [[nodiscard]] const Handler* find(unsigned planes, std::string_view method, std::string_view path,
                                    int* status, std::string* allow) const;

 private:
  struct Route {
    unsigned plane;
    std::string method;
    std::string pattern;
    bool prefix;
    Handler handler;
  };
  std::vector<Route> routes_;
};

}  // namespace phalanx::api
