#include "apps/doctor_predict.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "apps/bench_roofline.h"
#include "apps/host.h"
#include "phalanx/models/model.h"

namespace phalanx::apps {
namespace {

// Norms, rotary embedding, attention's bookkeeping and the meetings of threads, per layer; planning
// and sampling, per token. `phalanx bench engine` on a 2-core AVX-512 machine, a model of 135M against
// one of 1B.
constexpr double kLayerSeconds = 40e-6;
constexpr double kTokenSeconds = 120e-6;
constexpr double kSharedMemoryGather = 1e-6;  // docs/architecture.md, "Measured"
constexpr int kMostCounts = 16;

struct Way {
  double half_trip = 0;
  double bytes_per_s = 0;  // 0: shared memory
};

class Prediction {
 public:
  Prediction(const DoctorReport& report, const std::string& model, double context)
      : report_(report), model_(model), info_(models::read_model_info(model)),
        work_(decode_work(info_, 1, context)) {
    leave_out_idle_experts();
  }

  [[nodiscard]] const models::ModelInfo& info() const { return info_; }
  // Nothing if a node or link that it needs was not measured.
  [[nodiscard]] std::optional<DoctorReport::Speed> speed(int ranks) const;
  [[nodiscard]] models::MemoryNeed need(const std::vector<double>& weights, int rank) const {
    return models::memory_need(info_, {.directory = model_, .max_step_tokens = 1, .max_step_rows = 1,
                                       .max_sequence = 1, .weights = weights, .rank = rank});
  }
  [[nodiscard]] std::vector<double> weights(int ranks) const {
    std::vector<double> result;
    for (int r = 0; r < ranks; ++r) result.push_back(report_.table.device_of_rank(r).weight);
    return result;
  }

 private:
  // A token reads and computes the experts that it is sent to.
  void leave_out_idle_experts() {
    const models::Experts& e = info_.experts;
    if (e.count == 0) return;
    const auto layers = static_cast<double>(std::count(e.in_layer.begin(), e.in_layer.end(), true));
    const double idle = layers * static_cast<double>(e.count - e.per_token) * 3.0 *
                        static_cast<double>(e.intermediate_size * info_.hidden_size);
    const double bytes = info_.formats != nullptr
                             ? 1.0
                             : static_cast<double>(tensor::dtype_bytes(info_.dtype));
    work_.bytes = std::max(work_.bytes - idle * bytes, work_.bytes * 0.01);
  }
  [[nodiscard]] double slowest_rank(int ranks) const;
  [[nodiscard]] std::optional<Way> worst_way(int ranks) const;

