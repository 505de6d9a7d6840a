#include <gtest/gtest.h>

#include <future>
#include <mutex>

#include "phalanx/cluster/control.h"
#include "phalanx/cluster/control_testing.h"
#include "phalanx/net/testing_certificates.h"

namespace phalanx::cluster {
namespace {

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

// What a file watcher would hold.
class Renewed {
 public:
  explicit Renewed(std::shared_ptr<const net::TlsMaterial> tls) : tls_(std::move(tls)) {}
  void renew(std::shared_ptr<const net::TlsMaterial> tls) {
    const std::lock_guard lock(mutex_);
    tls_ = std::move(tls);
  }
  std::shared_ptr<const net::TlsMaterial> get() {
    const std::lock_guard lock(mutex_);
    return tls_;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const net::TlsMaterial> tls_;
};

TEST_F(ControlTls, RenewedCertificatesServeWithoutARestart) {
  make_nodes(2);
  Renewed master(certificates_.material("127.0.0.9", "inter-node:master"));
  ControlOptions given = with(0, master.get());
  given.renewed_tls = [&] { return master.get(); };
  make_master(given);
  net::CertificateOrder ended = order(1);
  ended.not_after = net::TestCertificates::now() - 60;
  Renewed slave(certificates_.material(ended));
  ControlOptions late = with(1, slave.get());
  late.renewed_tls = [&] { return slave.get(); };
  start_slave(1, late);
  EXPECT_EQ(slave_outcome(1).code, Code::kPermissionDenied);  // it refuses this master

  master.renew(good(0));
  // Within seconds the slave goes on, and it is the master that refuses.
  const Deadline deadline = Deadline::in_seconds(20);
  do {
    ASSERT_FALSE(deadline.passed()) << log();
    start_slave(1, late);
  } while (slaves_[1].outcome.wait_for(1s) == std::future_status::ready);
  EXPECT_TRUE(wait_for_log("certificate has expired")) << log();
  slave.renew(good(1));
  ASSERT_EQ(start_master().text, "");  // the same slave, at its next try
  coordinator_->stop("enough", Deadline::in_seconds(5));
  EXPECT_EQ(slave_outcome(1).text, "");
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

}  // namespace
}  // namespace phalanx::cluster
