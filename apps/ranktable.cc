#include "apps/ranktable.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/cluster/rank_table.h"
#include "phalanx/cluster/seating.h"
#include "phalanx/models/model.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using cluster::Device;
using cluster::RankTable;
using cluster::Server;

struct HostEntry {
  std::string host;
  int devices = 0;
};

// "a", "a:2", "10.0.0.1:2", "fe80::1", "[fe80::1]:2".
HostEntry parse_host(const std::string& text, int default_devices) {
  HostEntry entry{.host = text, .devices = default_devices};
  std::string count;
  const size_t colon = text.rfind(':');
  if (!text.empty() && text.front() == '[') {
    const size_t close = text.find(']');
    if (close == std::string::npos)
      throw Error(Code::kInvalidArgument, fmt::format("--hosts: '{}' lacks the closing ]", text));
    entry.host = text.substr(1, close - 1);
    if (close + 1 < text.size()) count = text.substr(close + 1);
  } else if (colon != std::string::npos && text.find(':') == colon) {
    entry.host = text.substr(0, colon);
    count = text.substr(colon);
  }
  if (!count.empty()) {
    const char* end = count.data() + count.size();
    const auto [stop, error] = std::from_chars(count.data() + 1, end, entry.devices);
    if (count[0] != ':' || error != std::errc() || stop != end)
      entry.devices = 0;
  }
  if (entry.host.empty() || entry.devices < 1 || entry.devices > 1024) {
    throw Error(Code::kInvalidArgument,
                fmt::format("--hosts: found '{}', expected a host name or address, or host:devices "
                            "with 1 to 1024 devices",
                            text));
  }
  return entry;
}

void set_weight(const std::string& text, Device& device) {
  device.auto_weight = text == "auto";
  if (device.auto_weight) return;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, device.weight);
  if (error != std::errc() || stop != end || !(device.weight > 0))
    throw Error(Code::kInvalidArgument,
                fmt::format("--weights: found '{}', expected a number above 0, or auto", text));
}

RankTable make_table(const std::vector<std::string>& hosts, int devices,
                     const std::vector<std::string>& weights, const std::vector<std::string>& spares) {
  RankTable table;
  for (const std::string& text : hosts) {
    const HostEntry entry = parse_host(text, devices);
    Server server;
    server.server_id = net::resolve(entry.host);
    server.container_ip = server.server_id;
    for (int i = 0; i < entry.devices; ++i) {
      server.devices.push_back(
          {.device_id = i, .device_ip = server.server_id, .rank_id = table.world_size++});
    }
    table.servers.push_back(server);
  }
  for (const std::string& text : spares) {
    Server server{.server_id = net::resolve(text)};
    server.container_ip = server.server_id;
    server.spare = true;
    table.servers.push_back(server);
  }
  if (!weights.empty()) {
    const bool all_auto = weights == std::vector<std::string>{"auto"};
    if (!all_auto && weights.size() != static_cast<size_t>(table.world_size)) {
      throw Error(Code::kInvalidArgument,
                  fmt::format("--weights: found {} numbers, expected one per rank, {}, or one auto",
                              weights.size(), table.world_size));
    }
    for (Server& server : table.servers) {
      for (Device& device : server.devices)
        set_weight(all_auto ? weights[0] : weights[static_cast<size_t>(device.rank_id)], device);
    }
  }
  return table;
}

[[noreturn]] void write_failed(const std::string& path) {
  throw Error(Code::kUnavailable,
              fmt::format("cannot write {}: {}", path, std::strerror(errno)));
}

// Mode 0640, whole or not at all.
void write_file(const std::string& path, const std::string& text) {
  const std::string temporary = fmt::format("{}.{}.tmp", path, ::getpid());
  const UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0640));
  if (!fd.valid()) write_failed(temporary);
  const auto give_up = [&] {
    const int error = errno;
    ::unlink(temporary.c_str());
    errno = error;
    write_failed(path);
  };
  if (::fchmod(fd.get(), 0640) != 0) give_up();
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(fd.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) give_up();
    done += static_cast<size_t>(n);
  }
  if (::fsync(fd.get()) != 0 || ::rename(temporary.c_str(), path.c_str()) != 0) give_up();
}

std::string rank_list(const Server& server) {
  std::string text;
  for (const Device& device : server.devices)
    text += fmt::format("{}{}", text.empty() ? "" : ", ", device.rank_id);
  return text;
}

std::string range_text(const tensor::Range& range) {
  return range.size() == 0 ? "-" : fmt::format("{}-{}", range.begin, range.end - 1);
}

void print_servers(const RankTable& table) {
  if (table.has_auto_weights()) fmt::print("weights by measurement at the start; ");
  fmt::print("{} server{}, {} rank{}; master {} (rank 0)\n", table.servers.size(),
             table.servers.size() == 1 ? "" : "s", table.world_size,
             table.world_size == 1 ? "" : "s",
             table.servers[static_cast<size_t>(table.master())].address());
  for (const Server& server : table.servers)
    if (server.spare)
      fmt::print("  {:<20} spare\n", server.address());
    else
      fmt::print("  {:<20} rank{} {}\n", server.address(), server.devices.size() == 1 ? " " : "s",
                 rank_list(server));
  for (const std::string& note : table.notes) fmt::print("note: {}\n", note);
}

