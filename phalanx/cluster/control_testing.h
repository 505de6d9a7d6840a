#pragma once

// For tests: fake nodes, a relay that can be cut or frozen, and a fixture that starts masters and
// slaves of one process.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <sstream>
#include <thread>

#include "phalanx/base/log.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/cluster/control.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {

using namespace std::chrono_literals;

// Records the calls; each can be made slow, stuck until abort(), or failing.
class FakeNode final : public NodeActions {
 public:
  explicit FakeNode(std::vector<int> ranks) : ranks_(std::move(ranks)) {}

  std::vector<RankEndpoint> prepare(const Generation& generation) override {
    act("prepare");
    this->generation = generation;
    std::vector<RankEndpoint> endpoints;
    for (const int rank : server < 0 ? ranks_ : ranks_of(generation.seats, server))
      endpoints.push_back({rank, "127.0.0.1", static_cast<uint16_t>(2000 + rank)});
    return endpoints;
  }
  void connect(const std::vector<comm::Member>& given) override {
    act("connect");
    members = given;
  }
  LoadResult load() override {
    act("load");
    return {.kv_blocks = kv_blocks, .bytes_read = 5};
  }
  void allocate(int64_t blocks) override {
    act("allocate");
    allocated = blocks;
  }
  void serve() override { act("serve"); }
  void stand_by() override { act("stand_by"); }
  std::vector<RankReport> reports() override {
    std::vector<RankReport> result;
    for (const int rank : ranks_)
      result.push_back({.rank = rank, .pid = 7, .state = "busy", .counters = {{"steps", 3}}});
    return result;
  }
  void abort(const std::string& reason) noexcept override {
    const std::lock_guard lock(mutex_);
    aborts.push_back(reason);
    cv_.notify_all();
  }

  std::string calls() {
    const std::lock_guard lock(mutex_);
    return calls_;
  }
  bool wait_for_call(const std::string& name) {
    std::unique_lock lock(mutex_);
    return cv_.wait_for(lock, 10s, [&] { return calls_.ends_with(name + " "); });
  }
  bool wait_for_abort() {
    std::unique_lock lock(mutex_);
    return cv_.wait_for(lock, 10s, [&] { return !aborts.empty(); });
  }
  std::vector<std::string> abort_reasons() {
    const std::lock_guard lock(mutex_);
    return aborts;
  }

  int server = -1;  // in the table; its ranks are then those of the generation
  Generation generation;
  std::vector<comm::Member> members;
  int64_t kv_blocks = 100;
  int64_t allocated = 0;
  std::string slow, stuck, failing;  // names of calls
  Error failure{Code::kResourceExhausted, "no memory for it"};
  std::chrono::milliseconds slowness = 0ms;

 private:
  void act(const std::string& name) {
    std::unique_lock lock(mutex_);
    calls_ += name + " ";
    cv_.notify_all();
    if (name == slow) cv_.wait_for(lock, slowness, [] { return false; });
    if (name == failing) throw Error(failure);
    if (name == stuck) {
      cv_.wait_for(lock, 20s, [&] { return !aborts.empty(); });
      throw Error(Code::kAborted, "aborted");
    }
  }

  const std::vector<int> ranks_;
  std::mutex mutex_;
  std::condition_variable cv_;
  std::string calls_;
  std::vector<std::string> aborts;
};

// A TCP relay to the master: cut() is the death of the node behind it, freeze() its standstill.
class Relay {
 public:
  Relay(uint16_t from, uint16_t to) : from_(from), to_(to) {
    listener_ = UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int one = 1;
    ::setsockopt(listener_.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    sockaddr_in sa = address(from);
    EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&sa), sizeof sa), 0);
    EXPECT_EQ(::listen(listener_.get(), 16), 0);
    thread_ = std::thread([this] { run(); });
  }
  ~Relay() { cut(); }
  void cut() {
    cut_ = true;
    if (thread_.joinable()) thread_.join();
  }
  [[nodiscard]] uint16_t port() const { return from_; }
  void freeze() { frozen_ = true; }
  void thaw() { frozen_ = false; }

 private:
  static sockaddr_in address(uint16_t port) {
    sockaddr_in sa{};
    sa.sin_family = AF_INET;
    sa.sin_port = htons(port);
    ::inet_pton(AF_INET, "127.0.0.1", &sa.sin_addr);
    return sa;
  }
  void run() {
    std::vector<std::pair<UniqueFd, UniqueFd>> pairs;
    while (!cut_) {
      if (frozen_) {
        std::this_thread::sleep_for(5ms);
        continue;
      }
      std::vector<pollfd> fds{{listener_.get(), POLLIN, 0}};
      for (const auto& [a, b] : pairs) {
        fds.push_back({a.get(), POLLIN, 0});
        fds.push_back({b.get(), POLLIN, 0});
      }
      ::poll(fds.data(), fds.size(), 5);
      for (size_t i = 1; i < fds.size(); ++i) {
        if (fds[i].revents == 0) continue;
        auto& [a, b] = pairs[(i - 1) / 2];
        char buffer[65536];
        const ssize_t n = ::read(fds[i].fd, buffer, sizeof buffer);
        const int other = (i % 2 == 1 ? b : a).get();
        if (n <= 0) {
          a.reset();
          b.reset();
          break;
        }
        for (ssize_t done = 0; done < n;) {
          const ssize_t k =
              ::send(other, buffer + done, static_cast<size_t>(n - done), MSG_NOSIGNAL);
          if (k <= 0) break;
          done += k;
        }
      }
      std::erase_if(pairs, [](const auto& pair) { return !pair.first.valid(); });
      if ((fds[0].revents & POLLIN) != 0) {
        UniqueFd in(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        UniqueFd out(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_in sa = address(to_);
        if (::connect(out.get(), reinterpret_cast<sockaddr*>(&sa), sizeof sa) == 0)
          pairs.emplace_back(std::move(in), std::move(out));
      }
    }
    listener_.reset();
  }

  const uint16_t from_, to_;
  UniqueFd listener_;
  std::atomic<bool> cut_ = false, frozen_ = false;
  std::thread thread_;
};

inline uint16_t next_port() {
  static uint16_t begin = static_cast<uint16_t>(20000 + ::getpid() % 10000);
  const auto port = net::first_free_port("127.0.0.1", begin, 40000);
  begin = static_cast<uint16_t>(*port + 1);
  return *port;
}

inline double seconds_of(const std::function<void()>& body) {
  const int64_t begin = now_ns();
  body();
  return static_cast<double>(now_ns() - begin) * 1e-9;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// What run() or start() ended with; "" for an orderly end.
struct Outcome {
  Code code = Code::kUnknown;
  std::string text;
};

inline Outcome outcome_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return {e.code(), e.what()};
  }
  return {};
}

