#include <gtest/gtest.h>
#include <sys/socket.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "phalanx/base/log.h"
#include "phalanx/comm/tcp/address.h"
#include "phalanx/comm/tcp/hello.h"
#include "phalanx/comm/test_ranks.h"
#include "phalanx/net/testing_certificates.h"
#include "phalanx/net/tls_stream.h"

namespace phalanx::comm {
namespace {

using net::CertificateOrder;
using net::PrivateKey;
using net::TestCertificates;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Two ranks on two nodes; the log is kept to be read.
class DataPlaneTls : public testing::Test {
 protected:
  void SetUp() override {
    log_file_ = certificates_.file("log");
    set_up_log({.to_stderr = false, .file = log_file_});
    for (int node = 0; node < 2; ++node)
      good_.push_back(certificates_.material(address(node), ""));
  }
  void TearDown() override { set_up_log({}); }
  static std::string address(int node) { return fmt::format("127.0.0.{}", node + 1); }
  std::string log() const {
    std::stringstream text;
    text << std::ifstream(log_file_).rdbuf();
    return text.str();
  }

  // The group forms with these certificates; what each rank threw.
  std::vector<TestRanks::Outcome> form(const std::shared_ptr<const net::TlsMaterial>& first,
                                       const std::shared_ptr<const net::TlsMaterial>& second,
                                       double seconds = 20) {
    TestRanks ranks({0, 1});
    ranks.shared_options().connect_seconds = seconds;
    return ranks.run_with([&](int rank) {
      GroupOptions options = ranks.options(rank);
      options.tls = rank == 0 ? first : second;
      const auto group = form_group(options, ranks.listener(rank), -1);
      group->barrier();
    });
  }
  // Rank 1, which connects, has `bad`: rank 0 says why in its log, and both time out.
  void refused(const std::shared_ptr<const net::TlsMaterial>& bad, const char* sentence) {
    const auto outcomes = form(good_[0], bad, 0.5);
    ASSERT_TRUE(outcomes[0].error && outcomes[1].error);
    EXPECT_TRUE(contains(log(), sentence)) << log();
  }

