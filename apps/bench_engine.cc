#include "apps/bench_engine.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "apps/bench_layout.h"
#include "apps/bench_roofline.h"
#include "apps/bench_tls.h"
#include "apps/instance.h"
#include "apps/prompt_head.h"
#include "phalanx/base/log.h"
#include "phalanx/comm/bootstrap.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

struct BenchArguments {
  std::string model;
  std::vector<std::string> layouts;
  int tp = 1;
  int threads = 0;
  std::vector<int64_t> batches = {1, 32};
  int64_t prompt = 128;
  int64_t output = 32;
  int rounds = 1;
  std::string json_path;
  std::string draft_model;
  int64_t draft_tokens = 5;
};

constexpr int64_t kFullSteps = 8;  // that the whole batch decodes together, at least

// A prompt of its own for every request of every wave, so that none shares a prefix.
std::vector<engine::GenerateRequest> make_requests(std::mt19937& random, int64_t vocab,
                                                   int64_t batch, int64_t prompt, int64_t output) {
  std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(vocab - 1));
  std::vector<engine::GenerateRequest> requests;
  for (int64_t i = 0; i < batch; ++i) {
    engine::GenerateRequest request{.id = fmt::format("bench-{}", random()), .prompt = {}};
    for (int64_t t = 0; t < prompt; ++t) request.prompt.push_back(token(random));
    request.sampling.temperature = 0;
    request.sampling.max_tokens = static_cast<int32_t>(output);
    requests.push_back(std::move(request));
  }
  return requests;
}

// Seconds from the first submission to the first token of all, tokens per second while the whole
// batch decodes (between the last first token and the first end), and of the whole.
json speeds(const std::vector<PromptResult>& results) {
  int64_t begin = INT64_MAX;
  int64_t all_started = 0;
  int64_t first_end = INT64_MAX;
  int64_t end = 0;
  int64_t tokens = 0;
  for (const PromptResult& r : results) {
    if (r.error) throw *r.error;
    begin = std::min(begin, r.submitted_ns);
    all_started = std::max(all_started, r.token_ns.front());
    first_end = std::min(first_end, r.token_ns.back());
    end = std::max(end, r.token_ns.back());
    tokens += static_cast<int64_t>(r.tokens.size());
  }
  int64_t between = 0;
  for (const PromptResult& r : results)
    between += std::count_if(r.token_ns.begin(), r.token_ns.end(),
                             [&](int64_t t) { return t > all_started && t <= first_end; });
  const auto seconds = [](int64_t from, int64_t to) { return static_cast<double>(to - from) * 1e-9; };
  if (between == 0)
    throw Error(Code::kInternal, "bench: the batch never decoded as a whole; raise --output");
  return {{"prefill_s", seconds(begin, all_started)},
          {"decode_tok_s", static_cast<double>(between) / seconds(all_started, first_end)},
          {"whole_tok_s", static_cast<double>(tokens) / seconds(begin, end)},
          {"whole_s", seconds(begin, end)}};
}

cluster::RankTable table_of(const BenchLayout& layout) {
  cluster::RankTable table{.servers = {}, .world_size = layout.ranks(), .notes = {}};
  int rank = 0;
  for (int i = 0; i < static_cast<int>(layout.nodes.size()); ++i) {
    const std::string address = layout.address(i);
    table.servers.push_back({.server_id = address, .container_ip = address, .devices = {}});
    for (int d = 0; d < layout.nodes[static_cast<size_t>(i)].ranks; ++d)
      table.servers.back().devices.push_back({.device_id = d, .device_ip = {}, .rank_id = rank++});
  }
  return table;
}

