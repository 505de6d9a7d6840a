#include "phalanx/net/address.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/net/digest.h"

namespace phalanx::net {
namespace {

TEST(Address, ParsesNumericAddressesOnly) {
  EXPECT_EQ(Address::parse("10.0.0.7")->text(), "10.0.0.7");
  EXPECT_EQ(Address::parse("FE80:0:0:0::1")->text(), "fe80::1");
  for (const char* bad : {"", "host", "-.-.-.-", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4 ",
                          "[::1]", "::g", "1.2.3.4:80", "fe80::1%eth0"}) {
    EXPECT_FALSE(Address::parse(bad)) << bad;
  }
  EXPECT_FALSE(Address::parse(std::string_view("1.2.3.4\0x", 9)));
}

TEST(Address, KnowsZeroAndLoopback) {
  EXPECT_TRUE(Address::parse("0.0.0.0")->is_all_zero());
  EXPECT_TRUE(Address::parse("::")->is_all_zero());
  EXPECT_FALSE(Address::parse("0.0.0.1")->is_all_zero());
  EXPECT_TRUE(Address::parse("127.3.2.1")->is_loopback());
  EXPECT_TRUE(Address::parse("::1")->is_loopback());
  EXPECT_FALSE(Address::parse("10.0.0.1")->is_loopback());
}

TEST(Address, ComparesSpellings) {
  EXPECT_TRUE(same_address("::1", "0:0:0:0:0:0:0:1"));
  EXPECT_FALSE(same_address("127.0.0.1", "127.0.0.2"));
  EXPECT_TRUE(same_address("name", "name"));
  EXPECT_EQ(endpoint("::1", 80), "[::1]:80");
  EXPECT_EQ(endpoint("1.2.3.4", 80), "1.2.3.4:80");
}

TEST(Address, KnowsWhatIsLocal) {
  EXPECT_TRUE(is_local("127.0.0.1"));
  EXPECT_TRUE(is_local("127.0.0.9"));
  EXPECT_FALSE(is_local("192.0.2.1"));
  EXPECT_FALSE(is_local("nonsense"));
  EXPECT_NE(own_addresses_text().find("127.0.0.1 (lo)"), std::string::npos) << own_addresses_text();
}

TEST(Address, Resolves) {
  EXPECT_EQ(resolve("127.0.0.1"), "127.0.0.1");
  EXPECT_EQ(resolve("localhost"), "127.0.0.1");
  EXPECT_THROW((void)resolve("no-such-host.invalid"), Error);
}

TEST(Port, NamesTheHolder) {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in sa{};
  sa.sin_family = AF_INET;
  ASSERT_EQ(::inet_pton(AF_INET, "127.0.0.1", &sa.sin_addr), 1);
  socklen_t size = sizeof sa;
  ASSERT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&sa), size), 0);
  ASSERT_EQ(::listen(fd.get(), 1), 0);
  ASSERT_EQ(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&sa), &size), 0);
  const uint16_t port = ntohs(sa.sin_port);
  const std::string problem = port_problem("127.0.0.1", port);
  EXPECT_NE(problem.find("already in use"), std::string::npos) << problem;
  EXPECT_NE(problem.find("pid " + std::to_string(::getpid())), std::string::npos) << problem;
  EXPECT_EQ(first_free_port("127.0.0.1", port, port), std::nullopt);
  EXPECT_EQ(port_problem("127.0.0.2", port), "");
  EXPECT_NE(port_problem("192.0.2.1", port).find("not on this machine, which has"),
            std::string::npos);
}

TEST(Digest, KnownValue) {
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

}  // namespace
}  // namespace phalanx::net
