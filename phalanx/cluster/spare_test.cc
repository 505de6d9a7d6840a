// Who has which ranks from one generation to the next: measured weights, spares, fewer ranks.

#include <gtest/gtest.h>

#include <future>

#include "phalanx/cluster/control_testing.h"

namespace phalanx::cluster {
namespace {

constexpr const char* kPhases = "prepare connect load allocate serve ";

class Spare : public Control {
 protected:
  // The last of the nodes is a spare.
  void make_nodes_and_spare(int count) {
    make_nodes(count);
    Server& last = table_.servers.back();
    table_.world_size -= static_cast<int>(last.devices.size());
    last.devices.clear();
    last.spare = true;
  }
  ControlOptions recovering(int server) {
    ControlOptions given = options(server);
    given.recover = true;
    given.recovery_seconds = 20;
    given.spare_seconds = 0.3;
    return given;
  }
  void watch_losses() {
    coordinator_->on_loss([this](const std::string&, const Error&) { ++losses_; });
  }
  void wait_for_loss(int count) {
    for (int i = 0; i < 500 && losses_ < count; ++i) std::this_thread::sleep_for(20ms);
    ASSERT_EQ(losses_, count);
  }
  std::vector<int> servers() {
    std::vector<int> result;
    for (const Seat& seat : coordinator_->seats()) result.push_back(seat.server);
    return result;
  }
  std::atomic<int> losses_ = 0;
};

TEST_F(Spare, StandsByAndTakesOverALostNodesRanks) {
  make_nodes_and_spare(3);
  make_master(recovering(0));
  watch_losses();
  auto relay = std::make_unique<Relay>(next_port(), port_);
  ControlOptions behind = recovering(1);
  behind.port = relay->port();
  start_slave(1, behind);
  start_slave(2, recovering(2));
  ASSERT_TRUE(wait_for_log("node 127.0.0.3 joined as a spare"));
  ASSERT_EQ(start_master().text, "");
  ASSERT_TRUE(fakes_[2]->wait_for_call("stand_by"));
  EXPECT_EQ(fakes_[2]->calls(), "stand_by ");
  EXPECT_EQ(coordinator_->nodes()[2].state, NodeState::kSpare);
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1}));
  EXPECT_EQ(fakes_[0]->members.at(2).host, "127.0.0.2");

  relay.reset();
  wait_for_loss(1);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(fakes_[2]->calls(), std::string("stand_by ") + kPhases);
  EXPECT_EQ(servers(), (std::vector<int>{0, 2, 2}));
  EXPECT_EQ(fakes_[0]->members.at(2).host, "127.0.0.3");
  EXPECT_EQ(fakes_[2]->members.at(1).node, 2);
  EXPECT_EQ(fakes_[0]->allocated, 98);
  EXPECT_TRUE(wait_for_log("spare node 127.0.0.3 takes over ranks 1, 2 of 127.0.0.2"));

  // The lost node returns as a spare, and the other way round.
  slaves_[1].participant->leave("the test starts it anew");
  (void)slave_outcome(1);
  start_slave(1, recovering(1));
  ASSERT_TRUE(wait_for_log("node 127.0.0.2 joined as a spare"));
  ASSERT_TRUE(fakes_[1]->wait_for_call("stand_by"));
  slaves_[2].participant->leave("maintenance");
  wait_for_loss(2);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1}));
}

TEST_F(Spare, IsNeitherWaitedForNorMissed) {
  make_nodes_and_spare(3);
  make_master(recovering(0));
  watch_losses();
  start_slave(1, recovering(1));
  ASSERT_EQ(start_master().text, "");
  start_slave(2, recovering(2));
  ASSERT_TRUE(fakes_[2]->wait_for_call("stand_by"));
  slaves_[2].participant->leave("no longer needed");
  ASSERT_TRUE(wait_for_log("it was a spare, nothing stops"));
  EXPECT_EQ(coordinator_->nodes()[2].state, NodeState::kAbsent);
  EXPECT_EQ(losses_, 0);
  EXPECT_EQ(fakes_[0]->generation.number, 1u);
}

TEST_F(Spare, ANodeThatReturnsInTimeKeepsItsRanks) {
  make_nodes_and_spare(3);
  ControlOptions patient = recovering(0);
  patient.spare_seconds = 10;
  make_master(patient);
  watch_losses();
  start_slave(1, recovering(1));
  start_slave(2, recovering(2));
  ASSERT_EQ(start_master().text, "");
  slaves_[1].participant->leave("a new kernel");
  (void)slave_outcome(1);
  wait_for_loss(1);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  start_slave(1, recovering(1));
  EXPECT_EQ(started.get().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1}));
}