NodeConfig node_config(const BenchArguments& a, const BenchLayout& layout, int node,
                       uint16_t control_port, int64_t output) {
  const int64_t batch = *std::max_element(a.batches.begin(), a.batches.end());
  NodeConfig config;
  config.model.name = "bench";
  config.model.weight_path = a.model;
  config.model.max_sequence = a.prompt + output + 1;
  config.model.max_input_tokens = a.prompt;
  config.schedule.max_batch = batch;
  config.schedule.max_prefill_batch = batch;
  config.schedule.max_prefill_tokens = 8192;
  config.schedule.max_output_tokens = output;
  config.threads_per_rank = layout.nodes[static_cast<size_t>(node)].threads;
  config.npu_memory_fraction = 0.8 / (layout.veth ? static_cast<double>(layout.nodes.size()) : 1);
  config.backend.multi_nodes = layout.nodes.size() > 1;
  config.backend.multi_nodes_port = control_port;
  config.connect_timeout_s = 120;
  config.plugins.draft_model = a.draft_model;
  config.plugins.draft_where = "--draft-model";
  config.plugins.draft_tokens = a.draft_model.empty() ? 0 : a.draft_tokens;
  config.own_server = node;
  config.table = table_of(layout);
  return config;
}

// Every node of a layout on cores of its own, if there are enough.
void place(const BenchLayout& layout, int node, const HostResources& host, NodePlan& plan) {
  plan.cores = {.threads_per_rank = plan.threads_per_rank, .reason = "as the layout says"};
  if (layout.threads() > static_cast<int>(host.cpus.size())) return;
  const auto first = host.cpus.begin() + layout.threads_before(node);
  plan.cores.cpus.assign(first, first + layout.threads_before(node + 1) - layout.threads_before(node));
}

// One number of rank 0 or of the engine.
double counter(const json& status, const char* group, const char* name) {
  if (std::string_view(group) == "engine") return status["engine"][name].get<double>();
  for (const json& rank : status["ranks"])
    if (rank["rank"] == 0) return rank[name].get<double>();
  return 0;
}

// Runs the waves on the serving instance, with the machine's own limits measured in between.
json run_waves(const BenchArguments& a, const BenchLayout& layout, Instance& instance,
               engine::Engine& engine, const NodePlan& plan, const HostResources& host,
               const std::map<int64_t, int64_t>& outputs, uint32_t seed) {
  std::mt19937 random(seed);
  const auto all = std::min(layout.threads(), static_cast<int>(host.cpus.size()));
  Machine machine(all, {host.cpus.begin(), host.cpus.begin() + all}, plan.info);
  (void)run_prompts(engine, make_requests(random, plan.info.vocab_size, 1, a.prompt, 4), 1);
  json waves = json::array();
  const double kv_bytes = kv_bytes_per_position(plan.info, models::KvDtype::kCheckpoint);
  machine.measure();
  for (const int64_t batch : a.batches) {
    const auto requests =
        make_requests(random, plan.info.vocab_size, batch, a.prompt, outputs.at(batch));
    const json before = json::parse(instance.status_json());
    json wave = speeds(run_prompts(engine, requests, batch));
    const json after = json::parse(instance.status_json());
    machine.measure();
    const auto spent = [&](const char* group, const char* name) {
      return (counter(after, group, name) - counter(before, group, name)) * 1e-9;
    };
    const double context =
        static_cast<double>(a.prompt) + static_cast<double>(outputs.at(batch)) / 2;
    const Floor decode = machine.floor(decode_work(plan.info, kv_bytes, batch, context));
    const Floor prefill = machine.floor(prefill_work(plan.info, batch, a.prompt));
    const double step = spent("engine", "step_ns");
    wave.update({{"batch", batch},
                 {"output", outputs.at(batch)},
                 {"prefill_floor_s", prefill.seconds},
                 {"prefill_bound", prefill.bound},
                 {"decode_floor_tok_s", static_cast<double>(batch) / decode.seconds},
                 {"decode_bound", decode.bound},
                 {"step_s", step},
                 {"compute_s", spent("engine", "compute_ns")},
                 {"wire_s", spent("rank", "transfer_ns")},
                 {"wait_s", spent("rank", "wait_ns")},
                 {"overhead_s", spent("engine", "overhead_ns")},
                 {"draft_s", spent("engine", "draft_ns")},
                 {"drafted", spent("engine", "draft_tokens") * 1e9},
                 {"accepted", spent("engine", "accepted_draft_tokens") * 1e9},
                 {"steps", spent("engine", "steps") * 1e9},
                 {"bytes_per_s", machine.bytes_per_second()},
                 {"flops_per_s", machine.flops_per_second()}});
    waves.push_back(std::move(wave));
  }
  return waves;
}

