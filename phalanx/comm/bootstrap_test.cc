#include "phalanx/comm/bootstrap.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "phalanx/comm/frame.h"
#include "phalanx/comm/tcp/address.h"
#include "phalanx/comm/tcp/hello.h"
#include "phalanx/comm/test_ranks.h"

namespace phalanx::comm {
namespace {

std::string message_of(const std::function<void()>& body, Code code) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

UniqueFd connect_to(const Member& member) {
  SocketAddress address = parse_address(member.data_address, member.data_port);
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(fd.get(), address.get(), address.size), 0) << std::strerror(errno);
  return fd;
}

void say(const UniqueFd& fd, const void* data, size_t size) {
  EXPECT_EQ(::send(fd.get(), data, size, MSG_NOSIGNAL), static_cast<ssize_t>(size));
}

void expect_all_formed(const TestRanks& ranks) {
  const auto outcomes = ranks.run([](Group& group) { group.barrier(); });
  for (const auto& outcome : outcomes)
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

Hello hello_for(const TestRanks& ranks, int from, int to) {
  const GroupOptions options = ranks.options(to);
  Hello hello;
  hello.sender = static_cast<uint32_t>(from);
  hello.receiver = static_cast<uint32_t>(to);
  hello.size = static_cast<uint32_t>(ranks.size());
  hello.generation = options.generation;
  hello.token = options.token;
  return hello;
}

// What the listener answers to these bytes while the group forms: the verdict, or nothing if it
// closes without a word.
std::optional<Verdict> answer_to(const TestRanks& ranks, const void* bytes, size_t size) {
  const UniqueFd stranger = connect_to(ranks.options(0).members[0]);
  say(stranger, bytes, size);
  expect_all_formed(ranks);
  HelloReply reply;
  const ssize_t count = ::recv(stranger.get(), &reply, sizeof reply, MSG_WAITALL);
  if (count != sizeof reply) return std::nullopt;
  return reply.verdict;
}

TEST(BootstrapTest, AWrongTokenIsRefusedAndTheGroupForms) {
  const TestRanks ranks({0, 1, 2});
  Hello hello = hello_for(ranks, 1, 0);
  hello.token[31] ^= std::byte{1};
  EXPECT_EQ(answer_to(ranks, &hello, sizeof hello), std::nullopt);
}

TEST(BootstrapTest, AWrongGenerationIsRefusedAndTheGroupForms) {
  const TestRanks ranks({0, 1, 2});
  Hello hello = hello_for(ranks, 1, 0);
  hello.generation ^= 1;
  EXPECT_EQ(answer_to(ranks, &hello, sizeof hello), Verdict::kGeneration);
}

TEST(BootstrapTest, AnotherVersionIsRefusedAndTheGroupForms) {
  const TestRanks ranks({0, 1, 2});
  Hello hello = hello_for(ranks, 1, 0);
  hello.version = kWireVersion + 1;
  EXPECT_EQ(answer_to(ranks, &hello, sizeof hello), Verdict::kVersion);
}

TEST(BootstrapTest, ARankThatDoesNotConnectHereIsRefusedAndTheGroupForms) {
  for (const uint32_t sender : {0u, 3u, 70'000u, 0xffffffffu}) {
    const TestRanks ranks({0, 1, 2});
    Hello hello = hello_for(ranks, 1, 0);
    hello.sender = sender;
    EXPECT_EQ(answer_to(ranks, &hello, sizeof hello), Verdict::kRank) << sender;
  }
}

TEST(BootstrapTest, GarbageAndSilenceAtEveryListenerDisturbNobody) {
  const TestRanks ranks({0, 1, 2, 2});
  std::vector<UniqueFd> strangers;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    const Member member = ranks.options(rank).members[rank];
    for (int i = 0; i < 70; ++i) {  // more than there are places
      strangers.push_back(connect_to(member));
      const std::string garbage(static_cast<size_t>(i) * 7, static_cast<char>('A' + i % 50));
      if (i % 3 != 0) say(strangers.back(), garbage.data(), garbage.size());
      if (i % 10 == 9) strangers.pop_back();
    }
  }
  const auto start = Clock::now();
  expect_all_formed(ranks);
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(5));
}

TEST(BootstrapTest, ARankWithAnotherTokenLearnsWhoDoesNotAnswer) {
  TestRanks ranks({0, 1});
  ranks.shared_options().connect_seconds = 0.5;
  const auto outcomes = ranks.run_with([&](int rank) {
    GroupOptions options = ranks.options(rank);
    if (rank == 1) options.token[0] ^= std::byte{0x80};
    (void)form_group(options, ranks.listener(rank), ranks.memory(rank));
  });
  ASSERT_TRUE(outcomes[0].error && outcomes[1].error);
  EXPECT_EQ(outcomes[0].error->code(), Code::kDeadlineExceeded);
  const std::string zero = outcomes[0].error->what(), one = outcomes[1].error->what();
  EXPECT_TRUE(contains(zero, "rank 1 (host-b): has not connected to this rank at 127.0.0.1")) << zero;
  EXPECT_TRUE(contains(one, "rank 0 (host-a) at 127.0.0.1 port")) << one;
  EXPECT_TRUE(contains(one, "without an answer")) << one;
}

TEST(BootstrapTest, ARankOfAnotherGenerationIsToldAtOnce) {
  TestRanks ranks({0, 1});
  ranks.shared_options().connect_seconds = 3;
  const auto outcomes = ranks.run_with([&](int rank) {
    GroupOptions options = ranks.options(rank);
    if (rank == 0) options.connect_seconds = 0.5;
    if (rank == 1) options.generation = 0x1234;
    (void)form_group(options, ranks.listener(rank), ranks.memory(rank));
  });
  ASSERT_TRUE(outcomes[1].error);
  EXPECT_EQ(outcomes[1].error->code(), Code::kFailedPrecondition);
  const std::string text = outcomes[1].error->what();
  EXPECT_TRUE(contains(text, "it is in generation 0x7, this rank in 0x1234")) << text;
  EXPECT_LT(outcomes[1].seconds, 1.0);
}

TEST(BootstrapTest, AnAbandonedGroupIsGivenUpWhileItForms) {
  TestRanks ranks({0, 1});
  GroupOptions options = ranks.options(0);  // the other one never comes
  const auto begin = Clock::now();
  options.abandoned = [&] {
    return std::string(Clock::now() - begin > std::chrono::milliseconds(200) ? "node host-b is dead"
                                                                             : "");
  };
  const std::string text =
      message_of([&] { (void)form_group(options, ranks.listener(0), -1); }, Code::kAborted);
  EXPECT_EQ(text, "node host-b is dead");
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(5));
}