TEST_F(Spare, OneThatFailsIsLeftAloneAndTheLostNodeTakenBack) {
  make_nodes_and_spare(3);
  make_master(recovering(0));
  watch_losses();
  start_slave(1, recovering(1));
  start_slave(2, recovering(2));
  ASSERT_EQ(start_master().text, "");
  fakes_[2]->failing = "load";
  slaves_[1].participant->leave("broken");
  (void)slave_outcome(1);
  wait_for_loss(1);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(wait_for_log("spare node 127.0.0.3 is left alone until it joins again"));
  start_slave(1, recovering(1));
  EXPECT_EQ(started.get().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1}));
  const NodeView spare = coordinator_->nodes()[2];
  EXPECT_TRUE(contains(spare.last_reason, "no memory for it")) << spare.last_reason;
  EXPECT_TRUE(spare.spare);
}

TEST_F(Spare, OneThatIsLostWhileItTakesOverIsNotWaitedFor) {
  make_nodes_and_spare(3);
  make_master(recovering(0));
  watch_losses();
  auto relay = std::make_unique<Relay>(next_port(), port_);
  ControlOptions behind = recovering(2);
  behind.port = relay->port();
  start_slave(1, recovering(1));
  start_slave(2, behind);
  ASSERT_TRUE(wait_for_log("node 127.0.0.3 joined as a spare"));
  ASSERT_EQ(start_master().text, "");
  fakes_[2]->stuck = "load";
  slaves_[1].participant->leave("broken");
  (void)slave_outcome(1);
  wait_for_loss(1);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(fakes_[2]->wait_for_call("load"));
  relay.reset();
  ASSERT_TRUE(wait_for_log("spare node 127.0.0.3 left while it took over"));
  start_slave(1, recovering(1));
  EXPECT_EQ(started.get().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1}));
}

TEST_F(Spare, OneWhoseRanksDieAgainAndAgainIsLeftAlone) {
  make_nodes_and_spare(3);
  make_master(recovering(0));
  watch_losses();
  start_slave(1, recovering(1));
  start_slave(2, recovering(2));
  ASSERT_TRUE(wait_for_log("node 127.0.0.3 joined as a spare"));
  ASSERT_EQ(start_master().text, "");
  fakes_[2]->failing = "load";
  fakes_[2]->failure = Error(Code::kUnavailable, "rank 1 was killed by signal 9");
  slaves_[1].participant->leave("broken");
  (void)slave_outcome(1);
  wait_for_loss(1);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(wait_for_log("spare node 127.0.0.3 is left alone until it joins again"));
  EXPECT_TRUE(coordinator_->nodes()[2].spare);
  EXPECT_GE(fakes_[0]->generation.number, 4u);  // it was tried more than once
  start_slave(1, recovering(1));
  EXPECT_EQ(started.get().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1}));
}

TEST_F(Spare, WithoutRoomItIsNotAsked) {
  make_nodes_and_spare(3);
  ControlOptions master = recovering(0);
  master.recovery_seconds = 1;
  master.misfit = [](const Seating& seats, const std::vector<NodeOffer>&) {
    return is_seated(seats, 2) ? std::optional(Misfit{.server = 2, .reason = "too little memory"})
                               : std::nullopt;
  };
  make_master(master);
  watch_losses();
  start_slave(1, recovering(1));
  start_slave(2, recovering(2));
  ASSERT_EQ(start_master().text, "");
  slaves_[1].participant->leave("for good");
  wait_for_loss(1);
  const Outcome outcome = start_master();
  EXPECT_EQ(outcome.code, Code::kDeadlineExceeded) << outcome.text;
  EXPECT_TRUE(wait_for_log("cannot take over the ranks of 127.0.0.2: too little memory"));
  EXPECT_EQ(slave_outcome(2).text, outcome.text);  // the end reaches spares too
}

