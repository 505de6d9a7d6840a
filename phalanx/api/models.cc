#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/core.h"

namespace phalanx::api {
namespace {

using OrderedJson = nlohmann::ordered_json;
constexpr auto kReplace = OrderedJson::error_handler_t::replace;
constexpr const char* kOwner = "MindIE Server";

// "/data/models/x" -> "***/x": the first two directories stay unsaid.
std::string hidden_root(const std::string& path) {
  size_t at = path.starts_with('/') ? 1 : 0;
  for (int i = 0; i < 2; ++i) {
    const size_t slash = path.find('/', at);
    if (slash == std::string::npos) return "***/" + path.substr(at);
    at = slash + 1;
  }
  return "***/" + path.substr(at);
}

}  // namespace

void mount_models(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "GET", "/v1/models",
               [core](const HttpRequest&, const std::shared_ptr<Responder>& responder) {
                 auto data = nlohmann::json::array();
                 const auto add = [&](const std::string& name, const std::string& parent,
                                      const std::string& path) {
                   data.push_back({{"id", name},
                                   {"object", "model"},
                                   {"created", core->started_at},
                                   {"owned_by", kOwner},
                                   {"parent", parent},
                                   {"root", hidden_root(path)},
                                   {"max_model_len", core->options.max_sequence}});
                 };
                 const ServiceOptions& o = core->options;
                 add(o.model_name, "null", o.model_path);
                 for (const std::string& name : o.model_aliases) add(name, "null", o.model_path);
                 for (const auto& adapter : core->engine.adapters())
                   add(adapter.name, o.model_name, adapter.path);
                 const nlohmann::json body{{"object", "list"}, {"data", std::move(data)}};
                 responder->respond({.body = body.dump(4, ' ', false, kReplace), .headers = {}});
               });
  server.route(kBusiness, "GET", "/v1/models/*",
               [core](const HttpRequest& request, const std::shared_ptr<Responder>& responder) {
                 const std::string name = request.path.substr(std::string("/v1/models/").size());
                 if (!core->options.is_model(name) && !core->options.is_adapter(name))
                   return responder->respond(
                       to_response(not_found(fmt::format("Model {} not found.", name))));
                 const OrderedJson body{{"id", name},
                                        {"object", "model"},
                                        {"created", core->started_at},
                                        {"owned_by", kOwner}};
                 responder->respond({.body = body.dump(-1, ' ', false, kReplace), .headers = {}});
               });
}

}  // namespace phalanx::api
