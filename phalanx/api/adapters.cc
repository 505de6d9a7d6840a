// POST /v1/load_lora_adapter and /v1/unload_lora_adapter (rest-api sheet, 2.4; vLLM has the same
// two).

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "phalanx/api/core.h"
#include "phalanx/api/fields.h"
#include "phalanx/api/inference.h"
#include "phalanx/api/refusal.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

constexpr size_t kMostName = 256;
constexpr size_t kMostPath = 4096;

Refusal bad_request(std::string error) { return {400, "Bad Request", std::move(error), 0}; }

Refusal refusal_of(const Error& error) {
  switch (error.code()) {
    case Code::kNotFound:
      return not_found(error.what());
    case Code::kUnavailable:
    case Code::kAborted:
      return unavailable(error.what(), 1);
    case Code::kInternal:
      return incomplete_generation(error.what());
    default:
      return bad_request(error.what());
  }
}

json parse_request(const HttpRequest& request, const ServiceOptions& options) {
  try {
    return parse_body(request.body, options.max_json_depth);
  } catch (const Refused& refused) {
    throw Refused(fmt::format("Req body converts to json fail. {}", refused.what()));
  }
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-';
}

std::string read_name(Fields& fields) {
  const std::string name = fields.string("lora_name").value_or("");
  if (name.empty() || name.size() > kMostName || !std::all_of(name.begin(), name.end(), is_word))
    throw Refused(
        bad_request(fmt::format("Input invalid lora name: found '{}', expected lora_name with 1 to "
                                "{} of letters, digits, '_' "
                                "and '-'",
                                name.substr(0, 64), kMostName)));
  return name;
}

std::string read_path(Fields& fields) {
  const std::string path = fields.string("lora_path").value_or("");
  const bool plain = std::all_of(path.begin(), path.end(),
                                 [](char c) { return is_word(c) || c == '.' || c == '/'; });
  const bool climbs = path == ".." || path.starts_with("../") || path.ends_with("/..") ||
                      path.find("/../") != std::string::npos;
  if (!path.starts_with('/') || path.size() > kMostPath || !plain || climbs)
    throw Refused(bad_request(
        fmt::format("Input invalid lora path: found '{}', expected lora_path, the adapter's "
                    "directory on every node, "
                    "as an absolute path of letters, digits, '_', '-', '.' and '/' without '..'",
                    path.substr(0, 200))));
  return path;
}

void respond(Responder& responder, const char* done, const std::string& name,
             const std::vector<std::string>& ignored) {
  log_info("LoRA adapter '{}' {}", name, done);
  responder.respond({.content_type = "text/plain",
                     .body = fmt::format("Success: LoRA adapter '{}' {} successfully.", name, done),
                     .headers = ignored_headers(ignored)});
}

void load(const std::shared_ptr<Core>& core, const HttpRequest& request,
          const std::shared_ptr<Responder>& responder) {
  core->require_serving();
  const ServiceOptions& options = core->options;
  const json body = parse_request(request, options);
  Fields fields(body);
  const std::string name = read_name(fields);
  const std::string path = read_path(fields);
  if (options.is_model(name))
    throw Refused(bad_request(fmt::format(
        "Input invalid lora name: '{}' is the name of the base model. Choose another", name)));
  for (const char* key : {"master_model", "base_model_name"}) {
    const auto base = fields.string(key);
    if (base && !base->empty() && !options.is_model(*base))
      throw Refused(
          not_found(fmt::format("Lora base model not found. Please check. Lora name is {}: "
                                "{} is '{}', expected '{}'",
                                name, key, base->substr(0, 256), options.model_name)));
  }
  if (fields.boolean("load_inplace").value_or(false))
    throw Refused(
        bad_request("load_inplace is not supported: unload the adapter first, then load it"));
  if (options.check_adapter) options.check_adapter(path);
  core->engine.load_adapter(
      name, path,
      [core, responder, name, ignored = fields.unread()](const std::optional<Error>& error) {
        if (!error) return respond(*responder, "added", name, ignored);
        log_warn("LoRA adapter '{}' was not loaded: {}", name, error->what());
        responder->respond(to_response(refusal_of(*error)));
      });
}

void unload(const std::shared_ptr<Core>& core, const HttpRequest& request,
            const std::shared_ptr<Responder>& responder) {
  const json body = parse_request(request, core->options);
  Fields fields(body);
  const std::string name = read_name(fields);
  (void)fields.find("lora_int_id");
  core->engine.unload_adapter(name);
  respond(*responder, "removed", name, fields.unread());
}

}  // namespace

void mount_adapters(const std::shared_ptr<Core>& core, Server& server) {
  const auto post = [&](const char* path, auto handle) {
    server.route(kManagement, "POST", path,
                 [core, handle](HttpRequest request, std::shared_ptr<Responder> responder) {
                   core->handle(responder, [core, handle, request = std::move(request), responder] {
                     try {
                       handle(core, request, responder);
                     } catch (const Error& error) {
                       responder->respond(to_response(refusal_of(error)));
                     }
                   });
                 });
  };
  post("/v1/load_lora_adapter", load);
  post("/v1/unload_lora_adapter", unload);
}

}  // namespace phalanx::api
