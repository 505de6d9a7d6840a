#pragma once

#include <memory>
#include <string>

#include "phalanx/base/error.h"
#include "phalanx/quant/format.h"

namespace phalanx::weights {

// How each linear layer of a checkpoint is stored: what quant_model_description*.json (msModelSlim)
// or quantization_config of config.json (compressed-tensors, fp8, awq, gptq) says, held against the
// dtypes of the tensors. Reads config.json, the description and the headers of the weight files.
// nullptr: a float checkpoint. Adds to `problems` what is contradictory, and every format that has
// no kernels, by name; the result is of use only if nothing was added.
[[nodiscard]] std::shared_ptr<const quant::Formats> read_quant_formats(const std::string& directory,
                                                                       Problems& problems);

}  // namespace phalanx::weights
