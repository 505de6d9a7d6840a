// New generations: after the loss of a rank, of a node, of the master; and orders that come twice,
// late or from elsewhere.

#include <gtest/gtest.h>

#include <future>

#include "control.pb.h"
#include "phalanx/cluster/control_server.h"
#include "phalanx/cluster/control_testing.h"

namespace phalanx::cluster {
namespace {

constexpr const char* kPhases = "prepare connect load allocate serve ";

class Recovery : public Control {
 protected:
  ControlOptions recovering(int server) {
    ControlOptions given = options(server);
    given.recover = true;
    given.recovery_seconds = 20;
    return given;
  }
  void serve_recovering(int count) {
    make_nodes(count);
    make_master(recovering(0));
    watch_losses();
    for (int i = 1; i < count; ++i) start_slave(i, recovering(i));
    ASSERT_EQ(start_master().text, "");
  }
  void watch_losses() {
    coordinator_->on_loss([this](const std::string& node, const Error& error) {
      const std::lock_guard lock(mutex_);
      losses_.push_back(node + "|" + error.what());
      cv_.notify_all();
    });
  }
  // The n-th loss told, counted from 1.
  std::string loss(size_t n) {
    std::unique_lock lock(mutex_);
    if (!cv_.wait_for(lock, 10s, [&] { return losses_.size() >= n; })) return "none";
    return losses_[n - 1];
  }
  size_t losses() {
    const std::lock_guard lock(mutex_);
    return losses_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable cv_;
  std::vector<std::string> losses_;
};

TEST_F(Recovery, DeadRankGivesANewGenerationOfTheSameNodes) {
  serve_recovering(3);
  std::string calls = kPhases;
  for (uint64_t number = 1; number <= 5; ++number) {
    EXPECT_EQ(fakes_[0]->generation.number, number);
    const comm::Token token = fakes_[0]->generation.token;
    if (number % 2 == 1) {
      slaves_[1].participant->report_local_fault(number, Error(Code::kUnavailable, "rank 1 died"),
                                                 true);
      EXPECT_EQ(loss(number), "127.0.0.2|node 127.0.0.2: rank 1 died");
    } else {
      coordinator_->report_local_fault(number, Error(Code::kUnavailable, "rank 0 died"), true);
      EXPECT_EQ(loss(number), "127.0.0.1|node 127.0.0.1: rank 0 died");
    }
    ASSERT_EQ(start_master().text, "");
    calls += kPhases;
    for (auto& fake : fakes_) {
      EXPECT_EQ(fake->calls(), calls);
      EXPECT_EQ(fake->generation.number, number + 1);
      EXPECT_EQ(fake->generation.incarnation, fakes_[0]->generation.incarnation);
      EXPECT_EQ(fake->generation.token, fakes_[0]->generation.token);
      EXPECT_NE(fake->generation.token, token);
      EXPECT_EQ(fake->abort_reasons().size(), number);
    }
  }
  EXPECT_EQ(losses(), 5u);
}

TEST_F(Recovery, AFaultOfAnOldGenerationIsDropped) {
  serve_recovering(2);
  coordinator_->report_local_fault(1, Error(Code::kUnavailable, "rank 0 died"), true);
  ASSERT_NE(loss(1), "none");
  ASSERT_EQ(start_master().text, "");
  coordinator_->report_local_fault(1, Error(Code::kUnavailable, "late"), true);
  slaves_[1].participant->report_local_fault(1, Error(Code::kUnavailable, "late"), true);
  std::this_thread::sleep_for(400ms);
  EXPECT_EQ(losses(), 1u);
}

TEST_F(Recovery, LostNodeIsWaitedForAndTakenBack) {
  make_nodes(3);
  make_master(recovering(0));
  watch_losses();
  Relay relay(next_port(), port_);
  ControlOptions behind = recovering(2);
  behind.port = relay.port();
  behind.recovery_seconds = 0.2;
  start_slave(1, recovering(1));
  start_slave(2, behind);
  ASSERT_EQ(start_master().text, "");
  relay.cut();
  EXPECT_EQ(loss(1), "127.0.0.3|node 127.0.0.3 is dead: its connection ended");
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  EXPECT_TRUE(wait_for_log("last: dead: its connection ended"));
  EXPECT_EQ(coordinator_->nodes()[2].state, NodeState::kAbsent);
  EXPECT_EQ(coordinator_->nodes()[2].verdict, "dead");
  EXPECT_EQ(fakes_[1]->calls(), kPhases);  // joined still, and idle
  slaves_[2].participant->leave("killed");
  EXPECT_EQ(slave_outcome(2).text, "");
  start_slave(2, recovering(2));
  EXPECT_EQ(started.get().text, "");
  for (auto& fake : fakes_) EXPECT_EQ(fake->calls(), std::string(kPhases) + kPhases);
}

TEST_F(Recovery, ARankThatDiesInAPhaseIsTriedAgain) {
  make_nodes(3);
  fakes_[2]->failing = "load";
  fakes_[2]->failure = Error(Code::kUnavailable, "rank 4 was killed by signal 9");
  make_master(recovering(0));
  for (int i = 1; i < 3; ++i) start_slave(i, recovering(i));
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  EXPECT_TRUE(wait_for_log("generation 1 was lost before it served: node 127.0.0.3 failed in phase "
                           "load: rank 4 was killed by signal 9"));
  fakes_[2]->failing = "";
  EXPECT_EQ(started.get().text, "");
  EXPECT_GT(fakes_[0]->generation.number, 1u);
  for (auto& fake : fakes_) EXPECT_TRUE(fake->calls().ends_with(kPhases)) << fake->calls();
}

// The supervisor tells of a dead rank what the phase that broke on it told before.
TEST_F(Recovery, ARankThatDiesInAPhaseMayBeToldOfTwice) {
  make_nodes(2);
  fakes_[1]->failing = "load";
  fakes_[1]->failure = Error(Code::kUnavailable, "rank 1 was killed by signal 9");
  make_master(recovering(0));
  start_slave(1, recovering(1));
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  EXPECT_TRUE(wait_for_log("failed in phase load: rank 1 was killed by signal 9"));
  slaves_[1].participant->report_local_fault(1, Error(Code::kUnavailable, "rank 1 was killed"),
                                             true);
  EXPECT_TRUE(wait_for_log("generation 1 was lost before it served"));
  fakes_[1]->failing = "";
  EXPECT_EQ(started.get().text, "");
}

TEST_F(Recovery, WhatNoRetryCanCureEndsAtOnce) {
  make_nodes(2);
  fakes_[1]->failing = "load";  // no memory
  make_master(recovering(0));
  start_slave(1, recovering(1));
  const Outcome outcome = start_master();
  EXPECT_TRUE(contains(outcome.text, "node 127.0.0.2 failed in phase load: no memory for it"));
  EXPECT_EQ(outcome.code, Code::kResourceExhausted);
  EXPECT_EQ(fakes_[0]->generation.number, 1u);
}

TEST_F(Recovery, ALostNodeThatStaysAwayEndsAllByName) {
  make_nodes(3);
  ControlOptions given = recovering(0);
  given.recovery_seconds = 0.6;
  make_master(given);
  watch_losses();
  for (int i = 1; i < 3; ++i) start_slave(i, recovering(i));
  ASSERT_EQ(start_master().text, "");
  slaves_[2].participant->leave("for ever");
  ASSERT_NE(loss(1), "none");
  const Outcome outcome = start_master();
  EXPECT_EQ(outcome.code, Code::kDeadlineExceeded);
  EXPECT_TRUE(contains(outcome.text, "not all nodes returned within")) << outcome.text;
  EXPECT_TRUE(contains(outcome.text, "waiting for 127.0.0.3")) << outcome.text;
  EXPECT_EQ(slave_outcome(1).text, outcome.text);
}

TEST_F(Recovery, MasterThatReturnsFindsItsNodes) {
  serve_recovering(3);
  const uint64_t first = fakes_[1]->generation.incarnation;
  coordinator_.reset();
  EXPECT_TRUE(wait_for_log("this node keeps its weights and waits up to 20 s"));
  make_master(recovering(0));
  ASSERT_EQ(start_master().text, "");
  for (const int i : {1, 2}) {
    FakeNode& node = *fakes_[static_cast<size_t>(i)];
    EXPECT_EQ(node.calls(), std::string(kPhases) + kPhases);
    EXPECT_EQ(node.abort_reasons().size(), 1u);
    EXPECT_NE(node.generation.incarnation, first);
    EXPECT_EQ(node.generation.number, 1u);
  }
}

TEST_F(Recovery, MasterThatStaysAwayEndsItsNodes) {
  make_nodes(2);
  ControlOptions given = recovering(0);
  given.recovery_seconds = 0.5;
  make_master(given);
  start_slave(1, recovering(1));
  ASSERT_EQ(start_master().text, "");
  coordinator_.reset();
  const Outcome outcome = slave_outcome(1);
  EXPECT_EQ(outcome.code, Code::kUnavailable);
  EXPECT_TRUE(contains(outcome.text, "is lost and did not return within 0 s") ||
              contains(outcome.text, "is lost and did not return within 1 s")) << outcome.text;
}

TEST_F(Recovery, StopWhileItWaitsForALostNode) {
  serve_recovering(3);
  slaves_[2].participant->leave("away");
  ASSERT_NE(loss(1), "none");
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(wait_for_log("last: away: it left: away"));
  coordinator_->stop("SIGTERM", Deadline::in_seconds(5));
  EXPECT_EQ(started.get().code, Code::kCancelled);
  EXPECT_EQ(slave_outcome(1).text, "");
}

// Before it noticed (the order still reaches it), and after (it joins again).
class OutOfReach : public Recovery, public testing::WithParamInterface<bool> {};

TEST_P(OutOfReach, IsToldOfTheStopWhenItReturns) {
  make_nodes(3);
  ControlOptions patient = recovering(0);
  patient.lost_seconds = 4;
  make_master(patient);
  watch_losses();
  Relay relay(next_port(), port_);
  ControlOptions behind = recovering(2);
  behind.port = relay.port();
  start_slave(1, recovering(1));
  start_slave(2, behind);
  ASSERT_EQ(start_master().text, "");
  relay.freeze();
  std::this_thread::sleep_for(std::chrono::duration<double>(2 * behind.heartbeat_seconds));
  auto stopped = std::async(std::launch::async, [&] {
    coordinator_->stop("SIGTERM", Deadline::in_seconds(0.1));
  });
  EXPECT_TRUE(wait_for_log("to tell it of the stop"));
  EXPECT_EQ(slave_outcome(1).text, "");
  if (GetParam()) {
    EXPECT_TRUE(wait_for_log("this node keeps its weights"));
  }
  relay.thaw();
  EXPECT_EQ(slave_outcome(2).text, "");
  stopped.get();
}

INSTANTIATE_TEST_SUITE_P(NoticedTheLoss, OutOfReach, testing::Bool());

TEST_F(Recovery, ANodeThatStaysOutOfReachDoesNotHoldTheStop) {
  make_nodes(2);
  make_master(recovering(0));
  watch_losses();
  Relay relay(next_port(), port_);
  ControlOptions behind = recovering(1);
  behind.port = relay.port();
  behind.recovery_seconds = 0.2;
  start_slave(1, behind);
  ASSERT_EQ(start_master().text, "");
  relay.freeze();
  std::this_thread::sleep_for(std::chrono::duration<double>(2 * behind.heartbeat_seconds));
  const auto begin = Clock::now();
  coordinator_->stop("SIGTERM", Deadline::in_seconds(0.1));
  EXPECT_LT(Clock::now() - begin, std::chrono::duration<double>(2 * behind.lost_seconds + 2));
  EXPECT_TRUE(wait_for_log("was not told of the stop"));
  relay.cut();
  slaves_[1].participant->leave("the test ends");
}

TEST_F(Recovery, AReturningNodeMustComputeAlike) {
  serve_recovering(2);  // in amx
  slaves_[1].participant->leave("replaced");
  EXPECT_EQ(slave_outcome(1).text, "");
  ASSERT_NE(loss(1), "none");
  ControlOptions weak = recovering(1);
  weak.offer.numeric_classes = {"fma32"};
  start_slave(1, weak);
  EXPECT_TRUE(contains(slave_outcome(1).text,
                       "node 127.0.0.2 does not offer the numeric class amx"));
  ControlOptions other = recovering(1);
  other.facts = {{"wire_version", "1"}, {"model", "other weights"}};
  start_slave(1, other);
  const Outcome outcome = slave_outcome(1);
  EXPECT_TRUE(contains(outcome.text, "model")) << outcome.text;
  EXPECT_TRUE(contains(outcome.text, "other weights")) << outcome.text;
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  EXPECT_TRUE(wait_for_log("waiting for 127.0.0.2 (for"));
  start_slave(1, recovering(1));
  EXPECT_EQ(started.get().text, "");
}

TEST_F(Recovery, ClocksFarApartAreAMismatch) {
  make_nodes(2);
  ControlOptions ahead = recovering(0);
  ahead.unix_ms = [] { return int64_t{1'700'003'600'000}; };
  make_master(ahead);
  ControlOptions behind = recovering(1);
  behind.unix_ms = [] { return int64_t{1'700'000'000'000}; };
  start_slave(1, behind);
  const Outcome outcome = slave_outcome(1);
  EXPECT_TRUE(contains(outcome.text, "clock  2023-11-14 23:13:20 UTC  2023-11-14 22:13:20 UTC, 3600 "
                                     "s apart")) << outcome.text;
  EXPECT_TRUE(wait_for_log("3600 s apart"));  // on the master's side too
}

// A master that says what the test wants.
class FakeMaster final : public ControlServer::Handler {
 public:
  explicit FakeMaster(uint16_t port) : server_({.address = "127.0.0.1", .port = port, .max_streams = 4}, *this) {}
  void on_open(StreamId, const std::string&) override {}
  void on_message(StreamId stream, const control::v1::FromNode& message) override {
    const std::lock_guard lock(mutex_);
    stream_ = stream;
    if (!message.has_heartbeat()) received_.push_back(message);
    cv_.notify_all();
  }
  void on_end(StreamId) override {}
  void send(control::v1::FromMaster message, uint64_t incarnation, uint64_t generation) {
    message.set_incarnation(incarnation);
    message.set_generation(generation);
    const std::lock_guard lock(mutex_);
    server_.send(stream_, message);
  }
  // The n-th message that is no heartbeat, counted from 1.
  control::v1::FromNode message(size_t n) {
    std::unique_lock lock(mutex_);
    cv_.wait_for(lock, 10s, [&] { return received_.size() >= n; });
    return received_.size() >= n ? received_[n - 1] : control::v1::FromNode{};
  }

