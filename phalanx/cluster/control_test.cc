#include "phalanx/cluster/control.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <cstdlib>
#include <future>
#include <thread>

#include "phalanx/cluster/control_testing.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {
namespace {

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
    // A node that the failure reaches before the order to prepare has nothing to abort.
    if (fake->calls().empty()) continue;
    EXPECT_TRUE(fake->wait_for_abort());  // the master's start ends without waiting for its own
    const std::vector<std::string> reasons = fake->abort_reasons();
    ASSERT_EQ(reasons.size(), 1u) << fake->calls();
    EXPECT_TRUE(contains(reasons[0], "no memory for it")) << reasons[0];
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
  EXPECT_EQ(told.text, "127.0.0.3|node 127.0.0.3 is dead: its connection ended");
  const Outcome other = slave_outcome(1);
  EXPECT_EQ(other.code, Code::kUnavailable);
  EXPECT_EQ(other.text, "node 127.0.0.3 is dead: its connection ended");
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
  EXPECT_TRUE(contains(told.text, "127.0.0.3|node 127.0.0.3 is stuck: no sign of life for 1."))
      << told.text;
  EXPECT_TRUE(contains(slave_outcome(1).text, "node 127.0.0.3 is stuck"));
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
  EXPECT_EQ(outcome.text.find("node 127.0.0.3 is dead in phase load: its connection ended"), 0u)
      << outcome.text;
  EXPECT_EQ(slave_outcome(1).text, outcome.text);
  EXPECT_TRUE(contains(slave_outcome(2).text, "master 127.0.0.1 is lost in phase load"));
}

TEST_F(Loss, CauseReplacesItsEcho) {
  serve_with_relay();
  slaves_[1].participant->report_local_fault(
      1, Error(Code::kUnavailable, "rank 1: link to rank 3 closed"), false);
  std::this_thread::sleep_for(50ms);
  relay_->cut();
  const Outcome told = loss();
  EXPECT_EQ(told.text,
            "127.0.0.3|node 127.0.0.3 is dead: its connection ended; also reported: node "
            "127.0.0.2: rank 1: link to rank 3 closed");
  EXPECT_EQ("127.0.0.3|" + slave_outcome(1).text, told.text);
}

TEST_F(Loss, DeadRankOfASlave) {
  serve_with_relay();
  slaves_[1].participant->report_local_fault(
      1, Error(Code::kInternal, "rank 1 was killed"), true);
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
  coordinator_->report_local_fault(1, Error(Code::kInternal, "rank 0 was killed"), true);
  EXPECT_EQ(loss().text, "127.0.0.1|node 127.0.0.1: rank 0 was killed");
  EXPECT_EQ(slave_outcome(1).text, "node 127.0.0.1: rank 0 was killed");
}

TEST_F(Loss, LeavingWhileServingIsALossButOrderlyForTheLeaver) {
  serve_with_relay();
  slaves_[1].participant->leave("SIGTERM");
  EXPECT_EQ(slave_outcome(1).text, "");
  EXPECT_EQ(loss().text, "127.0.0.2|node 127.0.0.2 is away: it left: SIGTERM");
  EXPECT_TRUE(contains(slave_outcome(2).text, "127.0.0.2 is away: it left: SIGTERM"));
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
  EXPECT_TRUE(wait_for_log("127.0.0.2 (for 0 s, last: away: it left: changed its mind)"));
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