TEST(BootstrapTest, NobodyListeningIsNamedWithAddressAndErrno) {
  TestRanks ranks({0, 1});
  GroupOptions options = ranks.options(1);
  options.connect_seconds = 0.3;
  {
    // A port that was free a moment ago.
    uint16_t port = 0;
    const UniqueFd gone = listen_on("127.0.0.9", 0, 0, &port);
    options.members[0].data_address = "127.0.0.9";
    options.members[0].data_port = port;
  }
  const std::string text =
      message_of([&] { (void)form_group(options, ranks.listener(1), -1); }, Code::kDeadlineExceeded);
  EXPECT_TRUE(contains(text, fmt::format("rank 0 (host-a) at 127.0.0.9 port {}: Connection refused "
                                         "(errno 111)",
                                         options.members[0].data_port)))
      << text;
}

TEST(BootstrapTest, RanksMayStartInAnyOrder) {
  const TestRanks ranks({0, 1, 0, 2});
  const auto outcomes = ranks.run_with([&](int rank) {
    std::this_thread::sleep_for(std::chrono::milliseconds((ranks.size() - rank) * 60));
    ranks.form(rank)->barrier();
  });
  for (const auto& outcome : outcomes)
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

TEST(BootstrapTest, MembersMustBeNumberedWithoutGaps) {
  GroupOptions options;
  options.members.resize(2);
  options.members[1].rank = 2;
  EXPECT_TRUE(contains(message_of([&] { (void)form_group(options, -1, -1); }, Code::kInvalidArgument),
                       "found rank 2 at place 1"));
  options.members[1].rank = 1;
  options.rank = 5;
  EXPECT_TRUE(contains(message_of([&] { (void)form_group(options, -1, -1); }, Code::kInvalidArgument),
                       "own rank 5"));
}

TEST(BootstrapTest, MissingDescriptorsAreNamed) {
  GroupOptions options;
  options.members.resize(2);
  options.members[1].rank = 1;
  options.members[0].host = options.members[1].host = "h";
  EXPECT_TRUE(contains(message_of([&] { (void)form_group(options, -1, -1); }, Code::kInvalidArgument),
                       "was given no shared memory"));
  options.members[1].node = 1;
  EXPECT_TRUE(contains(message_of([&] { (void)form_group(options, -1, -1); }, Code::kInvalidArgument),
                       "needs a listener"));
}

TEST(ListenTest, TakesAFreePortOfTheRange) {
  uint16_t first = 0, second = 0;
  const UniqueFd a = listen_on("127.0.0.1", 0, 0, &first);
  ASSERT_TRUE(a.valid());
  EXPECT_NE(::fcntl(a.get(), F_GETFD) & FD_CLOEXEC, 0);
  if (first == 65535) GTEST_SKIP() << "no port above the one the system chose";
  const UniqueFd b = listen_on("127.0.0.1", first, 65535, &second);
  EXPECT_GT(second, first);
}

TEST(ListenTest, SaysWhichAddressAndWhatTheMachineHas) {
  uint16_t port = 0;
  const std::string text =
      message_of([&] { (void)listen_on("192.0.2.77", 5000, 5001, &port); }, Code::kUnavailable);
  EXPECT_TRUE(contains(text, "192.0.2.77 ports 5000-5001")) << text;
  EXPECT_TRUE(contains(text, "errno 99")) << text;
  EXPECT_TRUE(contains(text, "127.0.0.1 (lo)")) << text;
  EXPECT_TRUE(contains(message_of([&] { (void)listen_on("localhost", 0, 0, &port); },
                                  Code::kInvalidArgument),
                       "numeric"));
  EXPECT_TRUE(contains(message_of([&] { (void)listen_on("127.0.0.1", 9, 8, &port); },
                                  Code::kInvalidArgument),
                       "9-8"));
}

TEST(NodeMemoryTest, IsSealedAndLeavesNoName) {
  const UniqueFd fd = create_node_memory(3);
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  EXPECT_NE(seals & F_SEAL_SHRINK, 0);
  EXPECT_NE(seals & F_SEAL_GROW, 0);
  EXPECT_NE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_NE(::ftruncate(fd.get(), 10), 0);
  for (const int count : {0, -1, 257})
    EXPECT_TRUE(contains(message_of([&] { (void)create_node_memory(count); }, Code::kInvalidArgument),
                         fmt::format("found {} local ranks", count)));
}

TEST(NodeMemoryTest, OtherMemoryIsRefused) {
  GroupOptions options;
  options.members.resize(2);
  options.members[1].rank = 1;
  const auto refused = [&](int fd, Code code) {
    return message_of([&] { (void)form_group(options, -1, fd); }, code);
  };
  const UniqueFd three = create_node_memory(3);
  EXPECT_TRUE(contains(refused(three.get(), Code::kFailedPrecondition), "for 3 local ranks; expected"));
  const UniqueFd unsealed(::memfd_create("x", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_TRUE(contains(refused(unsealed.get(), Code::kFailedPrecondition), "seals"));
  const UniqueFd file(::open("/dev/null", O_RDWR | O_CLOEXEC));
  EXPECT_TRUE(contains(refused(file.get(), Code::kFailedPrecondition), "not a memfd"));
}

TEST(NodeMemoryTest, ServesOneGenerationOnly) {
  const TestRanks ranks({0, 0});
  expect_all_formed(ranks);
  EXPECT_TRUE(contains(message_of([&] { (void)ranks.form(1); }, Code::kAlreadyExists),
                       "place 1 is taken by rank 1"));
}

TEST(FrameTest, FarewellsSurviveTheWireAndNothingElsePasses) {
  const Fault fault{Code::kUnavailable, 3, std::string(900, 'x')};
  FarewellFrame frame = encode_farewell(2, 9, &fault);
  const auto read = decode_farewell(frame, 9);
  ASSERT_TRUE(read);
  EXPECT_FALSE(read->clean);
  EXPECT_EQ(read->fault.culprit, 3);
  EXPECT_EQ(read->fault.text, std::string(464, 'x'));
  EXPECT_TRUE(decode_farewell(encode_farewell(2, 9, nullptr), 9)->clean);
  EXPECT_FALSE(decode_farewell(frame, 10));
  EXPECT_FALSE(decode_farewell(std::span(frame).first(511), 9));
  const uint32_t huge = 0xffffffff;
  std::memcpy(frame.data() + 32 + 12, &huge, sizeof huge);  // the length of the text
  EXPECT_EQ(decode_farewell(frame, 9)->fault.text.size(), 464u);
  for (size_t i = 0; i < 32; ++i) {
    if (i == 6 || i == 7) continue;  // the sender may be anybody
    FarewellFrame broken = encode_farewell(2, 9, &fault);
    broken[i] ^= std::byte{0x40};
    EXPECT_FALSE(decode_farewell(broken, 9)) << i;
  }
}

}  // namespace
}  // namespace phalanx::comm
