#pragma once

#include "apps/config.h"

namespace CLI {
class App;
}

namespace phalanx::apps {

// The options of `serve` that say what to serve and to whom; `check` takes the same.
void add_serve_options(CLI::App& app, ServeArguments& arguments);
// Overwrites API keys in the process's command line, which everybody on the machine can read.
void hide_secrets(const ServeArguments& arguments, int argc, char** argv);

// `phalanx serve`, or the program's other names.
int serve_main(int argc, char** argv);

}  // namespace phalanx::apps
