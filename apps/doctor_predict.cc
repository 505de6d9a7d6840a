#include "apps/doctor_predict.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "apps/bench_roofline.h"
#include "apps/host.h"
#include "phalanx/cluster/seating.h"
#include "phalanx/models/model.h"

namespace phalanx::apps {
namespace {

constexpr int kMostCounts = 16;

class Prediction {
 public:
  Prediction(const DoctorReport& report, const std::string& model, double context)
      : report_(report), model_(model), info_(models::read_model_info(model)),
        work_(decode_work(info_, kv_bytes_per_position(info_, models::KvDtype::kCheckpoint), 1,
                          context)) {
    decide();
  }

  [[nodiscard]] const models::ModelInfo& info() const { return info_; }
  // What each of so many ranks does for a token, by rank.
  [[nodiscard]] std::vector<RehearsalWork> work(int ranks) const;
  [[nodiscard]] models::MemoryNeed need(const std::vector<double>& weights, int rank) const {
    return models::memory_need(info_, {.directory = model_, .max_step_tokens = 1, .max_step_rows = 1,
                                       .max_sequence = 1, .weights = weights, .rank = rank});
  }
  [[nodiscard]] std::vector<double> weights(int ranks) const {
    std::vector<double> result;
    for (int r = 0; r < ranks; ++r) result.push_back(seats_[static_cast<size_t>(r)].weight);
    return result;
  }
  // What a start would make of "weight": "auto"; empty where the table has numbers.
  [[nodiscard]] const std::string& decision() const { return decision_; }

 private:
  void decide() {
    seats_ = cluster::table_seating(report_.table);
    if (!report_.table.has_auto_weights()) return;
    std::vector<double> speeds(report_.table.servers.size());
    for (const NodeReport& node : report_.nodes)
      speeds[static_cast<size_t>(node.server)] = node.read_bytes_per_s;
    try {
      seats_ = cluster::decide_weights(report_.table, speeds, {});
      decision_ = "weights that a start would decide: " + cluster::text_of(seats_, report_.table);
    } catch (const Error& error) {
      decision_ = fmt::format("weights not known, taken as equal: {}", error.what());
    }
  }

