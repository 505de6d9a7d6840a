#include "phalanx/api/router.h"

#include <utility>

namespace phalanx::api {

void Router::add(Plane plane, std::string method, std::string pattern, Handler handler) {
  const bool prefix = pattern.ends_with('*');
  if (prefix) pattern.pop_back();
  routes_.push_back({plane, std::move(method), std::move(pattern), prefix, std::move(handler)});
}

const Handler* Router::find(unsigned planes, std::string_view method, std::string_view path,
                            int* status, std::string* allow) const {
  *status = 404;
  for (const Route& route : routes_) {
    if ((route.plane & planes) == 0) continue;
    if (route.prefix ? !path.starts_with(route.pattern) : path != route.pattern) continue;
    if (route.method == method) return &route.handler;
    *status = 405;
    if (allow->find(route.method) == std::string::npos)
      *allow += (allow->empty() ? "" : ", ") + route.method;
  }
  return nullptr;
}

}  // namespace phalanx::api
