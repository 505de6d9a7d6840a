#include "phalanx/models/expert_names.h"

#include <fmt/format.h>

#include <charconv>
#include <optional>
#include <string>
#include <vector>

namespace phalanx::models {
namespace {

using weights::Checkpoint;
using weights::TensorEntry;

// The number that `text` begins with and that a dot follows.
std::optional<int64_t> leading_number(std::string_view text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end == text.data() + text.size() || *end != '.' || number < 0)
    return std::nullopt;
  return number;
}

// Rows [row_begin, + rows) of matrix `index` of a stack [count, .., cols].
TensorEntry matrix_of(const TensorEntry& stack, int64_t index, int64_t row_begin, int64_t rows,
                      std::string name) {
  const int64_t row_bytes = stack.bytes / (stack.shape[0] * stack.shape[1]);
  TensorEntry entry = stack;
  entry.name = std::move(name);
  entry.shape = {rows, stack.shape[2]};
  entry.offset = stack.offset + (index * stack.shape[1] + row_begin) * row_bytes;
  entry.bytes = rows * row_bytes;
  return entry;
}

struct Stack {
  std::string suffix;                // of the tensor
  std::vector<std::string> matrices; // equal parts of its rows
};

void split(const Experts& experts, const std::string& block, const Stack& stack,
           int64_t rows, int64_t cols, Checkpoint& checkpoint, Problems& problems,
           const std::string& from) {
  const std::string name = from + ".experts." + stack.suffix;
  const TensorEntry* found = checkpoint.find(name);
  if (found == nullptr) return;
  const auto parts = static_cast<int64_t>(stack.matrices.size());
  const std::vector<int64_t> expected = {experts.count, parts * rows, cols};
  if (found->shape != expected) {
    problems.add({.what = "tensor of another shape",
                  .where = fmt::format("{}: tensor {}", checkpoint.path_of(*found), name),
                  .found = weights::shape_text(found->shape),
                  .expected = weights::shape_text(expected) + ", one matrix per expert",
                  .fix = "config.json and the weight files must belong to one checkpoint"});
    return;
  }
  std::vector<TensorEntry> matrices;
  for (int64_t e = 0; e < experts.count; ++e)
    for (int64_t part = 0; part < parts; ++part)
      matrices.push_back(matrix_of(
          *found, e, part * rows, rows,
          fmt::format("{}.experts.{}.{}.weight", block, e,
                      stack.matrices[static_cast<size_t>(part)])));
  checkpoint.replace(name, std::move(matrices), problems);
}

void rename(Checkpoint& checkpoint, const std::string& from, const std::string& to,
            Problems& problems) {
  const TensorEntry* found = checkpoint.find(from);
  if (found == nullptr || from == to) return;
  TensorEntry entry = *found;
  entry.name = to;
  checkpoint.replace(from, {entry}, problems);
}

void refuse_beyond(const Experts& experts, const std::string& prefix, const Checkpoint& checkpoint,
                   Problems& problems) {
  const auto& tensors = checkpoint.tensors();
  for (auto at = tensors.lower_bound(prefix); at != tensors.end(); ++at) {
    if (!at->first.starts_with(prefix)) break;
    const auto index = leading_number(std::string_view(at->first).substr(prefix.size()));
    if (index && *index >= experts.count)
      problems.add({.what = "expert beyond the count",
                    .where = fmt::format("{}: tensor {}", checkpoint.path_of(at->second), at->first),
                    .found = fmt::format("expert {}", *index),
                    .expected = fmt::format("0 to {}, as config.json has {} experts",
                                            experts.count - 1, experts.count),
                    .fix = "config.json and the weight files must belong to one checkpoint"});
  }
}

}  // namespace

void name_experts(const ModelInfo& info, Checkpoint& checkpoint, Problems& problems) {
  const Experts& experts = info.experts;
  for (size_t i = 0; i < experts.in_layer.size(); ++i) {
    if (!experts.in_layer[i]) continue;
    const std::string layer = fmt::format("model.layers.{}.", i);
    const std::string block = layer + experts.block;
    for (const std::string& from : {block, layer + "mlp"}) {
      split(experts, block, {"gate_up_proj", {experts.gate, experts.up}}, experts.intermediate_size,
            info.hidden_size, checkpoint, problems, from);
      split(experts, block, {"down_proj", {experts.down}}, info.hidden_size,
            experts.intermediate_size, checkpoint, problems, from);
    }
    rename(checkpoint, layer + "mlp.gate.weight", block + ".gate.weight", problems);
    const std::string correction = block + "." + experts.correction;
    if (experts.correction_bias) {
      rename(checkpoint, block + ".gate." + experts.correction, correction, problems);
      // [1, experts] in ERNIE's files.
      const TensorEntry* found = checkpoint.find(correction);
      if (found != nullptr && found->shape == std::vector<int64_t>{1, experts.count}) {
        TensorEntry flat = *found;
        flat.shape = {experts.count};
        checkpoint.replace(correction, {flat}, problems);
      }
    }
    refuse_beyond(experts, block + ".experts.", checkpoint, problems);
  }
}

bool beyond_layers(std::string_view tensor, int64_t num_layers) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!tensor.starts_with(kPrefix)) return false;
  const auto layer = leading_number(tensor.substr(kPrefix.size()));
  return layer && *layer >= num_layers;
}

}  // namespace phalanx::models