class Control : public ::testing::Test {
 protected:
  void SetUp() override {
    log_file_ = (std::filesystem::temp_directory_path() /
                 ("control_test." + std::to_string(::getpid()) + ".log")).string();
    set_up_log({.to_stderr = false, .file = log_file_});
    port_ = next_port();
  }
  void TearDown() override {
    for (auto& slave : slaves_) {
      if (slave.participant) slave.participant->leave("the test ends");
    }
    slaves_.clear();
    coordinator_.reset();
    set_up_log({});
    std::filesystem::remove(log_file_);
  }
  std::string log() {
    std::stringstream text;
    text << std::ifstream(log_file_).rdbuf();
    return text.str();
  }
  bool wait_for_log(const std::string& part) {
    for (int i = 0; i < 500 && !contains(log(), part); ++i) std::this_thread::sleep_for(20ms);
    return contains(log(), part);
  }

  // Node i has the address 127.0.0.(i+1) and i+1 ranks.
  void make_nodes(int count) {
    table_ = {};
    fakes_.clear();
    for (int i = 0; i < count; ++i) {
      Server server{.server_id = "127.0.0." + std::to_string(i + 1)};
      server.container_ip = server.server_id;
      std::vector<int> ranks;
      for (int d = 0; d <= i; ++d) {
        ranks.push_back(table_.world_size);
        server.devices.push_back({.device_id = d, .rank_id = table_.world_size++});
      }
      table_.servers.push_back(server);
      fakes_.push_back(std::make_unique<FakeNode>(ranks));
      fakes_.back()->kv_blocks = 100 - i;
      fakes_.back()->server = i;
    }
    slaves_.resize(static_cast<size_t>(count));
  }
  ControlOptions options(int server) {
    return {.table = table_,
            .own_server = server,
            .port = port_,
            .facts = {{"wire_version", "1"}, {"model", "abc"}},
            .offer = {.build = "b", .numeric_classes = {"fma32", "bf16dp", "amx"},
                      .memory_bytes = 1 << 30, .cores = 2},
            .notice_seconds = 0.2,
            .heartbeat_seconds = 0.1,
            .lost_seconds = 1.5};
  }
  void start_slave(int server) { start_slave(server, options(server)); }
  void start_slave(int server, const ControlOptions& given) {
    Slave& slave = slaves_[static_cast<size_t>(server)];
    slave.participant = std::make_unique<Participant>(given, *fakes_[static_cast<size_t>(server)]);
    slave.outcome = std::async(std::launch::async, [participant = slave.participant.get()] {
      return outcome_of([&] { participant->run(); });
    });
  }
  void make_master() { make_master(options(0)); }
  void make_master(const ControlOptions& given) {
    coordinator_ = std::make_unique<Coordinator>(given, *fakes_[0]);
  }
  Outcome start_master() {
    return outcome_of([&] { coordinator_->start(); });
  }
  Outcome slave_outcome(int server) {
    auto& future = slaves_[static_cast<size_t>(server)].outcome;
    if (future.wait_for(10s) != std::future_status::ready) return {Code::kUnknown, "still running"};
    return future.get();
  }
  // All nodes up and serving.
  void serve(int count) {
    make_nodes(count);
    make_master();
    for (int i = 1; i < count; ++i) start_slave(i);
    const Outcome outcome = start_master();
    ASSERT_EQ(outcome.text, "");
  }

  struct Slave {
    std::unique_ptr<Participant> participant;
    std::future<Outcome> outcome;
  };
  std::string log_file_;
  uint16_t port_ = 0;
  RankTable table_;
  std::vector<std::unique_ptr<FakeNode>> fakes_;
  std::unique_ptr<Coordinator> coordinator_;
  std::vector<Slave> slaves_;
};

}  // namespace phalanx::cluster