// Measures on its own thread once the instance serves, then stops it.
class BenchHead final : public Head {
 public:
  BenchHead(Instance& instance, std::function<void(engine::Engine&)> body)
      : instance_(instance), body_(std::move(body)) {}
  ~BenchHead() override {
    if (thread_.joinable()) thread_.join();
  }
  void open(engine::Engine& engine) override {
    thread_ = std::thread([this, &engine] {
      body_(engine);
      instance_.stop("everything is measured");
    });
  }
  void drain(Deadline) override {
    if (thread_.joinable()) thread_.join();
  }
  void fail(const Error&) override {}  // the engine tells every request

 private:
  Instance& instance_;
  std::function<void(engine::Engine&)> body_;
  std::thread thread_;
};

uint16_t free_port(const std::string& address) {
  uint16_t port = 0;
  (void)comm::listen_on(address, 0, 0, &port);
  return port;
}

// One start of a layout: its waves' results.
json run_layout(const BenchArguments& a, const BenchLayout& layout, uint32_t seed) {
  // The control port must be known to every node before it starts.
  const uint16_t control_port = layout.veth ? 1120 : free_port(layout.address(0));
  std::map<int64_t, int64_t> outputs;
  constexpr int64_t kStepTokens = 2048;
  for (const int64_t batch : a.batches) {
    const int64_t prefill_steps = (batch * a.prompt + kStepTokens - 1) / kStepTokens;
    outputs[batch] = std::max(a.output, prefill_steps + kFullSteps);
  }
  const int64_t longest =
      std::max_element(outputs.begin(), outputs.end(), [](const auto& x, const auto& y) {
        return x.second < y.second;
      })->second;
  std::optional<BenchCertificates> certificates;
  if (layout.tls) certificates.emplace(table_of(layout));
  const std::string text = run_nodes(layout, [&](int node, int fd) {
    const HostResources host = host_resources();
    NodeConfig config = node_config(a, layout, node, control_port, longest);
    if (certificates) config.inter_node = certificates->of(config.table, node);
    if (layout.ucx) config.inter_node.transport = comm::Transport::kUcx;
    NodePlan plan = plan_node(config, host);
    place(layout, node, host, plan);
    Instance instance(config, plan);
    std::string failure;
    if (node == 0) {
      instance.set_head(std::make_unique<BenchHead>(instance, [&](engine::Engine& engine) {
        try {
          const std::string waves =
              run_waves(a, layout, instance, engine, plan, host, outputs, seed).dump();
          if (::write(fd, waves.data(), waves.size()) != static_cast<ssize_t>(waves.size()))
            failure = "the results could not be handed over";
        } catch (const std::exception& e) {
          failure = e.what();
        }
      }));
    }
    const int status = instance.run();
    if (!failure.empty()) throw Error(Code::kInternal, failure);
    return status;
  });
  return json::parse(text);
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// The medians over rounds of every number of a wave.
json summary(const std::vector<json>& rounds, size_t wave) {
  json result = rounds.front()[wave];
  for (const auto& [name, value] : rounds.front()[wave].items()) {
    if (!value.is_number_float()) continue;
    std::vector<double> all;
    for (const json& round : rounds) all.push_back(round[wave][name].get<double>());
    result[name] = median(all);
  }
  return result;
}

void print_layout(const BenchArguments& a, const BenchLayout& layout, const std::vector<json>& rounds) {
  double alone = 0;
  for (size_t w = 0; w < a.batches.size(); ++w) {
    const json r = summary(rounds, w);
    const auto number = [&](const char* name) { return r[name].get<double>(); };
    const int64_t batch = r["batch"].get<int64_t>();
    if (batch == 1) alone = number("whole_tok_s");
    if (w == 0)
      fmt::print("\n{}: {:.1f} GB/s and {:.0f} GFLOP/s with {} thread{}\n", layout.name,
                 number("bytes_per_s") * 1e-9, number("flops_per_s") * 1e-9, layout.threads(),
                 layout.threads() == 1 ? "" : "s");
    if (r["output"] != a.output)
      fmt::print("  batch {}: {} output tokens, so that all decode together\n", batch,
                 r["output"].get<int64_t>());
    const double prompts = static_cast<double>(batch * a.prompt);
    const double outside = number("whole_s") - number("step_s");
    fmt::print(
        "  batch {:>3}  prefill {:>8.1f} tok/s, {:>4.2f} of {:.1f} ({})   decode {:>7.1f} tok/s, "
        "{:>4.2f} of {:.1f} ({})\n"
        "             whole {:>8.1f} tok/s{}   time: compute {:.1f} %, wire {:.1f} %, wait {:.1f} %, "
        "head {:.1f} % ({:.0f} us a step, of which planning and sampling {:.0f})\n",
        batch, prompts / number("prefill_s"), number("prefill_floor_s") / number("prefill_s"),
        prompts / number("prefill_floor_s"), r["prefill_bound"].get<std::string>(),
        number("decode_tok_s"), number("decode_tok_s") / number("decode_floor_tok_s"),
        number("decode_floor_tok_s"), r["decode_bound"].get<std::string>(), number("whole_tok_s"),
        alone > 0 && batch > 1 ? fmt::format(", {:.1f} times one at a time",
                                             number("whole_tok_s") / alone)
                               : "",
        100 * number("compute_s") / number("whole_s"), 100 * number("wire_s") / number("whole_s"),
        100 * number("wait_s") / number("whole_s"), 100 * outside / number("whole_s"),
        outside * 1e6 / number("steps"), number("overhead_s") * 1e6 / number("steps"));
    if (number("drafted") > 0)
      fmt::print("             drafts: {:.0f} of {:.0f} tokens were right, {:.1f} % of the time in the "
                 "draft model\n",
                 number("accepted"), number("drafted"), 100 * number("draft_s") / number("whole_s"));
  }
  std::fflush(stdout);
}

// What TLS costs where a layout was measured with and without it: the medians of the rounds' ratios.
void print_cost_of_tls(const BenchArguments& a, const std::vector<BenchLayout>& layouts,
                       const std::vector<std::vector<json>>& results) {
  for (size_t t = 0; t < layouts.size(); ++t) {
    const auto clear = std::find_if(layouts.begin(), layouts.end(), [&](const BenchLayout& other) {
      return "tls:" + other.name == layouts[t].name;
    });
    if (clear == layouts.end()) continue;
    const auto c = static_cast<size_t>(clear - layouts.begin());
    for (size_t w = 0; w < a.batches.size(); ++w) {
      std::vector<double> decode, prefill;
      for (size_t round = 0; round < results[t].size(); ++round) {
        const json& with = results[t][round][w];
        const json& without = results[c][round][w];
        decode.push_back(with["decode_tok_s"].get<double>() / without["decode_tok_s"].get<double>());
        prefill.push_back(without["prefill_s"].get<double>() / with["prefill_s"].get<double>());
      }
      fmt::print("\nTLS on {}, batch {}: decode {:+.1f} %, prefill {:+.1f} % (medians of {} pairs; {:.1f} "
                 "tok/s in clear, {:.1f} under TLS)\n",
                 layouts[c].name, a.batches[w], 100 * (median(decode) - 1),
                 100 * (median(prefill) - 1), decode.size(),
                 summary(results[c], w)["decode_tok_s"].get<double>(),
                 summary(results[t], w)["decode_tok_s"].get<double>());
      // Steadier than speeds on a busy machine: what the wire itself takes.
      const auto wire = [&](size_t layout) {
        const json r = summary(results[layout], w);
        return r["wire_s"].get<double>() / r["steps"].get<double>();
      };
      const json clear_wave = summary(results[c], w);
      const double step = clear_wave["step_s"].get<double>() / clear_wave["steps"].get<double>();
      fmt::print("  wire {:.0f} us a step in clear, {:.0f} under TLS: {:+.1f} % of a step of {:.1f} ms\n",
                 wire(c) * 1e6, wire(t) * 1e6, 100 * (wire(t) - wire(c)) / step, step * 1e3);
    }
  }
}

}  // namespace

