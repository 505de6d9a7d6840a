#include "phalanx/cluster/seating.h"

#include <gtest/gtest.h>

#include <cmath>

namespace phalanx::cluster {
namespace {

// One server per entry, with so many ranks; "auto" for all ranks where no weight is given.
RankTable table_of(const std::vector<int>& ranks, const std::vector<double>& weights = {}) {
  RankTable table;
  for (size_t s = 0; s < ranks.size(); ++s) {
    Server server{.server_id = "10.0.0." + std::to_string(s + 1)};
    server.spare = ranks[s] == 0;
    for (int d = 0; d < ranks[s]; ++d) {
      Device device{.device_id = d, .rank_id = table.world_size};
      const double weight =
          weights.empty() ? 0 : weights[static_cast<size_t>(table.world_size)];
      device.auto_weight = weight == 0;
      if (weight > 0) device.weight = weight;
      ++table.world_size;
      server.devices.push_back(device);
    }
    table.servers.push_back(server);
  }
  return table;
}

std::vector<double> decided(const RankTable& table, const std::vector<double>& speeds,
                            const Fit& fit = {}) {
  return weights_of(decide_weights(table, speeds, fit));
}

using Weights = std::vector<double>;

TEST(Seating, MeasuredBandwidthIsSharedInProportion) {
  EXPECT_EQ(decided(table_of({1, 1}), {24e9, 8e9}), (Weights{16, 5}));
  EXPECT_EQ(decided(table_of({1, 1}), {20e9, 10e9}), (Weights{2, 1}));
  EXPECT_EQ(decided(table_of({2, 1}), {20e9, 20e9}), (Weights{1, 1, 2}));
  EXPECT_EQ(decided(table_of({1, 0, 1}), {20e9, 0, 10e9}), (Weights{2, 1}));
}

TEST(Seating, CloseBandwidthsAreEqual) {
  EXPECT_EQ(decided(table_of({1, 1, 1}), {20e9, 18.5e9, 19e9}), (Weights{1, 1, 1}));
  EXPECT_EQ(decided(table_of({1, 1, 1}), {20e9, 10e9, 19e9}), (Weights{2, 1, 2}));
  EXPECT_EQ(decided(table_of({1, 1}), {20e9, 17.5e9}), (Weights{8, 7}));
}

TEST(Seating, TheSlowestGetsSomething) {
  EXPECT_EQ(decided(table_of({1, 1}), {400e9, 1e9}), (Weights{16, 1}));
}

TEST(Seating, WeightsGivenByHandStay) {
  // A unit of weight is what rank 0 measured, so rank 1 gets 3 of them; scaled to 16.
  EXPECT_EQ(decided(table_of({1, 1}, {1, 0}), {10e9, 30e9}), (Weights{16.0 / 3, 16}));
  const Weights three = decided(table_of({1, 1, 1}, {1, 3, 0}), {10e9, 30e9, 20e9});
  EXPECT_NEAR(three[1] / three[0], 3, 1e-9);
  EXPECT_EQ(three[2], 11);  // 2 of 3 units: 10.67
}

TEST(Seating, MemoryMustSuffice) {
  const Fit little = [](const Seating& seats) -> std::optional<Misfit> {
    double sum = 0;
    for (const Seat& seat : seats) sum += seat.weight;
    if (seats[0].weight / sum > 0.5) return Misfit{.server = 0, .reason = "no room at 10.0.0.1"};
    return std::nullopt;
  };
  EXPECT_EQ(decided(table_of({1, 1}), {20e9, 10e9}, little), (Weights{1, 1}));
  const Fit none = [](const Seating&) { return Misfit{.server = 1, .reason = "no room at all"}; };
  try {
    (void)decided(table_of({1, 1}), {20e9, 10e9}, none);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kResourceExhausted);
    EXPECT_STREQ(e.what(), "no room at all");
  }
}

TEST(Seating, ANodeWithoutAMeasurementIsNamed) {
  for (const double bad : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
    try {
      (void)decided(table_of({1, 1}), {20e9, bad});
      FAIL();
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("10.0.0.2"), std::string::npos) << e.what();
    }
  }
}

TEST(Seating, RanksAndDigest) {
  const RankTable table = table_of({2, 1, 0}, {1, 2, 3});
  Seating seats = table_seating(table);
  EXPECT_EQ(ranks_of(seats, 0), (std::vector<int>{0, 1}));
  EXPECT_TRUE(ranks_of(seats, 2).empty());
  EXPECT_EQ(servers_of(seats), 2);
  EXPECT_EQ(text_of(seats, table),
            "10.0.0.1: ranks 0, 1 (weights 1, 2); 10.0.0.2: rank 2 (weight 3)");
  const std::string before = digest(seats);
  seats[2].server = 2;
  EXPECT_NE(digest(seats), before);
  seats[2] = {.server = 1, .weight = 3.0000001};
  EXPECT_NE(digest(seats), before);
}

TEST(Seating, AnOrderThatDoesNotFitTheTableIsNotFollowed) {
  const RankTable by_hand = table_of({1, 1, 0}, {1, 3});
  const RankTable measured = table_of({1, 1, 0});
  const auto problem = [](const Seating& seats, const RankTable& table) {
    return seating_problem(seats, table);
  };
  EXPECT_EQ(problem({{0, 1}, {1, 3}}, by_hand), "");
  EXPECT_EQ(problem({{0, 1}, {2, 3}}, by_hand), "");  // a spare stands in
  EXPECT_EQ(problem({{0, 1}}, by_hand), "");          // fewer ranks
  EXPECT_EQ(problem({{0, 16}, {1, 5}}, measured), "");
  EXPECT_NE(problem({}, by_hand), "");
  EXPECT_NE(problem({{0, 1}, {1, 3}, {2, 1}}, by_hand), "");
  EXPECT_NE(problem({{0, 1}, {1, 2}}, by_hand), "");
  EXPECT_NE(problem({{1, 1}, {0, 3}}, by_hand), "");  // rank 0 is the master's
  EXPECT_NE(problem({{0, 1}, {3, 3}}, by_hand), "");
  EXPECT_NE(problem({{0, 1}, {-1, 3}}, by_hand), "");
  EXPECT_NE(problem({{0, 17}, {1, 5}}, measured), "");
  EXPECT_NE(problem({{0, std::nan("")}, {1, 5}}, measured), "");
  EXPECT_NE(problem({{0, 0}, {1, 5}}, measured), "");
}

}  // namespace
}  // namespace phalanx::cluster
