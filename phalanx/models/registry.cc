#include "phalanx/models/registry.h"

#include <fmt/format.h>

#include <array>

#include "phalanx/layers/weight_plan.h"
#include "phalanx/weights/checkpoint.h"
#include "phalanx/weights/quant_formats.h"

namespace phalanx::models {
namespace {

constexpr std::array<std::string_view, 1> kRotaryTables = {".rotary_emb.inv_freq"};

constexpr std::array<Family, 2> kFamilies = {{
    {"llama", read_llama, kRotaryTables},
    {"mistral", read_mistral, kRotaryTables},
}};

}  // namespace

std::span<const Family> families() { return kFamilies; }

const Family& family_of(const ConfigReader& config) {
  const std::string model_type = config.text("model_type", "");
  std::string known;
  for (const Family& family : kFamilies) {
    if (family.model_type == model_type) return family;
    known += (known.empty() ? "" : ", ") + std::string(family.model_type);
  }
  throw Error(Code::kInvalidArgument,
              to_string(Problem{.what = model_type.empty() ? "key missing" : "unknown model family",
                                .where = config.path() + ": model_type",
                                .found = model_type,
                                .expected = "one of " + known,
                                .fix = "use a checkpoint of one of these families"}));
}

FamilyConfig read_config(const std::string& directory) {
  Problems problems;
  const ConfigReader reader(directory + "/config.json", problems);
  const Family& family = family_of(reader);
  DecoderConfig config = family.read(reader);
  config.info.formats = weights::read_quant_formats(directory, problems);
  problems.throw_if_any(fmt::format("model {} cannot be used", directory));
  config.info.model_type = family.model_type;
  config.info.parameter_bytes = parameter_bytes(config.info);
  return {&family, config};
}

ModelInfo read_model_info(const std::string& directory) {
  return read_config(directory).config.info;
}

void check_checkpoint(const std::string& directory) {
  const FamilyConfig found = read_config(directory);
  Problems problems;
  const weights::Checkpoint checkpoint(directory, problems);
  if (problems.empty()) verify_checkpoint(found.config.info, checkpoint, problems);
  problems.throw_if_any(fmt::format("checkpoint {} cannot be used", directory));
}

std::unique_ptr<Model> load_model(const ModelOptions& options, comm::Group& group, ThreadPool& pool,
                                  const std::function<void(int64_t, int64_t)>& progress) {
  const FamilyConfig found = read_config(options.directory);
  return std::make_unique<DecoderModel>(found.config, found.family->known_extras, options, group,
                                        pool, progress);
}

}  // namespace phalanx::models
