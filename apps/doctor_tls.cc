#include "apps/doctor_tls.h"

#include <fmt/format.h>
#include <poll.h>

#include <nlohmann/json.hpp>

#include "apps/doctor_probe.h"
#include "phalanx/cluster/credentials.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/tls_stream.h"

namespace phalanx::apps {
namespace {

constexpr double kHandshakeSeconds = 4;

net::TlsContext context(const DoctorOptions& options, int peer, net::TlsContext::Side side) {
  const std::string address = options.address(peer);
  const std::string role = cluster::role_of(options.table, address);
  return {options.tls,
          {.side = side,
           .mutual = true,
           .identity =
               [address, role](const net::CertificateInfo& info) {
                 const auto problem =
                     net::identity_problem(info, {address}, role, "certificate of " + address);
                 return problem ? to_string(*problem) : std::string();
               },
           .refused = nullptr}};
}

// One byte from the server says that it has accepted this side's certificate, which a client cannot
// know from its own half of a handshake. Empty: good.
std::string shake(net::TlsStream& stream, bool server, Deadline deadline) {
  const auto wait = [&](net::TlsStream::State state) {
    pollfd p{stream.fd(), static_cast<short>(
                              state == net::TlsStream::State::kWantsWrite ? POLLOUT : POLLIN), 0};
    (void)::poll(&p, 1, deadline.poll_ms(500));
    return !deadline.passed();
  };
  for (;;) {
    const net::TlsStream::State state = stream.handshake();
    if (state == net::TlsStream::State::kDone) break;
    if (state == net::TlsStream::State::kFailed) return stream.why();
    if (!wait(state)) return "no handshake in time";
  }
  char byte = 'k';
  const iovec run{&byte, 1};
  for (;;) {
    const int64_t n = server ? stream.send_some({&run, 1}) : stream.recv_some({&run, 1});
    if (n > 0) return "";
    if (n < 0) return stream.why();
    if (!wait(server ? net::TlsStream::State::kWantsWrite : net::TlsStream::State::kWantsRead))
      return "no answer in time";
  }
}

}  // namespace

std::string try_tls(const DoctorOptions& options, int to) {
  const Deadline deadline = Deadline::in_seconds(kHandshakeSeconds);
  std::string reason;
  {
    const net::TlsContext tls = context(options, to, net::TlsContext::Side::kClient);
    net::TlsStream stream(tls, dial_doctor(options, to, deadline).take());
    reason = shake(stream, false, deadline);
  }
  if (reason.empty()) return "good";
  // Its side of the story: an alert says little.
  try {
    DoctorStream stream = dial_doctor(options, to, Deadline::in_seconds(kHandshakeSeconds));
    const nlohmann::json reply =
        stream.ask({{"op", "tls"}}, Deadline::in_seconds(kHandshakeSeconds));
    const auto there = cluster::printable(reply.at("verdict").get<std::string>(), 1000);
    if (!there.empty() && there != "good")
      reason += fmt::format("; {} says: {}", options.address(to), there);
  } catch (const std::exception& e) {
    reason += fmt::format("; {}", e.what());
  }
  return reason;
}

std::string answer_tls(const DoctorOptions& options, int from, UniqueFd connection) {
  if (options.tls == nullptr)
    return options.tls_problem.empty() ? "this listener has no --certs" : options.tls_problem;
  const net::TlsContext tls = context(options, from, net::TlsContext::Side::kServer);
  net::TlsStream stream(tls, std::move(connection));
  const std::string reason = shake(stream, true, Deadline::in_seconds(kHandshakeSeconds));
  return reason.empty() ? "good" : reason;
}

}  // namespace phalanx::apps