  const DoctorReport& report_;
  std::string model_;
  models::ModelInfo info_;
  StepWork work_;
};

double Prediction::slowest_rank(int ranks) const {
  const std::vector<double> weights = this->weights(ranks);
  std::vector<double> bytes;
  double sum = 0;
  std::vector<int> on_server(report_.table.servers.size());
  std::set<int> servers;
  for (int r = 0; r < ranks; ++r) {
    bytes.push_back(static_cast<double>(need(weights, r).read_bytes));
    sum += bytes.back();
    const int server = report_.table.server_of_rank(r);
    ++on_server[static_cast<size_t>(server)];
    servers.insert(server);
  }
  double slowest = 0;
  for (int r = 0; r < ranks; ++r) {
    const auto server = static_cast<size_t>(report_.table.server_of_rank(r));
    const NodeReport& node = report_.nodes[server];
    const auto together = node.read_together.find(static_cast<int>(servers.size()));
    const double speed =
        together != node.read_together.end() ? together->second : node.read_bytes_per_s;
    if (speed <= 0) return -1;
    const double share = bytes[static_cast<size_t>(r)] / sum * on_server[server];
    slowest = std::max(slowest, share * work_.bytes / speed);
    if (node.flops_per_s > 0) slowest = std::max(slowest, share * work_.flops / node.flops_per_s);
  }
  return slowest;
}

std::optional<Way> Prediction::worst_way(int ranks) const {
  std::set<int> servers;
  for (int r = 0; r < ranks; ++r) servers.insert(report_.table.server_of_rank(r));
  Way worst;
  size_t seen = 0;
  for (const LinkReport& link : report_.links) {
    if (!servers.contains(link.from) || !servers.contains(link.to)) continue;
    if (!link.measured()) return std::nullopt;
    ++seen;
    worst.half_trip = std::max(worst.half_trip, link.rtt_us * 0.5e-6);
    if (worst.bytes_per_s == 0 || link.bytes_per_s < worst.bytes_per_s)
      worst.bytes_per_s = link.bytes_per_s;
  }
  if (seen != servers.size() * (servers.size() - 1)) return std::nullopt;
  return worst;
}

std::optional<DoctorReport::Speed> Prediction::speed(int ranks) const {
  DoctorReport::Speed speed{.ranks = ranks};
  speed.compute_s = slowest_rank(ranks);
  const std::optional<Way> way = worst_way(ranks);
  if (speed.compute_s < 0 || !way) return std::nullopt;
  const auto layers = static_cast<double>(info_.num_layers);
  speed.fixed_s = layers * kLayerSeconds + kTokenSeconds;
  if (ranks > 1) {
    // Attention output, o_proj, gated activation, down_proj; MLA gathers compressed rows besides.
    const double gathers = layers * (info_.latent.kv_lora_rank > 0 ? 5 : 4) + 1;
    const double act = static_cast<double>(tensor::dtype_bytes(info_.act));
    const double bytes =
        layers * act *
            static_cast<double>(info_.num_attention_heads * info_.head_dim + 2 * info_.hidden_size +
                                info_.intermediate_size) +
        4.0 * static_cast<double>(info_.vocab_size);
    const double others = static_cast<double>(ranks - 1) / ranks;
    speed.links_s = way->bytes_per_s == 0
                        ? gathers * kSharedMemoryGather
                        : (gathers + 2) * way->half_trip + bytes * others / way->bytes_per_s;
  }
  speed.tokens_per_s = 1 / (speed.compute_s + speed.links_s + speed.fixed_s);
  return speed;
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

void predict(DoctorReport& report, const std::string& model, double context) {
  const Prediction prediction(report, model, context);
  const models::ModelInfo& info = prediction.info();
  check_memory(report, prediction);
  report.prediction.push_back(fmt::format(
      "prediction for {} ({} layers, hidden {}), one sequence at a context of {:.0f}:", model,
      info.num_layers, info.hidden_size, context));
  const int most = std::min<int>(report.table.world_size,
                                 static_cast<int>(info.num_attention_heads));
  for (int ranks = 1; ranks <= most; ++ranks) {
    if (ranks > kMostCounts && ranks != most) continue;
    const auto speed = prediction.speed(ranks);
    if (!speed) {
      report.prediction.push_back(
          fmt::format("  {:>3} rank{}  not known: a node or link was not measured", ranks,
                      ranks == 1 ? " " : "s"));
      continue;
    }
    report.speeds.push_back(*speed);
    report.prediction.push_back(fmt::format(
        "  {:>3} rank{}  {:>8.1f} tok/s decode   (memory or cores {:.2f} ms, links {:.2f} ms, rest "
        "{:.2f} ms a token)",
        ranks, ranks == 1 ? " " : "s", speed->tokens_per_s, speed->compute_s * 1e3,
        speed->links_s * 1e3, speed->fixed_s * 1e3));
  }
  report.prediction.push_back(
      fmt::format("  beside it: phalanx bench engine --model {} --batch 1 --prompt {:.0f} --output 32 "
                  "(ranks of this machine: --layout), decode tok/s",
                  model, std::max(1.0, context - 16)));
}

}  // namespace phalanx::apps