  TestCertificates certificates_;
  std::vector<std::shared_ptr<const net::TlsMaterial>> good_;
  std::string log_file_;
};

TEST_F(DataPlaneTls, GoodCertificatesFormTheGroup) {
  for (const auto& outcome : form(good_[0], good_[1]))
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

TEST_F(DataPlaneTls, EachBadCertificateOfAPeerIsNamed) {
  CertificateOrder bad = TestCertificates::order(address(1), "");
  bad.not_after = TestCertificates::now() - 60;
  refused(certificates_.material(bad), "certificate has expired");
  bad = TestCertificates::order(address(1), "");
  bad.not_before = TestCertificates::now() + 600;
  refused(certificates_.material(bad), "certificate is not yet valid");
  bad = TestCertificates::order(address(1), "");
  bad.for_client = false;
  refused(certificates_.material(bad), "certificate may not be used by a client");
  refused(certificates_.material(TestCertificates::order(address(1), "service")),
          "certificate is of another role: found service");
  refused(certificates_.material(TestCertificates::order(address(1), ""),
                                 PrivateKey::make(PrivateKey::Kind::kRsa, 2048)),
          "certificate has a weak key");
  TestCertificates others("other authority");
  // Each trusts its own authority only, and rank 1, which connects, judges first.
  const auto outcomes = form(good_[0], others.material(address(1), ""), 0.5);
  ASSERT_TRUE(outcomes[0].error && outcomes[1].error);
  EXPECT_TRUE(contains(outcomes[1].error->what(), "certificate was signed by another authority"))
      << outcomes[1].error->what();
}

TEST_F(DataPlaneTls, ARevokedCertificateIsRefusedAtOnceAndAnotherTaken) {
  certificates_.revoke(*good_[1]);
  refused(good_[1], "certificate was revoked");
  const auto renewed = certificates_.material(address(1), "");
  for (const auto& outcome : form(good_[0], renewed))
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

TEST_F(DataPlaneTls, ACertificateOfAnotherNodeIsRefusedByNameOnBothSides) {
  // Of no rank of the group: refused in the handshake, before anything is said.
  const auto stranger = certificates_.material("127.0.0.9", "");
  refused(stranger, "expected one of 127.0.0.1, 127.0.0.2");
  EXPECT_TRUE(contains(log(), "certificate of the peer, CN=127.0.0.9")) << log();
  // Of another rank than it says.
  auto outcomes = form(good_[0], certificates_.material(address(0), ""), 0.5);
  ASSERT_TRUE(outcomes[1].error);
  EXPECT_TRUE(contains(log(), "certificate of rank 1 (host-b), CN=127.0.0.1")) << log();
  EXPECT_TRUE(contains(log(), "certificate is of another node")) << log();
  EXPECT_TRUE(contains(outcomes[1].error->what(), "is not one of 127.0.0.2"))
      << outcomes[1].error->what();
  outcomes = form(stranger, good_[1], 0.5);
  ASSERT_TRUE(outcomes[1].error);
  EXPECT_TRUE(contains(outcomes[1].error->what(), "certificate is of another node"))
      << outcomes[1].error->what();
  EXPECT_TRUE(contains(outcomes[1].error->what(), "expected 127.0.0.1"));
}

TEST_F(DataPlaneTls, ClearAndEncryptedDoNotMix) {
  const auto outcomes = form(good_[0], nullptr, 0.5);
  EXPECT_TRUE(outcomes[0].error && outcomes[1].error);
  EXPECT_TRUE(contains(log(), "a TLS handshake failed")) << log();
}

TEST_F(DataPlaneTls, StrangersDisturbNobody) {
  TestRanks ranks({0, 1});
  std::vector<UniqueFd> strangers;
  for (int i = 0; i < 100; ++i) {
    const Member member = ranks.options(0).members[i % 2];
    SocketAddress target = parse_address(member.data_address, member.data_port);
    strangers.emplace_back(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::connect(strangers.back().get(), target.get(), target.size), 0);
    const std::string garbage(static_cast<size_t>(i) * 11, static_cast<char>(22 + i));
    (void)!::send(strangers.back().get(), garbage.data(), garbage.size(), MSG_NOSIGNAL);
  }
  const auto outcomes = ranks.run_with([&](int rank) {
    GroupOptions options = ranks.options(rank);
    options.tls = good_[static_cast<size_t>(rank)];
    form_group(options, ranks.listener(rank), -1)->barrier();
  });
  for (const auto& outcome : outcomes)
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

TEST_F(DataPlaneTls, ALeaverIsHeardAndAFaultNamed) {
  TestRanks ranks({0, 1});
  const auto outcomes = ranks.run_with([&](int rank) {
    GroupOptions options = ranks.options(rank);
    options.tls = good_[static_cast<size_t>(rank)];
    const auto group = form_group(options, ranks.listener(rank), -1);
    if (rank == 1) return;  // leaves cleanly
    std::vector<float> values(1 << 20);
    group->all_reduce(values);
  });
  EXPECT_FALSE(outcomes[1].error);
  ASSERT_TRUE(outcomes[0].error);
  EXPECT_TRUE(contains(outcomes[0].error->what(), "it left the group")) << outcomes[0].error->what();
}

// Every split of a stream into calls gives the same bytes, also when the socket takes little.
TEST(TlsStreamTest, CarriesAnyRunsThroughASmallSocket) {
  TestCertificates certificates;
  const auto material = certificates.material("127.0.0.1", "");
  const net::TlsContext server(material, {.side = net::TlsContext::Side::kServer});
  const net::TlsContext client(material, {.side = net::TlsContext::Side::kClient});
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair), 0);
  const int small = 8 << 10;
  for (const int fd : pair) ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
  net::TlsStream a(client, UniqueFd(pair[0]));
  net::TlsStream b(server, UniqueFd(pair[1]));
  for (int i = 0; i < 20; ++i) (void)a.handshake(), (void)b.handshake();
  ASSERT_EQ(a.handshake(), net::TlsStream::State::kDone);
  ASSERT_EQ(b.handshake(), net::TlsStream::State::kDone);
  EXPECT_EQ(b.peer()->info().names("127.0.0.1"), true);

  std::vector<char> sent(300'001), got(sent.size());
  for (size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<char>(i * 31 + i / 255);
  size_t out = 0, in = 0;
  for (int turn = 0; in < got.size() && turn < 100'000; ++turn) {
    if (out < sent.size()) {
      std::vector<iovec> runs;
      for (size_t at = out, size = 1 + (out * 7) % 40'000; at < sent.size() && runs.size() < 5;
           at += size, size = 1 + (at * 13) % 3'000)
        runs.push_back({sent.data() + at, std::min(size, sent.size() - at)});
      const int64_t moved = a.send_some(runs);
      ASSERT_GE(moved, 0) << a.why();
      out += static_cast<size_t>(moved);
    }
    const iovec run{got.data() + in, std::min<size_t>(got.size() - in, 1 + (turn * 977) % 30'000)};
    const int64_t moved = b.recv_some({&run, 1});
    ASSERT_GE(moved, 0) << b.why();
    in += static_cast<size_t>(moved);
  }
  EXPECT_TRUE(out == sent.size() && sent == got);
}

}  // namespace
}  // namespace phalanx::comm