TEST_F(Spare, OfAnotherNumericClassIsRefused) {
  make_nodes_and_spare(3);
  make_master(recovering(0));
  watch_losses();
  ControlOptions weak = recovering(2);
  weak.offer.numeric_classes = {"fma32"};
  start_slave(2, weak);
  ASSERT_TRUE(wait_for_log("node 127.0.0.3 joined as a spare"));
  start_slave(1, recovering(1));
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(fakes_[0]->generation.numeric_class, "amx");
  const Outcome refused = slave_outcome(2);
  EXPECT_TRUE(contains(refused.text, "does not offer the numeric class amx")) << refused.text;
  start_slave(2, weak);
  EXPECT_TRUE(contains(slave_outcome(2).text, "does not offer the numeric class amx"));
  EXPECT_EQ(losses_, 0);
}

TEST_F(Spare, FewerRanksGoOnWhenNobodyComes) {
  make_nodes(3);
  ControlOptions master = recovering(0);
  master.recovery_seconds = 2;
  master.spare_seconds = 1;
  master.shrink = true;
  make_master(master);
  watch_losses();
  start_slave(1, recovering(1));
  start_slave(2, recovering(2));
  ASSERT_EQ(start_master().text, "");
  slaves_[1].participant->leave("for good");
  (void)slave_outcome(1);
  wait_for_loss(1);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 2, 2, 2}));
  EXPECT_EQ(fakes_[0]->generation.seats.size(), 4u);
  EXPECT_EQ(fakes_[2]->members.size(), 4u);
  EXPECT_TRUE(wait_for_log("127.0.0.2 did not return: 4 of 6 ranks go on"));
  // It returns: a spare, which the next loss calls.
  start_slave(1, recovering(1));
  ASSERT_TRUE(fakes_[1]->wait_for_call("stand_by"));
  slaves_[2].participant->leave("for good");
  wait_for_loss(2);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1, 1}));
}

class Returning : public Spare {
 protected:
  // Three nodes, of which the second is lost: four of six ranks go on.
  void shrink() {
    make_nodes(3);
    ControlOptions master = recovering(0);
    master.recovery_seconds = 0.5;
    master.shrink = true;
    make_master(master);
    watch_losses();
    start_slave(1, recovering(1));
    start_slave(2, recovering(2));
    ASSERT_EQ(start_master().text, "");
    slaves_[1].participant->leave("for a while");
    (void)slave_outcome(1);
    wait_for_loss(1);
    ASSERT_EQ(start_master().text, "");
    ASSERT_EQ(servers(), (std::vector<int>{0, 2, 2, 2}));
  }
};

TEST_F(Returning, AfterAShrinkANodeHasItsRanksAgain) {
  shrink();
  start_slave(1, recovering(1));
  ASSERT_TRUE(fakes_[1]->wait_for_call("stand_by"));
  EXPECT_TRUE(
      wait_for_log("went on as 4 of 6 ranks; it has ranks 1, 2 again once it has been here"));
  wait_for_loss(2);
  EXPECT_TRUE(contains(log(), "6 ranks instead of 4 go on"));
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1, 2, 2, 2}));
  EXPECT_EQ(fakes_[1]->members.size(), 6u);
  EXPECT_EQ(coordinator_->nodes()[1].state, NodeState::kServing);
  // It counts as any other from now on.
  slaves_[1].participant->leave("for good");
  wait_for_loss(3);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 2, 2, 2}));
}

TEST_F(Returning, OneThatFailsThenLeavesTheOthersAsTheyWere) {
  shrink();
  fakes_[1]->failing = "load";
  start_slave(1, recovering(1));
  wait_for_loss(2);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 2, 2, 2}));
  EXPECT_TRUE(contains(coordinator_->nodes()[1].last_reason, "no memory for it"));
  EXPECT_TRUE(wait_for_log("4 of 6 ranks go on as before"));
  std::this_thread::sleep_for(1s);
  EXPECT_EQ(losses_, 2);  // not tried again by itself
  // It joins again, mended.
  fakes_[1]->failing.clear();
  slaves_[1].participant->leave("mended");
  (void)slave_outcome(1);
  start_slave(1, recovering(1));
  wait_for_loss(3);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 1, 1, 2, 2, 2}));
}

TEST_F(Returning, OneThatIsLostAgainMeanwhileIsNotWaitedFor) {
  shrink();
  fakes_[1]->stuck = "load";
  start_slave(1, recovering(1));
  wait_for_loss(2);
  auto started = std::async(std::launch::async, [&] { return start_master(); });
  ASSERT_TRUE(fakes_[1]->wait_for_call("load"));
  slaves_[1].participant->leave("again");
  EXPECT_EQ(started.get().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 2, 2, 2}));
}

