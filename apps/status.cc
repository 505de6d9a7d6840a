#include "apps/status.h"

#include <fmt/format.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr size_t kMostBytes = 16 << 20;

[[noreturn]] void cannot_ask(const std::string& where, const std::string& why) {
  throw Error(Code::kUnavailable,
              fmt::format("cannot ask {}: {}. Fix: name the management plane of the master with "
                          "--address and --port (managementIpAddress and managementPort of its "
                          "config.json)",
                          where, why));
}

void wait_for(int fd, short events, Deadline deadline, const std::string& where) {
  pollfd wait{fd, events, 0};
  while (!deadline.passed()) {
    if (::poll(&wait, 1, deadline.poll_ms(1000)) > 0) return;
  }
  cannot_ask(where, "no answer in time");
}

// Body of a GET over plain HTTP.
std::string get(const std::string& address, int port, const std::string& path, Deadline deadline) {
  const std::string where = net::endpoint(address, static_cast<uint16_t>(port));
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int failed = ::getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found))
    cannot_ask(where, ::gai_strerror(failed));
  const UniqueFd fd(::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  int error = ::connect(fd.get(), found->ai_addr, found->ai_addrlen) == 0 ? 0 : errno;
  ::freeaddrinfo(found);
  if (error == EINPROGRESS) {
    wait_for(fd.get(), POLLOUT, deadline, where);
    socklen_t size = sizeof error;
    ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  }
  if (error != 0) cannot_ask(where, std::strerror(error));
  const std::string request =
      fmt::format("GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", path, where);
  if (::send(fd.get(), request.data(), request.size(), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(request.size()))
    cannot_ask(where, "the request could not be sent");
  std::string answer;
  char buffer[65536];
  for (;;) {
    const ssize_t n = ::recv(fd.get(), buffer, sizeof buffer, 0);
    if (n == 0) break;
    if (n > 0) {
      answer.append(buffer, static_cast<size_t>(n));
      if (answer.size() > kMostBytes) cannot_ask(where, "its answer is too long");
    } else if (errno == EAGAIN || errno == EINTR) {
      wait_for(fd.get(), POLLIN, deadline, where);
    } else {
      cannot_ask(where, std::strerror(errno));
    }
  }
  const size_t body = answer.find("\r\n\r\n");
  if (!answer.starts_with("HTTP/1.1 ") || body == std::string::npos)
    cannot_ask(where, "that is no plain HTTP (httpsEnabled?)");
  if (!answer.starts_with("HTTP/1.1 200"))
    cannot_ask(where, "it answered " + answer.substr(9, answer.find("\r\n") - 9));
  return answer.substr(body + 4);
}

std::string text_of(const json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) return "-";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

int64_t number_of(const json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? found->get<int64_t>() : 0;
}

std::string range_of(const json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array() || found->size() != 2) return "-";
  const int64_t begin = (*found)[0].get<int64_t>();
  const int64_t end = (*found)[1].get<int64_t>();
  return begin == end ? "-" : fmt::format("{}-{}", begin, end - 1);
}

