#include "apps/smoothing.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <numeric>
#include <thread>

#include "phalanx/comm/bootstrap.h"
#include "phalanx/layers/widen.h"
#include "phalanx/models/model.h"
#include "phalanx/text/tokenizer.h"
#include "phalanx/weights/weight_source.h"

namespace phalanx::apps {
namespace {

constexpr int64_t kTokens = 128;  // of a step, each a sequence of its own kind of text
constexpr int64_t kCallsPerLayer = 4;  // qkv, o, gate and up, down

// Prose, dialogue, code, a list and other scripts: what makes outliers is rarely the topic.
constexpr std::string_view kTexts[] = {
    "The river had been rising since dawn, and by the time the ferryman came down to the landing the "
    "lower meadow was already under water. He stood for a while with his hands in his pockets, "
    "looking at the place where the fence used to be. \"It will be a long day,\" he said at last, to "
    "nobody in particular, and went back for the ropes. Nobody in the village could remember a spring "
    "like this one; the oldest of them spoke of a winter fifty years ago, when the ice had carried "
    "away the bridge, the mill and two of the three houses on the island.",
    "Question: Why is the sky blue?\nAnswer: Sunlight is scattered by the molecules of the air, and "
    "short waves are scattered more strongly than long ones. In 1871 Lord Rayleigh showed that the "
    "strength goes with the inverse fourth power of the wavelength, so that blue (450 nm) is "
    "scattered about 4.4 times as much as red (650 nm). At sunset the light crosses 10 to 40 times as "
    "much air, and what is left is orange and red. 1. Explain. 2. Compare. 3. Give an example!",
    "#include <vector>\n\nint sum(const std::vector<int>& values) {\n  int total = 0;\n  for (int v : "
    "values) total += v;  // plain\n  return total;\n}\n\ndef fibonacci(n):\n    a, b = 0, 1\n    for "
    "_ in range(n):\n        a, b = b, a + b\n    return a\n\nprint([fibonacci(i) for i in "
    "range(10)])  # 0, 1, 1, 2, 3, 5\n{\"name\": \"test\", \"items\": [1, 2.5, null, true], \"path\": "
    "\"/usr/share/doc\"}\nSELECT name, count(*) FROM orders WHERE year >= 2020 GROUP BY name;",
    "Write a short letter to a friend.\n\nDear Anna, thank you for your kind words. La vie est belle, et le printemps arrive enfin. Der Zug kommt um "
    "halb acht an. El perro duerme debajo de la mesa. \xe4\xb8\xad\xe5\x9b\xbd\xe7\x9a\x84\xe9\xa6\x96"
    "\xe9\x83\xbd\xe6\x98\xaf\xe5\x8c\x97\xe4\xba\xac\xe3\x80\x82 \xd0\x94\xd0\xbe\xd0\xb1\xd1\x80"
    "\xd1\x8b\xd0\xb9 \xd0\xb4\xd0\xb5\xd0\xbd\xd1\x8c! See you soon, and give my love to everyone at "
    "home.\n"};

using Columns = std::vector<float>;

// Largest |x| per column of the input of each call, averaged over the texts: one odd token shall not
// decide.
std::vector<Columns> observe(const std::string& directory) {
  const auto tokenizer = text::Tokenizer::load(directory);
  std::vector<Columns> seen;
  size_t call = 0;
  const std::function<void(const ops::MatrixView&)> observer = [&](const ops::MatrixView& x) {
    if (call == seen.size()) seen.emplace_back(static_cast<size_t>(x.cols));
    Columns& most = seen[call++];
    Columns row(static_cast<size_t>(x.cols));
    Columns here(static_cast<size_t>(x.cols));
    for (int64_t t = 0; t < x.rows; ++t) {
      layers::widen(x.rows_of(t, 1).row<std::byte>(0), x.dtype, x.cols, row.data());
      for (size_t c = 0; c < row.size(); ++c) here[c] = std::max(here[c], std::fabs(row[c]));
    }
    for (size_t c = 0; c < here.size(); ++c)
      most[c] += here[c] / static_cast<float>(std::size(kTexts));
  };
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  ThreadPool pool({.threads = threads, .spin_us = 20});
  const auto group = comm::single_group();
  const auto model = models::load_model({.directory = directory,
                                         .isa = ops::choose_isa(),
                                         .max_step_tokens = kTokens,
                                         .max_step_rows = kTokens,
                                         .max_sequence = kTokens,
                                         .block_size = kTokens,
                                         .weights = {1.0},
                                         .observer = &observer,
                                         .threads = threads},
                                        *group, pool, nullptr);
  model->allocate_kv(1);
  std::vector<float> logits(static_cast<size_t>(kTokens * model->info().vocab_size));
  const int32_t block = 0;
  for (const std::string_view text : kTexts) {
    std::vector<int32_t> tokens = tokenizer->encode(text, true);
    tokens.resize(std::min<size_t>(tokens.size(), kTokens));
    std::vector<int32_t> places(tokens.size());
    std::iota(places.begin(), places.end(), 0);
    const auto count = static_cast<int32_t>(tokens.size());
    const ops::SequenceSlice slice{.token_begin = 0, .token_count = count, .context = count,
                                   .block_table = &block};
    call = 0;
    model->forward({.tokens = tokens, .positions = places, .slots = places,
                    .sequences = {&slice, 1}, .sample_rows = places},
                   logits.data());
  }
  return seen;
}

// Largest |w| per column of the layers that read the same input.
Columns column_maxima(const weights::Checkpoint& checkpoint, const std::vector<std::string>& names) {
  weights::WeightSource source(checkpoint);
  Columns most;
  for (const std::string& name : names) {
    const weights::TensorEntry& entry = source.ask(name);
    std::vector<std::byte> bytes(static_cast<size_t>(entry.bytes));
    source.read_rows(entry, 0, entry.rows(), bytes.data());
    const auto cols = static_cast<size_t>(entry.shape[1]);
    Columns row(cols);
    most.resize(cols);
    for (int64_t r = 0; r < entry.rows(); ++r) {
      layers::widen(bytes.data() + r * entry.row_bytes(), entry.dtype, entry.shape[1], row.data());
      for (size_t c = 0; c < cols; ++c) most[c] = std::max(most[c], std::fabs(row[c]));
    }
  }
  return most;
}

Columns factors(const Columns& x, const Columns& w) {
  constexpr float kLeast = 1e-5F;
  Columns s(x.size());
  double mean = 0;
  for (size_t j = 0; j < s.size(); ++j) {
    s[j] = 0.5F * std::log2(std::max(x[j], kLeast) / std::max(w[j], kLeast));
    mean += s[j];
  }
  mean /= static_cast<double>(std::max<size_t>(1, s.size()));
  for (float& v : s)
    v = std::exp2(std::clamp(std::nearbyint(v - static_cast<float>(mean)), -16.0F, 16.0F));
  return s;
}

}  // namespace

Smoothing find_smoothing(const std::string& directory, const weights::Checkpoint& checkpoint) {
  Smoothing result;
  if (!std::filesystem::exists(directory + "/tokenizer.json")) {
    result.why = "no tokenizer.json to calibrate with";
    return result;
  }
  struct Group {
    const char* norm;
    std::vector<const char*> layers;
    size_t call;
  };
  const std::array<Group, 2> groups = {
      {{"input_layernorm", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, 0},
       {"post_attention_layernorm", {"mlp.gate_proj", "mlp.up_proj"}, 2}}};
  const models::ModelInfo info = models::read_model_info(directory);
  for (int64_t l = 0; l < info.num_layers; ++l)
    for (const char* name : {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj",
                             "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
                             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
      if (checkpoint.find(fmt::format("model.layers.{}.{}.weight", l, name)) == nullptr)
        result.why = fmt::format("layer {} has no {}", l, name);
  if (!result.why.empty()) return result;
  const std::vector<Columns> seen = observe(directory);
  if (static_cast<int64_t>(seen.size()) != kCallsPerLayer * info.num_layers + 1) {
    result.why = fmt::format("{} has another order of layers", info.model_type);
    return result;
  }
  for (int64_t l = 0; l < info.num_layers; ++l)
    for (const Group& g : groups) {
      std::vector<std::string> names;
      for (const char* layer : g.layers)
        names.push_back(fmt::format("model.layers.{}.{}.weight", l, layer));
      const Columns s = factors(seen[static_cast<size_t>(kCallsPerLayer * l) + g.call],
                                column_maxima(checkpoint, names));
      result.divide[fmt::format("model.layers.{}.{}.weight", l, g.norm)] = s;
      for (const std::string& name : names) result.multiply[name] = s;
    }
  return result;
}

}  // namespace phalanx::apps
