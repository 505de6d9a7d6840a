#include "apps/bench_layout.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdio>
#include <regex>

#include "apps/bench_collectives_network.h"
#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::apps {
namespace {

struct Pipe {
  Pipe() {
    std::array<int, 2> fds{};
    if (::pipe2(fds.data(), O_CLOEXEC) != 0)
      throw Error(Code::kResourceExhausted, "bench: no descriptors for a pipe");
    read.reset(fds[0]);
    write.reset(fds[1]);
  }
  UniqueFd read, write;
};

void signal_one(int fd) {
  const char byte = 1;
  if (::write(fd, &byte, 1) != 1) throw Error(Code::kUnavailable, "bench: a node process ended");
}

void await_one(int fd, const char* what) {
  char byte = 0;
  if (::read(fd, &byte, 1) != 1)
    throw Error(Code::kUnavailable, fmt::format("bench: a node process ended before {}", what));
}

int guarded(const std::function<int()>& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    fmt::print(stderr, "phalanx: {}\n", error.what());
    return 1;
  }
}

std::string read_all(int fd) {
  std::string text;
  std::array<char, 65536> buffer{};
  for (ssize_t n = 0; (n = ::read(fd, buffer.data(), buffer.size())) > 0;)
    text.append(buffer.data(), static_cast<size_t>(n));
  return text;
}

}  // namespace

int BenchLayout::ranks() const {
  int sum = 0;
  for (const Node& node : nodes) sum += node.ranks;
  return sum;
}

int BenchLayout::threads_before(int node) const {
  int sum = 0;
  for (int i = 0; i < node; ++i) {
    const Node& n = nodes[static_cast<size_t>(i)];
    sum += n.ranks * n.threads;
  }
  return sum;
}

int BenchLayout::threads() const { return threads_before(static_cast<int>(nodes.size())); }

std::string BenchLayout::address(int node) const {
  return veth ? network_address(node) : fmt::format("127.0.0.{}", node + 1);
}

BenchLayout parse_layout(const std::string& text) {
  static const std::regex whole("(tls:|ucx:)?(veth:)?[0-9]{1,2}x[0-9]{1,4}(\\+[0-9]{1,2}x[0-9]{1,4})*");
  static const std::regex node("([0-9]+)x([0-9]+)");
  BenchLayout layout{.name = text,
                     .tls = text.starts_with("tls:"),
                     .ucx = text.starts_with("ucx:"),
                     .veth = text.find("veth:") != std::string::npos,
                     .nodes = {}};
  const bool shaped = std::regex_match(text, whole);
  for (std::sregex_iterator at(text.begin(), text.end(), node), end; shaped && at != end; ++at)
    layout.nodes.push_back({std::stoi((*at)[1]), std::stoi((*at)[2])});
  bool good = shaped && (!(layout.veth || layout.tls || layout.ucx) || layout.nodes.size() >= 2);
  for (const BenchLayout::Node& n : layout.nodes) good = good && n.ranks > 0 && n.threads > 0;
  if (!good)
    throw Error(Code::kInvalidArgument,
                fmt::format("--layout: found \"{}\", expected nodes as RANKSxTHREADS joined by '+', "
                            "such as 1x2, 2x1, 1x1+1x1, veth:1x1+1x1 for two or more nodes in "
                            "network namespaces, tls: or ucx: before those of several nodes",
                            text));
  return layout;
}

std::string run_nodes(const BenchLayout& layout, const std::function<int(int, int)>& body) {
  std::fflush(stdout);
  Pipe result;
  const pid_t coordinator = ::fork();
  if (coordinator == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    result.read.reset();
    const int status = guarded([&] {
      if (layout.veth) enter_network_sandbox();
      std::vector<pid_t> pids;
      std::vector<Pipe> ready(layout.nodes.size());
      std::vector<Pipe> joined(layout.nodes.size());
      for (int i = 0; i < static_cast<int>(layout.nodes.size()); ++i) {
        const auto at = static_cast<size_t>(i);
        pids.push_back(::fork());
        if (pids.back() != 0) continue;
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        const int failed = guarded([&] {
          if (layout.veth) {
            enter_own_network();
            signal_one(ready[at].write.get());
            await_one(joined[at].read.get(), "the networks were joined");
            (void)configure_network(i);
          }
          return body(i, result.write.get());
        });
        std::fflush(stdout);
        ::_exit(failed);
      }
      result.write.reset();
      if (layout.veth) {
        for (Pipe& pipe : ready) await_one(pipe.read.get(), "it had a network");
        join_networks(pids);
        for (Pipe& pipe : joined) signal_one(pipe.write.get());
      }
      int failed = 0;
      for (size_t left = pids.size(); left > 0; --left) {
        int ended = 0;
        const pid_t pid = ::wait(&ended);
        if (ended == 0 || failed != 0) continue;
        failed = 1;
        for (const pid_t other : pids)
          if (other != pid) ::kill(other, SIGTERM);
      }
      return failed;
    });
    ::_exit(status);
  }
  result.write.reset();
  std::string text = read_all(result.read.get());
  int status = 1;
  if (coordinator > 0) ::waitpid(coordinator, &status, 0);
  if (status != 0)
    throw Error(Code::kInternal,
                fmt::format("the ranks of layout {} could not be measured", layout.name));
  return text;
}

}  // namespace phalanx::apps
