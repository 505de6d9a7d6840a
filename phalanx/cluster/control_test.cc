#include "phalanx/cluster/control.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <sstream>
#include <thread>

#include "phalanx/base/log.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/address.h"
#include "phalanx/net/testing_certificates.h"

namespace phalanx::cluster {
namespace {

using namespace std::chrono_literals;

// Records the calls; each can be made slow, stuck until abort(), or failing.
class FakeNode final : public NodeActions {
 public:
  explicit FakeNode(std::vector<int> ranks) : ranks_(std::move(ranks)) {}

  std::vector<RankEndpoint> prepare(const Generation& generation) override {
    act("prepare");
    this->generation = generation;
    std::vector<RankEndpoint> endpoints;
    for (const int rank : ranks_)
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
  std::vector<std::string> abort_reasons() {
    const std::lock_guard lock(mutex_);
    return aborts;
  }

  Generation generation;
  std::vector<comm::Member> members;
  int64_t kv_blocks = 100;
  int64_t allocated = 0;
  std::string slow, stuck, failing;  // names of calls
  std::chrono::milliseconds slowness = 0ms;

 private:
  void act(const std::string& name) {
    std::unique_lock lock(mutex_);
    calls_ += name + " ";
    cv_.notify_all();
    if (name == slow) cv_.wait_for(lock, slowness, [] { return false; });
    if (name == failing) throw Error(Code::kResourceExhausted, "no memory for it");
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
  Relay(uint16_t from, uint16_t to) : to_(to) {
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
  void freeze() { frozen_ = true; }

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

  const uint16_t to_;
  UniqueFd listener_;
  std::atomic<bool> cut_ = false, frozen_ = false;
  std::thread thread_;
};

uint16_t next_port() {
  static uint16_t begin = static_cast<uint16_t>(20000 + ::getpid() % 10000);
  const auto port = net::first_free_port("127.0.0.1", begin, 40000);
  begin = static_cast<uint16_t>(*port + 1);
  return *port;
}

double seconds_of(const std::function<void()>& body) {
  const int64_t begin = now_ns();
  body();
  return static_cast<double>(now_ns() - begin) * 1e-9;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// What run() or start() ended with; "" for an orderly end.
struct Outcome {
  Code code = Code::kUnknown;
  std::string text;
};

Outcome outcome_of(const std::function<void()>& body) {
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

class ControlOfN : public Control, public ::testing::WithParamInterface<int> {};

TEST_P(ControlOfN, RunsAllPhasesEverywhereThenStops) {
  const int n = GetParam();
  make_nodes(n);
  for (int i = n - 1; i > 0; i -= 2) start_slave(i);  // some before the master, some after
  std::this_thread::sleep_for(150ms);
  make_master();
  for (int i = n - 2; i > 0; i -= 2) start_slave(i);
  const Outcome outcome = start_master();
  ASSERT_EQ(outcome.text, "");

  const FakeNode& master = *fakes_[0];
  EXPECT_NE(master.generation.incarnation, 0u);
  EXPECT_EQ(master.generation.number, 1u);
  EXPECT_EQ(master.generation.numeric_class, "amx");
  ASSERT_EQ(master.members.size(), static_cast<size_t>(table_.world_size));
  for (int i = 0; i < n; ++i) {
    FakeNode& node = *fakes_[static_cast<size_t>(i)];
    EXPECT_EQ(node.calls(), "prepare connect load allocate serve ");
    EXPECT_EQ(node.generation.incarnation, master.generation.incarnation);
    EXPECT_EQ(node.generation.token, master.generation.token);
    EXPECT_EQ(node.generation.numeric_class, "amx");
    EXPECT_EQ(node.allocated, 100 - (n - 1));
    ASSERT_EQ(node.members.size(), master.members.size());
    for (size_t r = 0; r < node.members.size(); ++r) {
      EXPECT_EQ(node.members[r].rank, static_cast<int>(r));
      EXPECT_EQ(node.members[r].node, table_.server_of_rank(static_cast<int>(r)));
      EXPECT_EQ(node.members[r].data_port, 2000 + r);
      EXPECT_EQ(node.members[r].host,
                "127.0.0." + std::to_string(node.members[r].node + 1));
    }
    EXPECT_TRUE(node.abort_reasons().empty());
  }
  std::this_thread::sleep_for(250ms);
  for (const NodeView& view : coordinator_->nodes()) {
    EXPECT_EQ(view.state, NodeState::kServing) << view.address;
    EXPECT_LT(view.last_contact_seconds, 1.0);
    ASSERT_EQ(view.ranks.size(), static_cast<size_t>(view.server) + 1);
    EXPECT_EQ(view.ranks[0].counters.at("steps"), 3u);
  }
  EXPECT_LT(seconds_of([&] { coordinator_->stop("enough", Deadline::in_seconds(5)); }), 1.0);
  for (int i = 1; i < n; ++i) EXPECT_EQ(slave_outcome(i).text, "");
  for (const auto& node : fakes_) EXPECT_TRUE(node->abort_reasons().empty());
}

INSTANTIATE_TEST_SUITE_P(Nodes, ControlOfN, ::testing::Values(1, 2, 3, 4));

TEST_F(Control, SingleServerOpensNoSocket) {
  make_nodes(1);
  ControlOptions given = options(0);
  given.table.servers[0].container_ip = "192.0.2.1";  // not on this machine
  make_master(given);
  EXPECT_EQ(start_master().text, "");
  EXPECT_EQ(net::port_problem("127.0.0.1", port_), "");
}

TEST_F(Control, PortInUseIsNamed) {
  make_nodes(2);
  make_master();
  const Outcome outcome = outcome_of([&] { Coordinator second(options(0), *fakes_[0]); });
  EXPECT_EQ(outcome.code, Code::kUnavailable);
  EXPECT_TRUE(contains(outcome.text, "cannot listen on 127.0.0.1:" + std::to_string(port_)));
  EXPECT_TRUE(contains(outcome.text, "pid " + std::to_string(::getpid()))) << outcome.text;
  // Only the master's own address is bound.
  EXPECT_EQ(net::port_problem("127.0.0.2", port_), "");
}

TEST_F(Control, BothSidesSayForWhomTheyWait) {
  make_nodes(3);
  start_slave(1);
  EXPECT_TRUE(wait_for_log("waiting for master 127.0.0.1:" + std::to_string(port_)));
  EXPECT_TRUE(wait_for_log("Connection refused"));
  make_master();
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  EXPECT_TRUE(wait_for_log(
      "] here: 127.0.0.1 (master), 127.0.0.2; waiting for 127.0.0.3 (for "));
  EXPECT_TRUE(wait_for_log("joined; here: 127.0.0.1 (master), 127.0.0.2; waiting for"));
  start_slave(2);
  EXPECT_EQ(started.get().text, "");
}

TEST_F(Control, ProxyVariablesAreIgnored) {
  ::setenv("http_proxy", "http://127.0.0.1:9", 1);
  ::setenv("grpc_proxy", "http://127.0.0.1:9", 1);
  serve(2);
  ::unsetenv("http_proxy");
  ::unsetenv("grpc_proxy");
}

TEST_F(Control, MismatchIsShownOnBothSides) {
  make_nodes(2);
  make_master();
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ControlOptions other = options(1);
  other.facts = {{"wire_version", "1"}, {"model", "xyz"}, {"extra", "e"}};
  start_slave(1, other);
  const Outcome refused = slave_outcome(1);
  EXPECT_EQ(refused.code, Code::kFailedPrecondition);
  const std::string rows =
      "         master 127.0.0.1  node 127.0.0.2\n"
      "  model  abc               xyz\n"
      "  extra  -                 e\n";
  EXPECT_TRUE(contains(refused.text, rows)) << refused.text;
  EXPECT_FALSE(contains(refused.text, "wire_version")) << refused.text;
  EXPECT_TRUE(contains(log(), rows)) << log();
  EXPECT_TRUE(wait_for_log("waiting for 127.0.0.2 (for 0 s, last: refused: node 127.0.0.2"));
  start_slave(1);  // mended
  EXPECT_EQ(started.get().text, "");
}

// Certificates by node, as ControlOptions wants them.
struct ControlTls : Control {
  ControlOptions with(int server, const std::shared_ptr<const net::TlsMaterial>& tls) {
    ControlOptions given = options(server);
    given.tls = tls;
    return given;
  }
  std::shared_ptr<const net::TlsMaterial> good(int server) {
    return certificates_.material("127.0.0." + std::to_string(server + 1),
                                  server == 0 ? "inter-node:master" : "inter-node:slave");
  }
  net::CertificateOrder order(int server) {
    return net::TestCertificates::order("127.0.0." + std::to_string(server + 1),
                                        server == 0 ? "inter-node:master" : "inter-node:slave");
  }
  // A slave with this certificate is refused by a good master, whose log has the sentence; the slave
  // never gets further than waiting.
  void master_refuses(const std::shared_ptr<const net::TlsMaterial>& bad, const char* sentence) {
    FakeNode node({1, 2});
    ControlOptions given = with(1, bad);
    // A busy machine may need many times what a handshake takes.
    given.join_seconds = *sentence == '\0' ? 0.4 : 30;
    Participant slave(given, node);
    auto joined = std::async(std::launch::async, [&] { return outcome_of([&] { slave.run(); }); });
    // Of two that refuse each other the slave is first, and ends by itself.
    while (joined.wait_for(20ms) != std::future_status::ready && !said(sentence)) {
    }
    slave.leave("seen enough");
    const Outcome outcome = joined.get();
    EXPECT_TRUE(contains(outcome.text, sentence) || contains(log(), sentence))
        << outcome.text << log();
    EXPECT_EQ(node.calls(), "");
  }

  bool said(const char* sentence) { return *sentence != '\0' && contains(log(), sentence); }

  net::TestCertificates certificates_;
};

TEST_F(ControlTls, GoodCertificatesServe) {
  make_nodes(3);
  make_master(with(0, good(0)));
  for (int i = 1; i < 3; ++i) start_slave(i, with(i, good(i)));
  EXPECT_EQ(start_master().text, "");
}

TEST_F(ControlTls, TheMasterRefusesEachBadCertificateAndServesOthers) {
  make_nodes(2);
  make_master(with(0, good(0)));
  net::CertificateOrder bad = order(1);
  bad.not_after = net::TestCertificates::now() - 60;
  master_refuses(certificates_.material(bad), "certificate has expired");
  bad = order(1);
  bad.not_before = net::TestCertificates::now() + 600;
  master_refuses(certificates_.material(bad), "certificate is not yet valid");
  bad = order(1);
  bad.for_client = false;
  master_refuses(certificates_.material(bad), "certificate may not be used by a client");
  bad = order(1);
  bad.addresses = {"127.0.0.9"};
  master_refuses(certificates_.material(bad), "certificate is of another node");
  bad = order(1);
  bad.role = "metrics";
  master_refuses(certificates_.material(bad), "certificate is of another role");
  master_refuses(certificates_.material(
                     order(1), net::PrivateKey::make(net::PrivateKey::Kind::kRsa, 2048)),
                 "certificate has a weak key");
  net::TestCertificates others("other authority");
  master_refuses(others.material("127.0.0.2", "inter-node:slave"),
                 "certificate was signed by another authority");
  const auto revoked = good(1);
  certificates_.revoke(*revoked);
  master_refuses(revoked, "certificate was revoked");
  certificates_.revoke_nothing();
  master_refuses(nullptr, "");  // in the clear
  start_slave(1, with(1, good(1)));
  EXPECT_EQ(start_master().text, "");
}

TEST_F(ControlTls, ASlaveRefusesAFalseMasterByName) {
  make_nodes(2);
  make_master(with(0, certificates_.material("127.0.0.9", "inter-node:master")));
  start_slave(1, with(1, good(1)));
  const Outcome outcome = slave_outcome(1);
  EXPECT_EQ(outcome.code, Code::kPermissionDenied);
  EXPECT_TRUE(contains(outcome.text, "this node refused master 127.0.0.1: certificate of the peer"))
      << outcome.text;
  EXPECT_TRUE(contains(outcome.text, "expected 127.0.0.1, the master of the rank table"))
      << outcome.text;
}

TEST_F(ControlTls, AnotherNodesCertificateCannotClaimTheEntry) {
  make_nodes(3);
  make_master(with(0, good(0)));
  start_slave(1, with(1, good(2)));  // a good slave, but not this one
  const Outcome outcome = slave_outcome(1);
  EXPECT_EQ(outcome.code, Code::kPermissionDenied);
  EXPECT_TRUE(contains(outcome.text, "certificate is of another node")) << outcome.text;
  EXPECT_TRUE(contains(log(), "refused a peer that claims to be server_list[1]")) << log();
}

TEST_F(Control, AnotherRankTableIsAMismatch) {
  make_nodes(2);
  make_master();
  ControlOptions other = options(1);
  other.table.servers[1].devices[0].weight = 2;
  start_slave(1, other);
  EXPECT_TRUE(contains(slave_outcome(1).text, "rank table  " + table_.digest()));
}

TEST_F(Control, SecondClaimIsRefusedWhileTheFirstLives) {
  make_nodes(2);
  make_master();
  start_slave(1);
  ASSERT_TRUE(wait_for_log("node 127.0.0.2 joined"));
  FakeNode twin({1, 2});
  Participant second(options(1), twin);
  const Outcome outcome = outcome_of([&] { second.run(); });
  EXPECT_EQ(outcome.code, Code::kAlreadyExists);
  EXPECT_TRUE(contains(outcome.text, "node 127.0.0.2 has already joined and is alive"));
  EXPECT_EQ(start_master().text, "");
  EXPECT_EQ(twin.calls(), "");
}

TEST_F(Control, UnknownNodeIsRefusedByName) {
  make_nodes(3);
  make_master();
  ControlOptions stranger = options(1);
  stranger.facts.emplace_back("rank table", table_.digest());
  stranger.table.servers[1].container_ip = "127.0.0.77";
  start_slave(1, stranger);
  Outcome outcome = slave_outcome(1);
  EXPECT_TRUE(contains(outcome.text, "rank table"));  // the master lacks the extra fact's rank
  ControlOptions master = options(0);
  coordinator_.reset();
  master.facts.emplace_back("rank table", table_.digest());
  make_master(master);
  start_slave(1, stranger);
  outcome = slave_outcome(1);
  EXPECT_EQ(outcome.code, Code::kNotFound);
  EXPECT_TRUE(contains(outcome.text,
                       "node 127.0.0.77 (server_list[1]) is no slave of the rank table of master "
                       "127.0.0.1"))
      << outcome.text;
}

TEST_F(Control, LateComerAfterTheStartIsRefused) {
  serve(3);
  slaves_[2].participant->leave("test");
  EXPECT_EQ(slave_outcome(2).text, "");
  start_slave(2);
  EXPECT_TRUE(
      contains(slave_outcome(2).text, "has already started without room for node 127.0.0.3"));
}

TEST_F(Control, NumericClassIsTheStrongestCommonOne) {
  make_nodes(2);
  make_master();
  ControlOptions weak = options(1);
  weak.offer.numeric_classes = {"fma32", "other"};
  start_slave(1, weak);
  EXPECT_EQ(start_master().text, "");
  EXPECT_EQ(fakes_[1]->generation.numeric_class, "fma32");
}

TEST_F(Control, NoCommonNumericClassEndsTheStart) {
  make_nodes(2);
  make_master();
  ControlOptions weak = options(1);
  weak.offer.numeric_classes = {"other"};
  start_slave(1, weak);
  const std::string expected = "127.0.0.1 has fma32, bf16dp, amx; 127.0.0.2 has other.";
  EXPECT_TRUE(contains(start_master().text, expected));
  EXPECT_TRUE(contains(slave_outcome(1).text, expected));
}

struct PhaseCase {
  const char* phase;
  int node;
};
class FailingPhase : public Control, public ::testing::WithParamInterface<PhaseCase> {};

TEST_P(FailingPhase, ReachesAllWithNodeAndPhase) {
  make_nodes(3);
  const auto [phase, failing] = GetParam();
  for (int i = 0; i < 3; ++i) {
    FakeNode& node = *fakes_[static_cast<size_t>(i)];
    (i == failing ? node.failing : node.stuck) = phase;
  }
  if (std::string(phase) == "serve") fakes_[0]->stuck.clear();  // the master serves first
  make_master();
  start_slave(1);
  start_slave(2);
  const std::string expected = "node 127.0.0." + std::to_string(failing + 1) +
                               " failed in phase " + phase + ": no memory for it";
  Outcome outcome;
  EXPECT_LT(seconds_of([&] { outcome = start_master(); }), 3.0);
  EXPECT_EQ(outcome.text.find(expected), 0u) << outcome.text;
  EXPECT_EQ(outcome.code, Code::kResourceExhausted);
  for (int i = 1; i < 3; ++i) {
    const Outcome slave = slave_outcome(i);
    EXPECT_EQ(slave.text.find(expected), 0u) << slave.text;
    EXPECT_EQ(slave.code, Code::kResourceExhausted);
  }
  for (auto& fake : fakes_) {
    ASSERT_EQ(fake->abort_reasons().size(), 1u);
    EXPECT_TRUE(contains(fake->abort_reasons()[0], "no memory for it"))
        << fake->abort_reasons()[0];
  }
}

INSTANTIATE_TEST_SUITE_P(Phases, FailingPhase,
                         ::testing::Values(PhaseCase{"prepare", 1}, PhaseCase{"connect", 2},
                                           PhaseCase{"load", 0}, PhaseCase{"load", 1},
                                           PhaseCase{"allocate", 2}, PhaseCase{"serve", 1}));

TEST_F(Control, PhaseHasADeadlineThatNamesTheNode) {
  make_nodes(3);
  fakes_[2]->stuck = "load";
  ControlOptions given = options(0);
  given.phase_seconds = 0.5;
  make_master(given);
  start_slave(1);
  start_slave(2);
  const Outcome outcome = start_master();
  EXPECT_EQ(outcome.code, Code::kDeadlineExceeded);
  EXPECT_TRUE(contains(outcome.text, "node 127.0.0.3 did not finish phase load within"));
  EXPECT_EQ(slave_outcome(1).text, outcome.text);
  EXPECT_EQ(slave_outcome(2).text, outcome.text);
}

TEST_F(Control, NoRoomForKvNamesTheNode) {
  make_nodes(2);
  fakes_[1]->kv_blocks = 0;
  make_master();
  start_slave(1);
  EXPECT_TRUE(contains(start_master().text, "127.0.0.2 has memory for 0 KV blocks"));
  EXPECT_TRUE(contains(slave_outcome(1).text, "127.0.0.2 has memory for 0 KV blocks"));
}

TEST_F(Control, SlowLoadIsNotDeath) {
  make_nodes(2);
  for (auto& fake : fakes_) {
    fake->slow = "load";
    fake->slowness = 2500ms;
  }
  ControlOptions given = options(0);
  given.lost_seconds = 0.8;
  make_master(given);
  ControlOptions slave = options(1);
  slave.lost_seconds = 0.8;
  start_slave(1, slave);
  EXPECT_EQ(start_master().text, "");
  EXPECT_TRUE(contains(log(), "] phase load for"));
  EXPECT_TRUE(contains(
      log(), "waiting for 127.0.0.1 (master), 127.0.0.2 [rank 1 busy] [rank 2 busy]"))
      << log();
}

// Three nodes, the third behind a relay; the loss callback's arguments go to a promise.
class Loss : public Control {
 protected:
  void serve_with_relay() {
    make_nodes(3);
    make_master();
    relay_port_ = next_port();
    relay_ = std::make_unique<Relay>(relay_port_, port_);
    start_slave(1);
    ControlOptions behind = options(2);
    behind.port = relay_port_;
    start_slave(2, behind);
    ASSERT_EQ(start_master().text, "");
    coordinator_->on_loss([this](const std::string& node, const Error& error) {
      ++losses_;
      coordinator_->fail(error, Deadline::in_seconds(5));
      promise_.set_value({error.code(), node + "|" + error.what()});
    });
  }
  Outcome loss() {
    auto future = promise_.get_future();
    if (future.wait_for(10s) != std::future_status::ready) return {Code::kUnknown, "no loss told"};
    return future.get();
  }
  void TearDown() override {
    Control::TearDown();
    relay_.reset();
    EXPECT_LE(losses_, 1);
  }
  uint16_t relay_port_ = 0;
  std::unique_ptr<Relay> relay_;
  std::promise<Outcome> promise_;
  std::atomic<int> losses_ = 0;
};

TEST_F(Loss, DeadNodeIsNamedAtOnce) {
  serve_with_relay();
  Outcome told;
  EXPECT_LT(seconds_of([&] {
              relay_->cut();
              told = loss();
            }),
            0.5);
  EXPECT_EQ(told.code, Code::kUnavailable);
  EXPECT_EQ(told.text, "127.0.0.3|node 127.0.0.3 is lost: its connection ended");
  const Outcome other = slave_outcome(1);
  EXPECT_EQ(other.code, Code::kUnavailable);
  EXPECT_EQ(other.text, "node 127.0.0.3 is lost: its connection ended");
  const Outcome dead = slave_outcome(2);
  EXPECT_EQ(dead.code, Code::kUnavailable);
  EXPECT_TRUE(contains(dead.text, "master 127.0.0.1 is lost")) << dead.text;
  for (auto& fake : fakes_) EXPECT_EQ(fake->abort_reasons().size(), 1u);
  EXPECT_EQ(coordinator_->nodes()[2].state, NodeState::kLost);
}

TEST_F(Loss, FrozenNodeIsLostAfterItsSilence) {
  serve_with_relay();
  Outcome told;
  const double seconds = seconds_of([&] {
    relay_->freeze();
    told = loss();
  });
  EXPECT_GT(seconds, 1.0);
  EXPECT_LT(seconds, 3.0);
  EXPECT_TRUE(contains(told.text, "127.0.0.3|node 127.0.0.3 is lost: no sign of life for 1."))
      << told.text;
  EXPECT_TRUE(contains(slave_outcome(1).text, "node 127.0.0.3 is lost"));
  EXPECT_TRUE(contains(slave_outcome(2).text, "master 127.0.0.1 is lost: no sign of life"));
}

TEST_F(Loss, DeathInAPhaseNamesNodeAndPhase) {
  make_nodes(3);
  for (auto& fake : fakes_) fake->stuck = "load";
  make_master();
  relay_port_ = next_port();
  relay_ = std::make_unique<Relay>(relay_port_, port_);
  start_slave(1);
  ControlOptions behind = options(2);
  behind.port = relay_port_;
  start_slave(2, behind);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(fakes_[2]->wait_for_call("load"));
  relay_->cut();
  const Outcome outcome = started.get();
  EXPECT_EQ(outcome.text.find("node 127.0.0.3 is lost in phase load: its connection ended"), 0u)
      << outcome.text;
  EXPECT_EQ(slave_outcome(1).text, outcome.text);
  EXPECT_TRUE(contains(slave_outcome(2).text, "master 127.0.0.1 is lost in phase load"));
}

TEST_F(Loss, CauseReplacesItsEcho) {
  serve_with_relay();
  slaves_[1].participant->report_local_fault(
      Error(Code::kUnavailable, "rank 1: link to rank 3 closed"));
  std::this_thread::sleep_for(50ms);
  relay_->cut();
  const Outcome told = loss();
  EXPECT_EQ(told.text,
            "127.0.0.3|node 127.0.0.3 is lost: its connection ended; also reported: node "
            "127.0.0.2: rank 1: link to rank 3 closed");
  EXPECT_EQ("127.0.0.3|" + slave_outcome(1).text, told.text);
}

TEST_F(Loss, DeadRankOfASlave) {
  serve_with_relay();
  slaves_[1].participant->report_local_fault(Error(Code::kInternal, "rank 1 was killed"));
  EXPECT_EQ(loss().text, "127.0.0.2|node 127.0.0.2: rank 1 was killed");
  for (const int i : {1, 2}) {
    const Outcome outcome = slave_outcome(i);
    EXPECT_EQ(outcome.text, "node 127.0.0.2: rank 1 was killed");
    EXPECT_EQ(outcome.code, Code::kInternal);
  }
  for (auto& fake : fakes_) EXPECT_EQ(fake->abort_reasons().size(), 1u);
}

TEST_F(Loss, DeadRankOfTheMaster) {
  serve_with_relay();
  coordinator_->report_local_fault(Error(Code::kInternal, "rank 0 was killed"));
  EXPECT_EQ(loss().text, "127.0.0.1|node 127.0.0.1: rank 0 was killed");
  EXPECT_EQ(slave_outcome(1).text, "node 127.0.0.1: rank 0 was killed");
}

TEST_F(Loss, LeavingWhileServingIsALossButOrderlyForTheLeaver) {
  serve_with_relay();
  slaves_[1].participant->leave("SIGTERM");
  EXPECT_EQ(slave_outcome(1).text, "");
  EXPECT_EQ(loss().text, "127.0.0.2|node 127.0.0.2 is lost: it left: SIGTERM");
  EXPECT_TRUE(contains(slave_outcome(2).text, "127.0.0.2 is lost: it left: SIGTERM"));
}

TEST_F(Control, MasterDeathIsNoticedAtOnce) {
  serve(3);
  Outcome outcome;
  EXPECT_LT(seconds_of([&] {
              coordinator_.reset();
              outcome = slave_outcome(1);
            }),
            0.5);
  EXPECT_EQ(outcome.code, Code::kUnavailable);
  EXPECT_TRUE(contains(outcome.text, "master 127.0.0.1 is lost")) << outcome.text;
  EXPECT_TRUE(contains(slave_outcome(2).text, "master 127.0.0.1 is lost"));
  EXPECT_EQ(fakes_[1]->abort_reasons().size(), 1u);
}

TEST_F(Control, MasterRestartedDuringTheJoinIsJoinedAgain) {
  make_nodes(3);
  make_master();
  start_slave(1);
  ASSERT_TRUE(wait_for_log("node 127.0.0.2 joined"));
  coordinator_.reset();
  make_master();
  start_slave(2);
  EXPECT_EQ(start_master().text, "");
}

TEST_F(Control, NodeLostDuringTheJoinMayComeBack) {
  make_nodes(3);
  make_master();
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  start_slave(1);
  ASSERT_TRUE(wait_for_log("node 127.0.0.2 joined"));
  slaves_[1].participant->leave("changed its mind");
  EXPECT_EQ(slave_outcome(1).text, "");
  EXPECT_TRUE(wait_for_log("127.0.0.2 (for 0 s, last: it left: changed its mind)"));
  start_slave(1);
  start_slave(2);
  EXPECT_EQ(started.get().text, "");
  EXPECT_TRUE(fakes_[1]->abort_reasons().empty());
}

TEST_F(Control, StopDuringTheJoin) {
  make_nodes(3);
  make_master();
  start_slave(1);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(wait_for_log("node 127.0.0.2 joined"));
  EXPECT_LT(seconds_of([&] { coordinator_->stop("SIGTERM", Deadline::in_seconds(5)); }), 1.0);
  const Outcome outcome = started.get();
  EXPECT_EQ(outcome.code, Code::kCancelled);
  EXPECT_EQ(outcome.text, "the start was stopped: SIGTERM");
  EXPECT_EQ(slave_outcome(1).text, "");
}

TEST_F(Control, StopDuringLoadWakesIt) {
  make_nodes(2);
  for (auto& fake : fakes_) fake->stuck = "load";
  make_master();
  start_slave(1);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(fakes_[0]->wait_for_call("load"));
  ASSERT_TRUE(fakes_[1]->wait_for_call("load"));
  EXPECT_LT(seconds_of([&] { coordinator_->stop("SIGTERM", Deadline::in_seconds(5)); }), 1.0);
  EXPECT_EQ(started.get().text, "the start was stopped in phase load: SIGTERM");
  EXPECT_EQ(slave_outcome(1).text, "");
}

TEST_F(Control, LeaveWhileTheMasterIsAway) {
  make_nodes(2);
  start_slave(1);
  ASSERT_TRUE(wait_for_log("waiting for master"));
  EXPECT_LT(seconds_of([&] {
              slaves_[1].participant->leave("SIGTERM");
              EXPECT_EQ(slave_outcome(1).text, "");
            }),
            0.5);
}

TEST_F(Control, JoinIsBoundedOnBothSides) {
  make_nodes(3);
  ControlOptions slave = options(1);
  slave.join_seconds = 0.5;
  start_slave(1, slave);
  Outcome outcome = slave_outcome(1);
  EXPECT_EQ(outcome.code, Code::kDeadlineExceeded);
  EXPECT_TRUE(contains(outcome.text, "last reason: Connection refused")) << outcome.text;
  ControlOptions master = options(0);
  master.join_seconds = 0.5;
  make_master(master);
  start_slave(1);
  outcome = start_master();
  EXPECT_EQ(outcome.code, Code::kDeadlineExceeded);
  EXPECT_TRUE(contains(outcome.text, "not all nodes joined within")) << outcome.text;
  EXPECT_TRUE(contains(outcome.text, "waiting for 127.0.0.3")) << outcome.text;
  EXPECT_EQ(slave_outcome(1).text, outcome.text);
}

TEST(JoinCheck, PrintableBoundsAndCleans) {
  EXPECT_EQ(printable(std::string("a\x1b[31m\0b", 8)), "a [31m b");
  EXPECT_EQ(printable("abcdef", 3), "abc");
  EXPECT_EQ(code_of(14), Code::kUnavailable);
  EXPECT_EQ(code_of(0), Code::kUnknown);
  EXPECT_EQ(code_of(-5), Code::kUnknown);
}

}  // namespace
}  // namespace phalanx::cluster