 private:
  std::mutex mutex_;
  std::condition_variable cv_;
  StreamId stream_ = 0;
  std::vector<control::v1::FromNode> received_;
  ControlServer server_;
};

TEST_F(Recovery, OrdersThatComeTwiceLateOrFromElsewhereAreRefused) {
  make_nodes(2);
  FakeMaster master(port_);
  start_slave(1, recovering(1));
  ASSERT_TRUE(master.message(1).has_join());
  control::v1::FromMaster welcome, prepare, connect, abort;
  welcome.mutable_welcome()->set_recover(true);
  welcome.mutable_welcome()->set_recovery_seconds(0.3);
  prepare.mutable_prepare()->set_token(std::string(32, 'x'));
  for (const int server : {0, 1, 1}) {
    auto* seat = prepare.mutable_prepare()->add_seats();
    seat->set_server(server);
    seat->set_weight(1);
  }
  connect.mutable_connect();
  abort.mutable_abort()->set_reason("because");
  master.send(welcome, 7, 0);
  master.send(connect, 7, 1);   // before anything was prepared
  master.send(prepare, 7, 3);
  ASSERT_TRUE(master.message(2).has_prepared());
  EXPECT_EQ(master.message(2).generation(), 3u);
  EXPECT_EQ(master.message(2).incarnation(), 7u);
  master.send(prepare, 7, 3);   // replayed
  master.send(prepare, 7, 2);   // reordered
  master.send(prepare, 8, 9);   // another master on the same connection
  master.send(connect, 7, 2);   // of a generation that is over
  master.send(abort, 7, 2);
  master.send(connect, 7, 3);
  EXPECT_TRUE(master.message(3).has_connected());
  EXPECT_EQ(fakes_[1]->calls(), "prepare connect ");
  EXPECT_TRUE(fakes_[1]->abort_reasons().empty());
  for (const char* part : {"an order for generation 1", "generation 3 (incarnation 0000000000000007) was to be prepared again",
                           "generation 2 (incarnation 0000000000000007) was to be prepared again",
                           "generation 9 (incarnation 0000000000000008) came on a connection",
                           "an order for generation 2"})
    EXPECT_TRUE(contains(log(), part)) << part;
  // An abort that comes before its own Prepare is done still counts.
  master.send(abort, 7, 4);
  master.send(prepare, 7, 4);
  master.send(prepare, 7, 5);
  EXPECT_TRUE(master.message(4).has_prepared());
  EXPECT_EQ(master.message(4).generation(), 5u);
  EXPECT_EQ(fakes_[1]->calls(), "prepare connect prepare ");
  // Ranks that its rank table does not allow.
  prepare.mutable_prepare()->mutable_seats(1)->set_weight(2);
  master.send(prepare, 7, 6);
  ASSERT_TRUE(master.message(5).has_phase_failed());
  EXPECT_TRUE(contains(master.message(5).phase_failed().message(),
                       "cannot be followed: the weight 2 of rank 1 is 1 in this node's rank table"));
  EXPECT_EQ(fakes_[1]->calls(), "prepare connect prepare ");
}

}  // namespace
}  // namespace phalanx::cluster
