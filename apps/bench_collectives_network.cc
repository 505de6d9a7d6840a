#include "apps/bench_collectives_network.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"

using phalanx::Code;
using phalanx::Error;

namespace {

void write_file(const char* path, const std::string& text) {
  const phalanx::UniqueFd fd(::open(path, O_WRONLY | O_CLOEXEC));
  if (!fd.valid() || ::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()))
    throw Error(Code::kPermissionDenied,
                fmt::format("cannot write {}: {}", path, std::strerror(errno)));
}

// Runs `ip` with these words.
void ip(const std::string& words) {
  std::vector<std::string> parts{"ip"};
  for (size_t at = 0; at < words.size();) {
    const size_t end = std::min(words.find(' ', at), words.size());
    parts.push_back(words.substr(at, end - at));
    at = end + 1;
  }
  std::vector<char*> arguments;
  for (std::string& part : parts) arguments.push_back(part.data());
  arguments.push_back(nullptr);
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, "ip", nullptr, nullptr, arguments.data(), environ);
  if (error != 0)
    throw Error(Code::kNotFound, fmt::format("cannot run the program ip: {}. Fix: install iproute2",
                                             std::strerror(error)));
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (status != 0)
    throw Error(Code::kUnavailable,
                fmt::format("\"ip {}\" ended with status {}", words, WEXITSTATUS(status)));
}

}  // namespace

void enter_network_sandbox() {
  const uid_t uid = ::geteuid();
  const gid_t gid = ::getegid();
  const int flags = CLONE_NEWNET | (uid == 0 ? 0 : CLONE_NEWUSER);
  if (::unshare(flags) != 0)
    throw Error(Code::kPermissionDenied,
                fmt::format("cannot make a network namespace: {}. Fix: run as root or allow user "
                            "namespaces, or leave out --transport veth",
                            std::strerror(errno)));
  if (uid == 0) return;
  write_file("/proc/self/setgroups", "deny");
  write_file("/proc/self/uid_map", fmt::format("0 {} 1", uid));
  write_file("/proc/self/gid_map", fmt::format("0 {} 1", gid));
}

void enter_own_network() {
  if (::unshare(CLONE_NEWNET) != 0)
    throw Error(Code::kPermissionDenied,
                fmt::format("cannot make a network namespace: {}", std::strerror(errno)));
}

void join_networks(const std::vector<pid_t>& processes) {
  if (processes.size() == 2) {
    ip(fmt::format("link add bench netns {} type veth peer name bench netns {}", processes[0],
                   processes[1]));
    return;
  }
  ip("link add bridge type bridge");
  ip("link set bridge up");
  for (size_t i = 0; i < processes.size(); ++i) {
    ip(fmt::format("link add port{} type veth peer name bench netns {}", i, processes[i]));
    ip(fmt::format("link set port{} master bridge", i));
    ip(fmt::format("link set port{} up", i));
  }
}

std::string network_address(int rank) { return fmt::format("10.77.0.{}", rank + 1); }

std::string configure_network(int rank) {
  ip("link set lo up");
  ip(fmt::format("addr add {}/24 dev bench", network_address(rank)));
  ip("link set bench up");
  return network_address(rank);
}