TEST_F(Spare, MixedClassesAreNamedAndNobodyIsRefused) {
  make_nodes_and_spare(3);
  ControlOptions master = recovering(0);
  master.mixed_classes = true;
  make_master(master);
  watch_losses();
  ControlOptions weak = recovering(1);
  weak.offer.numeric_classes = {"fma32"};
  start_slave(1, weak);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(fakes_[0]->generation.numeric_class, kMixedClasses);
  EXPECT_EQ(fakes_[1]->generation.numeric_class, kMixedClasses);
  EXPECT_TRUE(wait_for_log(
      "numeric classes are mixed, as --isa mixed allows: 127.0.0.1 amx, 127.0.0.2 fma32."));
  ControlOptions middle = recovering(2);
  middle.offer.numeric_classes = {"fma32", "bf16dp"};
  start_slave(2, middle);
  ASSERT_TRUE(fakes_[2]->wait_for_call("stand_by"));
  slaves_[1].participant->leave("broken");
  wait_for_loss(1);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(servers(), (std::vector<int>{0, 2, 2}));
  EXPECT_TRUE(wait_for_log("127.0.0.1 amx, 127.0.0.3 bf16dp."));
}

TEST_F(Spare, ClassesThatDifferAreNamedAtTheStart) {
  make_nodes(2);
  make_master(recovering(0));
  ControlOptions weak = recovering(1);
  weak.offer.numeric_classes = {"fma32"};
  start_slave(1, weak);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(fakes_[1]->generation.numeric_class, "fma32");
  EXPECT_TRUE(
      wait_for_log("nodes differ in their best numeric class: 127.0.0.1 amx, 127.0.0.2 "
                   "fma32. All compute in fma32; --isa mixed"));
}

TEST_F(Spare, TooLittleMemoryForFewerRanksEndsIt) {
  make_nodes(2);
  ControlOptions master = recovering(0);
  master.recovery_seconds = 0.5;
  master.shrink = true;
  master.misfit = [](const Seating& seats, const std::vector<NodeOffer>&) {
    return seats.size() < 3 ? std::optional(Misfit{.server = 0, .reason = "too little memory"})
                            : std::nullopt;
  };
  make_master(master);
  watch_losses();
  start_slave(1, recovering(1));
  ASSERT_EQ(start_master().text, "");
  slaves_[1].participant->leave("for good");
  wait_for_loss(1);
  EXPECT_EQ(start_master().code, Code::kDeadlineExceeded);
  EXPECT_TRUE(wait_for_log("1 ranks cannot go on: too little memory"));
}

TEST_F(Spare, MeasuredWeightsReachEveryNodeAndStay) {
  make_nodes(2);
  for (Server& server : table_.servers)
    for (Device& device : server.devices) device.auto_weight = true;
  ControlOptions master = recovering(0);
  master.offer.bytes_per_second = 20e9;
  make_master(master);
  watch_losses();
  ControlOptions slave = recovering(1);
  slave.offer.bytes_per_second = 20e9;
  start_slave(1, slave);
  ASSERT_EQ(start_master().text, "");
  const Seating expected{{0, 2}, {1, 1}, {1, 1}};
  EXPECT_EQ(coordinator_->seats(), expected);
  EXPECT_EQ(fakes_[0]->generation.seats, expected);
  EXPECT_EQ(fakes_[1]->generation.seats, expected);
  EXPECT_TRUE(wait_for_log("weights decided from measured memory bandwidth (127.0.0.1 20.0 GB/s"));
  coordinator_->report_local_fault(1, Error(Code::kUnavailable, "rank 0 died"), true);
  wait_for_loss(1);
  ASSERT_EQ(start_master().text, "");
  EXPECT_EQ(fakes_[1]->generation.seats, expected);
}

TEST_F(Spare, ANodeWithoutAMeasurementEndsTheStart) {
  make_nodes(2);
  table_.servers[1].devices[0].auto_weight = true;
  make_master(recovering(0));
  start_slave(1, recovering(1));
  const Outcome outcome = start_master();
  EXPECT_EQ(outcome.code, Code::kFailedPrecondition);
  EXPECT_TRUE(contains(outcome.text, "measured no memory bandwidth")) << outcome.text;
  EXPECT_EQ(slave_outcome(1).text, outcome.text);
}

}  // namespace
}  // namespace phalanx::cluster
