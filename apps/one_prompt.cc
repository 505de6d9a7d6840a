#include "apps/one_prompt.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "apps/generation_defaults.h"
#include "apps/instance.h"
#include "apps/config_log.h"
#include "apps/prompt_head.h"
#include "phalanx/base/log.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {

int one_prompt_main(int argc, char** argv) {
  ::umask(0027);
  ServeArguments arguments;
  std::string prompt = "What's deep learning?";
  CLI::App app{"Answers one prompt with the configured model, without HTTP."};
  app.add_option("--config-file", arguments.config_file, "config.json (else MIES_CONFIG_JSON_PATH, else <home>/conf/config.json)");
  app.add_option("--model", arguments.model, "checkpoint directory, instead of a config file");
  app.add_option("--tp", arguments.tp, "number of ranks, with --model")->check(CLI::Range(1, 1024));
  app.add_option("--prompt", prompt, "the prompt");
  CLI11_PARSE(app, argc, argv);
  const Environment environment = process_environment();
  const NodeConfig config = load_node_config(arguments, environment);
  std::vector<std::string> warnings = config.warnings;
  set_up_log(node_log_options(environment, warnings));
  for (const std::string& warning : warnings) log_warn("{}", warning);
  const NodePlan plan = plan_node(config, host_resources());
  Instance instance(config, plan);
  int failed = 0;
  if (instance.is_master()) {
    const auto tokenizer = text::Tokenizer::load(config.model.weight_path);
    engine::GenerateRequest request{.id = "self-test", .prompt = tokenizer->encode(prompt, true)};
    request.sampling.temperature = 0;
    request.sampling.max_tokens = 20;
    request.sampling.stop_token_ids = read_generation_defaults(config.model.weight_path).eos_token_ids;
    instance.set_head(std::make_unique<PromptHead>(
        instance, std::vector<engine::GenerateRequest>{std::move(request)}, 1,
        [tokenizer, prompt, &failed](const std::vector<PromptResult>& results) {
          const PromptResult& r = results.at(0);
          if (r.error) {
            fmt::print(stderr, "phalanx: {}\n", r.error->what());
            failed = 1;
            return;
          }
          fmt::print("prompt: {}\nanswer: {}\nself-test passed: {} tokens\n", prompt,
                     tokenizer->decode(r.tokens, true), r.tokens.size());
          std::fflush(stdout);
        }));
  }
  const int status = instance.run();
  return status != 0 ? status : failed;
}

}  // namespace phalanx::apps
