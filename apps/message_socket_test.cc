#include "apps/message_socket.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <thread>

#include "apps/rank_spec.h"
#include "phalanx/base/error.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

TEST(MessageSocket, CarriesLargeMessagesBothWays) {
  auto [a, b] = MessageSocket::make_pair();
  MessageSocket left(std::move(a));
  MessageSocket right(std::move(b));
  const json big = {{"text", std::string(3'000'000, 'x')}};
  std::thread sender([&] { left.send(big); });
  EXPECT_EQ(right.receive(Deadline::in_seconds(10)), big);
  sender.join();
  right.send({{"event", "done"}});
  EXPECT_EQ(left.receive(Deadline::in_seconds(10))->at("event"), "done");
}

TEST(MessageSocket, TellsTheEndFromSilence) {
  auto [a, b] = MessageSocket::make_pair();
  MessageSocket left(std::move(a));
  try {
    (void)left.receive(Deadline::in_seconds(0.01));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kDeadlineExceeded);
  }
  b.reset();
  EXPECT_EQ(left.receive(Deadline::in_seconds(10)), std::nullopt);
  EXPECT_THROW(left.send({{"op", "x"}}), Error);
}

TEST(MessageSocket, RefusesAnAbsurdLength) {
  auto [a, b] = MessageSocket::make_pair();
  MessageSocket left(std::move(a));
  const uint32_t length = 0xffffffff;
  ASSERT_EQ(::send(b.get(), &length, sizeof length, 0), static_cast<ssize_t>(sizeof length));
  EXPECT_THROW((void)left.receive(Deadline::in_seconds(10)), Error);
}

TEST(RankSpec, SurvivesTheWayToTheRank) {
  RankSpec spec;
  spec.model = {.directory = "/models/a", .isa = ops::Isa::kAvx2, .max_step_tokens = 7,
                .max_step_rows = 3, .max_sequence = 99, .block_size = 16, .weights = {1, 2.5},
                .rank = 1};
  spec.vocab_size = 1000;
  spec.max_blocks = 55;
  spec.generation = 1ull << 40;
  spec.threads = 2;
  spec.cpus = {0, 3};
  spec.logits_folder = "/tmp/l";
  const RankSpec back = rank_spec_from_json(to_json(spec));
  EXPECT_EQ(to_json(back), to_json(spec));
  EXPECT_EQ(back.limits(9).blocks, 9);
  EXPECT_EQ(back.limits(9).max_rows, 3);

  comm::Token token{};
  token[0] = std::byte{0xab};
  token[31] = std::byte{0x01};
  EXPECT_EQ(token_from_hex(token_to_hex(token)), token);
  EXPECT_THROW((void)token_from_hex("ab"), Error);
}

}  // namespace
}  // namespace phalanx::apps
