#pragma once

namespace phalanx::apps {

// phalanx import MODEL.gguf OUT_DIR: a GGUF file to a Hugging Face checkpoint. Returns the exit
// status.
int import_main(int argc, char** argv);

}  // namespace phalanx::apps
