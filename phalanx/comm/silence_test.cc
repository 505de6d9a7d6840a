#include "phalanx/comm/tcp/silence.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <thread>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::comm {
namespace {

struct Pair {
  UniqueFd a, b;
};

Pair connected_pair() {
  const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  EXPECT_EQ(::bind(listener.get(), generic, size), 0);
  EXPECT_EQ(::listen(listener.get(), 1), 0);
  EXPECT_EQ(::getsockname(listener.get(), generic, &size), 0);
  Pair pair;
  pair.a.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(pair.a.get(), generic, size), 0);
  pair.b.reset(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  return pair;
}

// From now on nothing that comes to this socket reaches it, and nothing is answered.
void drop_all(int fd) {
  sock_filter nothing[] = {BPF_STMT(BPF_RET | BPF_K, 0)};
  const sock_fprog program{.len = 1, .filter = nothing};
  ASSERT_EQ(::setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program), 0);
}

void send_as_much_as_fits(int fd) {
  const std::vector<char> bytes(1 << 16);
  while (::send(fd, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
  }
}

TEST(SilenceTest, ACutNetworkIsFoundAndAPeerThatDoesNotReadIsNot) {
  const Pair cut = connected_pair();
  const Pair unread = connected_pair();
  const Pair idle = connected_pair();
  drop_all(cut.b.get());
  ASSERT_EQ(::send(cut.a.get(), "x", 1, 0), 1);
  send_as_much_as_fits(unread.a.get());
  EXPECT_EQ(silence_of(cut.a.get()), "");
  const auto begin = Clock::now();
  const Deadline deadline = Deadline::in_seconds(20);
  std::string found;
  while (found.empty() && !deadline.passed()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    found = silence_of(cut.a.get());
    EXPECT_EQ(silence_of(unread.a.get()), "");
  }
  EXPECT_NE(found.find("no packet of it for"), std::string::npos) << found;
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(1900));
  std::this_thread::sleep_for(begin + std::chrono::milliseconds(3500) - Clock::now());
  EXPECT_EQ(silence_of(unread.a.get()), "");
  EXPECT_EQ(silence_of(idle.a.get()), "");
}

}  // namespace
}  // namespace phalanx::comm
