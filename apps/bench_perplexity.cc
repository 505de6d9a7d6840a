#include "apps/bench_perplexity.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <thread>

#include "apps/kv_option.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/base/progress.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/models/kv_format.h"
#include "phalanx/models/model.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kRows = 128;  // tokens of a step, all of them sampled

struct Arguments {
  std::string model;
  std::string text;
  int64_t tokens = 4000;
  int64_t window = 1000;
  int threads = 0;
  std::optional<models::KvDtype> kv;
};

// Sum of -log p of tokens 1 ... n - 1, each given all before it.
double negative_log_likelihood(models::Model& model, std::span<const int32_t> tokens,
                               std::vector<float>& logits, Progress& progress) {
  const auto vocab = static_cast<size_t>(model.info().vocab_size);
  const auto count = static_cast<int64_t>(tokens.size());
  std::vector<int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<int32_t> table(static_cast<size_t>((count + kBlock - 1) / kBlock));
  std::iota(table.begin(), table.end(), 0);
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int64_t n = std::min(kRows, count - begin);
    const ops::SequenceSlice slice{.token_begin = 0, .token_count = static_cast<int32_t>(n),
                                   .context = static_cast<int32_t>(begin + n),
                                   .block_table = table.data()};
    const auto part = static_cast<size_t>(begin);
    const auto size = static_cast<size_t>(n);
    // A block of the cache after the other, so a slot is a position.
    const std::span here = std::span(positions).subspan(part, size);
    model.forward({.tokens = tokens.subspan(part, size),
                   .positions = here,
                   .slots = here,
                   .sequences = {&slice, 1},
                   .sample_rows = std::span(positions).first(size)},
                  logits.data());
    for (size_t r = 0; r < size && part + r + 1 < tokens.size(); ++r) {
      const std::span row = std::span(logits).subspan(r * vocab, vocab);
      const double most = *std::max_element(row.begin(), row.end());
      double total = 0;
      for (const float v : row) total += std::exp(static_cast<double>(v) - most);
      sum += most + std::log(total) - row[static_cast<size_t>(tokens[part + r + 1])];
    }
    progress.advance(n);
  }
  return sum;
}

void measure(const Arguments& a) {
  const auto tokenizer = text::Tokenizer::load(a.model);
  std::vector<int32_t> tokens = tokenizer->encode(read_text_file(a.text, 64 << 20), false);
  const auto found = static_cast<int64_t>(tokens.size());
  if (found < a.tokens)
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: found {} tokens, expected at least {}. Fix: give a longer text, or "
                            "--tokens {}",
                            a.text, found, a.tokens, found));
  tokens.resize(static_cast<size_t>(a.tokens));
  const int threads =
      a.threads > 0 ? a.threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  ThreadPool pool({.threads = threads, .spin_us = 50});
  const auto group = comm::single_group();
  const models::KvDtype kv = a.kv.value_or(models::KvDtype::kCheckpoint);
  const auto model = models::load_model({.directory = a.model,
                                         .isa = ops::choose_isa(),
                                         .max_step_tokens = kRows,
                                         .max_step_rows = kRows,
                                         .max_sequence = a.window,
                                         .block_size = kBlock,
                                         .kv = kv,
                                         .weights = {1.0},
                                         .threads = threads},
                                        *group, pool, nullptr);
  model->allocate_kv((a.window + kBlock - 1) / kBlock);
  const models::ModelInfo& info = model->info();
  std::vector<float> logits(static_cast<size_t>(kRows * info.vocab_size));
  Progress progress("perplexity", a.tokens);
  double sum = 0;
  int64_t predicted = 0;
  for (int64_t begin = 0; begin < a.tokens; begin += a.window) {
    const int64_t n = std::min(a.window, a.tokens - begin);
    sum += negative_log_likelihood(*model,
                                   std::span(tokens).subspan(static_cast<size_t>(begin),
                                                             static_cast<size_t>(n)),
                                   logits, progress);
    predicted += n - 1;
  }
  progress.done();
  fmt::print("perplexity {:.4f} over {} tokens in windows of {} ({}, {}, KV cache {})\n",
             std::exp(sum / static_cast<double>(predicted)), predicted, a.window,
             ops::isa_name(ops::choose_isa()),
             info.formats == nullptr ? std::string(tensor::dtype_name(info.dtype))
                                     : info.formats->summary(),
             models::kv_format_text(info, kv));
}

}  // namespace

int bench_perplexity(int argc, char** argv) {
  Arguments a;
  CLI::App app("Perplexity of a text under a checkpoint", "phalanx bench perplexity");
  app.add_option("--model", a.model, "checkpoint directory with a tokenizer")->required();
  app.add_option("--text", a.text, "UTF-8 text file")->required();
  app.add_option("--tokens", a.tokens, "of the text that are used")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 30))
      ->capture_default_str();
  app.add_option("--window", a.window, "tokens that see each other")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 20))
      ->capture_default_str();
  add_kv_option(app, a.kv);
  app.add_option("--threads", a.threads, "0: all cores")->check(CLI::Range(0, 1024));
  CLI11_PARSE(app, argc, argv);
  measure(a);
  return 0;
}

}  // namespace phalanx::apps
