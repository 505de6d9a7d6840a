#pragma once

namespace phalanx::apps {

// `phalanx serve`, `mindieservice_daemon`, `mindie_llm_server`: one node of an instance.
int serve_main(int argc, char** argv);

}  // namespace phalanx::apps
