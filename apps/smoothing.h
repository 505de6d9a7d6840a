#pragma once

#include <map>
#include <string>
#include <vector>

#include "phalanx/weights/checkpoint.h"

namespace phalanx::apps {

// Factors that move outliers of activations into the weights that read them (SmoothQuant,
// arXiv 2211.10438): s_j = sqrt(max|x_j| / max|w_j|), as powers of two, so that dividing a norm's
// weight by s and multiplying the columns of the layers behind it changes no bit of their product.
// max|x_j| is seen by running the float model over a few paragraphs.
//
// By tensor name: of norms divide, of layers multiply the columns. Empty for checkpoints that are not
// plain decoders (two norms, q, k, v, o, gate, up, down per layer) or have no tokenizer; then `why`
// says so.
struct Smoothing {
  std::map<std::string, std::vector<float>> divide;
  std::map<std::string, std::vector<float>> multiply;
  std::string why;
};
[[nodiscard]] Smoothing find_smoothing(const std::string& directory,
                                       const weights::Checkpoint& checkpoint);

}  // namespace phalanx::apps