void print_tables(const json& status) {
  const json& s = status.at("phalanx");
  const int64_t ranks = number_of(s, "world_size");
  const int64_t configured = number_of(s, "configured_world_size");
  fmt::print("{}, generation {}, {} ranks{}{}\n", text_of(s, "state"), text_of(s, "generation"),
             ranks, configured > ranks ? fmt::format(" of {}", configured) : "",
             s.value("weights_decided", false) ? ", weights by measured memory bandwidth" : "");
  const json recovery = s.value("recovery", json::object());
  if (const std::string loss = recovery.value("loss", ""); !loss.empty())
    fmt::print("recovering from: {}\n", loss);
  if (number_of(recovery, "count") > 0)
    fmt::print("recovered {} times, the last in {:.2f} s from: {}\n", number_of(recovery, "count"),
               recovery.value("last_seconds", 0.0), recovery.value("last_loss", ""));
  if (const auto resource = status.find("resource"); resource != status.end()) {
    fmt::print("requests: {} running, {} waiting; KV blocks: {} of {} free\n",
               text_of(*resource, "runningRequestNum"), text_of(*resource, "waitingRequestNum"),
               text_of(*resource, "freeNpuBlockNums"), text_of(*resource, "totalNpuBlockNums"));
  }
  fmt::print("\n{:<24} {:<12} {:<8} {:>12} {:>6} {:>12}  {}\n", "node", "state", "verdict",
             "contact", "cores", "memory", "reason");
  for (const json& node : s.at("nodes")) {
    const double contact = node.value("last_contact_seconds", -1.0);
    fmt::print("{:<24} {:<12} {:<8} {:>12} {:>6} {:>12}  {}\n", text_of(node, "address"),
               text_of(node, "state"), text_of(node, "verdict"),
               contact < 0 ? "never" : fmt::format("{:.1f} s ago", contact), text_of(node, "cores"),
               fmt::format("{:.1f} GiB",
                           static_cast<double>(number_of(node, "memory_bytes")) / (1 << 30)),
               text_of(node, "reason"));
  }
  fmt::print("\n{:>4}  {:<24} {:<10} {:>8} {:>6} {:>9} {:>9} {:>11} {:>9} {:>7} {:>9} {:>9} {:>9}\n",
             "rank", "node", "state", "pid", "weight", "heads", "kv heads", "mlp rows", "steps", "loaded",
             "compute", "transfer", "waiting");
  for (const json& rank : s.at("ranks")) {
    const double busy = static_cast<double>(number_of(rank, "compute_ns") +
                                            number_of(rank, "transfer_ns") +
                                            number_of(rank, "wait_ns"));
    const auto share = [&](const char* key) {
      return busy > 0 ? fmt::format("{:.1f} %", 100 * static_cast<double>(number_of(rank, key)) / busy)
                      : std::string("-");
    };
    const int64_t to_read = number_of(rank, "bytes_to_read");
    fmt::print("{:>4}  {:<24} {:<10} {:>8} {:>6} {:>9} {:>9} {:>11} {:>9} {:>7} {:>9} {:>9} {:>9}\n",
               text_of(rank, "rank"), text_of(rank, "node"), text_of(rank, "state"),
               text_of(rank, "pid"), fmt::format("{:g}", rank.value("weight", 1.0)), range_of(rank, "heads"), range_of(rank, "kv_heads"),
               range_of(rank, "mlp_rows"), text_of(rank, "steps_done"),
               to_read == 0 ? "kept"
                            : fmt::format("{:.0f} %", 100.0 *
                                                          static_cast<double>(
                                                              number_of(rank, "bytes_read")) /
                                                          static_cast<double>(to_read)),
               share("compute_ns"), share("transfer_ns"), share("wait_ns"));
  }
}

}  // namespace

int status_main(int argc, char** argv) {
  std::string address;
  int port = 0;
  bool as_json = false;
  double seconds = 5;
  CLI::App app{"Nodes, ranks, states and load of a running instance."};
  app.add_option("--address", address, "management address of the master (else of config.json, else 127.0.0.1)");
  app.add_option("--port", port, "its management port (else of config.json, else 1026)")->check(CLI::Range(1, 65535));
  app.add_flag("--json", as_json, "the whole status as JSON");
  app.add_option("--seconds", seconds, "longest wait for the answer (5)")->check(CLI::Range(0.1, 3600.0));
  CLI11_PARSE(app, argc, argv);
  if (const char* path = std::getenv("MIES_CONFIG_JSON_PATH"); path != nullptr && *path != '\0') {
    const json server = read_json_file(path, 1 << 20).value("ServerConfig", json::object());
    if (address.empty())
      address = server.value("managementIpAddress", server.value("ipAddress", std::string()));
    if (port == 0) port = server.value("managementPort", 0);
  }
  if (address.empty()) address = "127.0.0.1";
  if (port == 0) port = 1026;
  const std::string body = get(address, port, "/v1/status", Deadline::in_seconds(seconds));
  const json status = parse_json(body, "the status of " + address);
  if (as_json) {
    fmt::print("{}\n", status.dump(2));
  } else {
    print_tables(status);
  }
  return status.at("phalanx").value("state", "") == "serving" ? 0 : 1;
}

}  // namespace phalanx::apps
