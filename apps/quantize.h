#pragma once

namespace phalanx::apps {

// `phalanx quantize SOURCE OUT --format F`: a float checkpoint to compressed-tensors layout.
int quantize_main(int argc, char** argv);

}  // namespace phalanx::apps