int bench_engine(int argc, char** argv) {
  BenchArguments a;
  CLI::App app{"Prefill and decode speed through the whole engine, on local ranks, beside the roofline.",
               "phalanx bench engine"};
  app.add_option("--model", a.model, "checkpoint directory (phalanx make-random-model makes one)")->required();
  app.add_option("--layout", a.layouts,
                 "nodes as RANKSxTHREADS joined by '+': 1x2, 2x1, 1x1+1x1 (TCP over loopback), "
                 "veth:1x1+1x1 (TCP over a veth pair), tls:veth:1x1+1x1 (the same under TLS), ucx:1x1+1x1 (over UCX); several are "
                 "measured in turn, and the cost of TLS is printed where both are there")->delimiter(',');
  app.add_option("--tp", a.tp, "without --layout: ranks of one node")->check(CLI::Range(1, 64));
  app.add_option("--threads", a.threads, "without --layout: per rank; 0: cores divided by ranks")->check(CLI::Range(0, 1024));
  app.add_option("--batch", a.batches, "numbers of requests at once")->delimiter(',')->check(CLI::Range(1, 4096));
  app.add_option("--prompt", a.prompt, "prompt tokens")->check(CLI::Range(1, 1 << 20));
  app.add_option("--output", a.output, "output tokens, more where the batch would not decode together")->check(CLI::Range(2, 100000));
  app.add_option("--rounds", a.rounds, "starts of each layout, in turn; medians are printed")->check(CLI::Range(1, 100));
  app.add_option("--draft-model", a.draft_model, "checkpoint directory of a draft model: with speculation");
  app.add_option("--draft-tokens", a.draft_tokens, "its guesses per request and step (5)")->check(CLI::Range(int64_t{1}, engine::kMostDraftTokens));
  app.add_option("--json", a.json_path, "write every number of every round to this file");
  CLI11_PARSE(app, argc, argv);
  set_up_log({.level = LogLevel::kWarn});
  if (a.layouts.empty()) {
    const int threads = a.threads > 0 ? a.threads : std::max(1, host_resources().usable_cores() / a.tp);
    a.layouts.push_back(fmt::format("{}x{}", a.tp, threads));
  }
  std::vector<BenchLayout> layouts;
  for (const std::string& text : a.layouts) layouts.push_back(parse_layout(text));
  fmt::print("{}: prompts of {} tokens, {} tokens of output; medians of {} round{}; floors: bytes "
             "that must move / read bandwidth, operations / peak\n",
             a.model, a.prompt, a.output, a.rounds, a.rounds == 1 ? "" : "s");
  std::vector<std::vector<json>> results(layouts.size());
  for (int round = 0; round < a.rounds; ++round)
    for (size_t i = 0; i < layouts.size(); ++i)
      results[i].push_back(run_layout(a, layouts[i], static_cast<uint32_t>(round + 1)));
  json everything = json::array();
  for (size_t i = 0; i < layouts.size(); ++i) {
    print_layout(a, layouts[i], results[i]);
    everything.push_back({{"layout", layouts[i].name}, {"rounds", results[i]}});
  }
  print_cost_of_tls(a, layouts, results);
  if (!a.json_path.empty()) {
    std::ofstream file(a.json_path);
    file << everything.dump(1) << '\n';
    if (!file) throw Error(Code::kPermissionDenied, fmt::format("cannot write {}", a.json_path));
  }
  return 0;
}

}  // namespace phalanx::apps
