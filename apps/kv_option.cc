#include "apps/kv_option.h"

#include <fmt/format.h>

#include <string>

#include "phalanx/models/kv_format.h"

namespace phalanx::apps {

void add_kv_option(CLI::App& app, std::optional<models::KvDtype>& kv) {
  app.add_option_function<std::string>(
         "--kv-dtype,--kv-cache-dtype,--kv_dtype,--kv_cache_dtype",
         [&kv](const std::string& name) { kv = models::kv_dtype_of(name); },
         "KV cache: auto (as the checkpoint says), bf16 or int8")
      ->check([](const std::string& name) {
        return models::kv_dtype_of(name)
                   ? std::string()
                   : fmt::format("found {}, expected {}", name, models::kKvDtypeNames);
      });
}

}  // namespace phalanx::apps