// Who gets which heads, rows and vocabulary, what each rank reads, and how even that is.
void print_layout(const RankTable& table, const std::string& directory) {
  const models::ModelInfo info = models::read_model_info(directory);
  std::vector<double> weights;
  const cluster::Seating seats = cluster::table_seating(table);
  double weight_sum = 0;
  for (int rank = 0; rank < table.world_size; ++rank) {
    weights.push_back(seats[static_cast<size_t>(rank)].weight);
    weight_sum += weights.back();
  }
  const std::vector<models::RankLayout> layout = models::plan_layout(info, weights);
  fmt::print("\n{}: {} layers, hidden {}, {} query heads, {} KV heads, intermediate {}, "
             "vocabulary {}\n",
             info.model_type, info.num_layers, info.hidden_size, info.num_attention_heads,
             info.num_key_value_heads, info.intermediate_size, info.vocab_size);
  fmt::print("{:>5}  {:<20} {:>11} {:>9} {:>13} {:>13} {:>15} {:>10} {:>8} {:>9}\n", "rank",
             "server", "query heads", "KV heads", "hidden rows", "MLP rows", "vocabulary rows",
             "MiB read", "share", "of weight");
  std::vector<int64_t> bytes;
  int64_t sum = 0;
  for (int rank = 0; rank < table.world_size; ++rank) {
    const models::MemoryNeed need = models::memory_need(
        info, {.directory = directory, .max_step_tokens = 1, .max_step_rows = 1, .max_sequence = 1,
               .weights = weights, .rank = rank});
    bytes.push_back(need.read_bytes);
    sum += need.read_bytes;
  }
  double slowest = 0;  // largest work per weight, relative to the mean
  for (size_t rank = 0; rank < layout.size(); ++rank) {
    const models::RankLayout& r = layout[rank];
    const double share = sum > 0 ? static_cast<double>(bytes[rank]) / static_cast<double>(sum) : 0;
    const double wanted = weights[rank] / weight_sum;
    slowest = std::max(slowest, share / wanted);
    const Server& server =
        table.servers[static_cast<size_t>(table.server_of_rank(static_cast<int>(rank)))];
    fmt::print("{:>5}  {:<20} {:>11} {:>9} {:>13} {:>13} {:>15} {:>10.1f} {:>7.1f}% {:>8.2f}x\n",
               rank, server.address(), range_text(r.query_heads), range_text(r.kv_heads),
               range_text(r.hidden_rows), range_text(r.mlp_rows), range_text(r.vocab_rows),
               static_cast<double>(bytes[rank]) / (1 << 20), share * 100, share / wanted);
  }
  if (table.has_auto_weights())
    fmt::print("weights \"auto\": shown as equal; decided at the start from the memory bandwidth that "
               "each node then measures (phalanx doctor shows what comes of it)\n");
  fmt::print("predicted balance: {:.0f}% (the busiest rank has {:.2f} times the work its weight "
             "asks for; the others wait for it)\n",
             slowest > 0 ? 100 / slowest : 0, slowest);
}

}  // namespace

int ranktable_main(int argc, char** argv) {
  CLI::App app("Make, check or show a rank table", "phalanx ranktable");
  app.require_subcommand(1);

  std::vector<std::string> hosts;
  std::vector<std::string> weights, spares;
  std::string output;
  int devices = 1;
  CLI::App* make = app.add_subcommand("make", "Write a rank table for the given hosts");
  make->add_option("--hosts", hosts,
                   "Names or addresses, comma-separated; host:devices for several ranks on one "
                   "host; the first is the master")
      ->delimiter(',')
      ->required();
  make->add_option("--devices", devices, "Ranks per host where the host names no number")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  make->add_option("--weights", weights,
                   "Share of the model of each rank, comma-separated, a number or auto (from measured "
                   "memory bandwidth); one auto: of all")
      ->delimiter(',');
  make->add_option("--spares", spares,
                   "Names or addresses of servers without ranks, which take over those of a lost one")
      ->delimiter(',');
  make->add_option("-o,--output", output, "File to write (mode 0640); without it: stdout");

  std::string file;
  std::string model;
  CLI::App* check = app.add_subcommand("check", "Check a rank table: exit status 0 or 1");
  check->add_option("file", file, "Rank table")->required();
  CLI::App* show = app.add_subcommand("show", "Show master, ranks and, with a model, the layout");
  show->add_option("file", file, "Rank table")->required();
  show->add_option("--model", model, "Checkpoint directory (its config.json is read)");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const int status = app.exit(e);
    return status == 0 ? 0 : 2;
  }
  try {
    if (make->parsed()) {
      const std::string text = to_json(make_table(hosts, devices, weights, spares));
      const RankTable table = cluster::parse_rank_table(text, "of --hosts");
      if (output.empty()) {
        fmt::print("{}", text);
      } else {
        write_file(output, text);
        fmt::print("{}: ", output);
        print_servers(table);
      }
    } else if (check->parsed()) {
      const RankTable table = cluster::load_rank_table(file);
      fmt::print("{}: good: ", file);
      print_servers(table);
    } else {
      const RankTable table = cluster::load_rank_table(file);
      print_servers(table);
      if (!model.empty()) print_layout(table, model);
    }
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace phalanx::apps