  const DoctorReport& report_;
  std::string model_;
  models::ModelInfo info_;
  StepWork work_;
  cluster::Seating seats_;
  std::string decision_;
};

// The bytes of a token are cut as the layout says, and within a layer as the sizes of its products.
std::vector<RehearsalWork> Prediction::work(int ranks) const {
  const std::vector<double> weights = this->weights(ranks);
  const std::vector<models::RankLayout> layout = models::plan_layout(info_, weights);
  std::vector<double> shares;
  double sum = 0;
  for (int r = 0; r < ranks; ++r) {
    shares.push_back(static_cast<double>(need(weights, r).read_bytes));
    sum += shares.back();
  }
  const auto act = static_cast<int64_t>(tensor::dtype_bytes(info_.act));
  const models::Experts& e = info_.experts;
  const int64_t middle = e.count == 0 ? info_.intermediate_size
                                      : e.per_token * e.intermediate_size + e.shared_intermediate_size;
  std::vector<int64_t> heads, hidden, mlp, vocab;
  for (const models::RankLayout& l : layout) {
    heads.push_back(l.query_heads.size() * info_.head_dim * act);
    hidden.push_back(l.hidden_rows.size() * act);
    mlp.push_back(e.count == 0 ? l.mlp_rows.size() * act : middle / ranks * act);
    vocab.push_back(l.vocab_rows.size() * static_cast<int64_t>(sizeof(float)));
  }
  const auto width = static_cast<double>(info_.num_attention_heads * info_.head_dim);
  const auto kv = static_cast<double>(info_.num_key_value_heads * info_.head_dim);
  const auto h = static_cast<double>(info_.hidden_size);
  const auto m = static_cast<double>(middle);
  const double products = h * (width + 2 * kv) + h * width + 3 * h * m;
  const auto element = static_cast<double>(tensor::dtype_bytes(info_.dtype));
  std::vector<RehearsalWork> works;
  for (int r = 0; r < ranks; ++r) {
    const auto place = static_cast<size_t>(r);
    const double bytes = shares[place] / sum * work_.bytes;
    const double head = std::min(
        0.9 * bytes, static_cast<double>(layout[place].vocab_rows.size()) * h *
                         (info_.formats != nullptr ? 1.0 : element));
    const double layer = (bytes - head) / static_cast<double>(info_.num_layers);
    const auto part = [&](int64_t inputs, double size, const std::vector<int64_t>& row) {
      return RehearsalPart{.inputs = inputs, .bytes = static_cast<int64_t>(layer * size / products),
                           .row_bytes = ranks > 1 ? row : std::vector<int64_t>{}};
    };
    const auto inputs_of_down = e.count == 0 ? info_.intermediate_size : e.intermediate_size;
    RehearsalWork work{.layers = info_.num_layers, .hidden = info_.hidden_size};
    work.parts = {part(info_.hidden_size, h * (width + 2 * kv), heads),
                  part(info_.num_attention_heads * info_.head_dim, h * width, hidden),
                  part(info_.hidden_size, 2 * h * m, mlp), part(inputs_of_down, h * m, hidden)};
    if (info_.latent.kv_lora_rank > 0)
      work.parts.insert(work.parts.begin(), part(info_.hidden_size, 0, hidden));
    work.head = {.inputs = info_.hidden_size, .bytes = static_cast<int64_t>(head),
                 .row_bytes = ranks > 1 ? vocab : std::vector<int64_t>{}};
    works.push_back(std::move(work));
  }
  return works;
}

void check_memory(DoctorReport& report, const Prediction& prediction) {
  const std::vector<double> weights = prediction.weights(report.table.world_size);
  std::vector<int64_t> needs(report.table.servers.size());
  for (int r = 0; r < report.table.world_size; ++r) {
    const models::MemoryNeed need = prediction.need(weights, r);
    needs[static_cast<size_t>(report.table.server_of_rank(r))] +=
        need.weight_bytes + need.workspace_bytes + need.kv_bytes_per_block;
  }
  for (const NodeReport& node : report.nodes) {
    const int64_t needed = needs[static_cast<size_t>(node.server)];
    if (!node.error.empty() || node.memory_bytes >= needed) continue;
    report.problems.add(
        {.what = "not enough memory for the node's share of the model",
         .where = report.table.servers[static_cast<size_t>(node.server)].address(),
         .found = format_bytes(node.memory_bytes),
         .expected = fmt::format("at least {}, before any KV cache", format_bytes(needed)),
         .fix = "free memory there, give it a smaller \"weight\" in the rank table, or add nodes"});
  }
}

}  // namespace

void predict(DoctorReport& report, const std::string& model, double context,
             const Rehearse& rehearse) {
  const Prediction prediction(report, model, context);
  const models::ModelInfo& info = prediction.info();
  check_memory(report, prediction);
  report.prediction.push_back(fmt::format(
      "prediction for {} ({} layers, hidden {}), one sequence at a context of {:.0f}:", model,
      info.num_layers, info.hidden_size, context));
  if (!prediction.decision().empty()) report.prediction.push_back("  " + prediction.decision());
  const int most = std::min<int>(report.table.world_size,
                                 static_cast<int>(info.num_attention_heads));
  for (int ranks = 1; ranks <= most; ++ranks) {
    if (ranks > kMostCounts && ranks != most) continue;
    try {
      const std::vector<RehearsalResult> results = rehearse(prediction.work(ranks));
      double compute = 0;
      for (const RehearsalResult& result : results) compute = std::max(compute, result.compute_s);
      const double step = results.front().step_s;
      report.speeds.push_back({.ranks = ranks,
                               .tokens_per_s = 1 / step,
                               .compute_s = compute,
                               .exchange_s = std::max(0.0, step - compute)});
      report.prediction.push_back(fmt::format(
          "  {:>3} rank{}  {:>8.1f} tok/s decode   (a token: the slowest rank computes {:.2f} ms, "
          "exchanges and waits {:.2f} ms; {} rehearsed)",
          ranks, ranks == 1 ? " " : "s", 1 / step, compute * 1e3,
          report.speeds.back().exchange_s * 1e3, results.front().steps));
    } catch (const Error& error) {
      report.prediction.push_back(fmt::format("  {:>3} rank{}  not known: {}", ranks,
                                              ranks == 1 ? " " : "s", error.what()));
    }
  }
  report.prediction.push_back(
      fmt::format("  beside it: phalanx bench engine --model {} --batch 1 --prompt {:.0f} --output 32 "
                  "(ranks of this machine: --layout), decode tok/s",
                  model, std::max(1.0, context - 16)));
}

}  // namespace phalanx::apps
