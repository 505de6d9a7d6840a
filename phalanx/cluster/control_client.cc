#include "phalanx/cluster/control_client.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <deque>
#include <mutex>

#include "control.grpc.pb.h"
#include "phalanx/cluster/control_server.h"
#include "phalanx/cluster/credentials.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {
namespace {

using control::v1::FromMaster;
using control::v1::FromNode;

constexpr size_t kMaxQueued = 256;

std::shared_ptr<grpc::Channel> make_channel(const std::string& address, uint16_t port,
                                            const ControlSecurity& security,
                                            std::shared_ptr<RefusalNote> note) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // no back-off left from an earlier try
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);  // also the time-out of a connect
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 5000);
  arguments.SetMaxReceiveMessageSize(kMaxControlMessageBytes);
  const bool v6 = address.find(':') != std::string::npos;
  return grpc::CreateCustomChannel((v6 ? "ipv6:" : "ipv4:") + net::endpoint(address, port),
                                   channel_credentials(security, std::move(note)), arguments);
}

// The last, human part of gRPC's chain of reasons.
std::string short_reason(std::string text) {
  for (const char* mark : {"last error: ", "Failed to connect to remote host: "}) {
    const size_t at = text.find(mark);
    if (at != std::string::npos) text = text.substr(at + std::string_view(mark).size());
  }
  return text;
}

}  // namespace

// One read is outstanding, and a hold keeps OnDone away, until the stream has ended: so sends from
// any thread are safe until `ended`.
struct ControlClient::State final : public grpc::ClientBidiReactor<FromNode, FromMaster> {
  State(const std::string& address, uint16_t port, const ControlSecurity& security,
        Handler& handler)
      : handler(handler),
        tls(security.current()),
        channel(make_channel(address, port, security, note)),
        stub(control::v1::Control::NewStub(channel)) {}

  void OnReadDone(bool ok) override {
    if (ok) {
      answered = true;
      handler.on_message(incoming);
      incoming.Clear();
      StartRead(&incoming);
      return;
    }
    {
      const std::lock_guard lock(mutex);
      ended = true;
    }
    RemoveHold();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex);
    queue.pop_front();
    if (!ok || ended) {
      queue.clear();
    } else if (!queue.empty()) {
      StartWrite(&queue.front());
    } else if (half_closed) {
      StartWritesDone();
    }
  }

  void OnDone(const grpc::Status& status) override {
    const Code code = status.ok() ? Code::kUnavailable : static_cast<Code>(status.error_code());
    std::string reason =
        status.ok() ? "the stream was closed" : short_reason(status.error_message());
    const std::string refused = note->get();
    // The master judges this node's certificate last, and says nothing when it refuses: it closes.
    const bool hung_up = tls != nullptr && !answered && !status.ok() &&
                         reason.find("refused") == std::string::npos;
    if (hung_up && refused.empty())
      reason += fmt::format(" (before an answer to the join; if the master refused this node's "
                            "certificate, {} of {}, valid until {}, its log says why)",
                            net::who(tls->own()), tls->own().issuer,
                            net::time_text(tls->own().not_after));
    handler.on_end(refused.empty() ? code : Code::kPermissionDenied,
                   refused.empty() ? reason : refused);
    const std::lock_guard lock(mutex);
    done = true;
    cv.notify_all();
  }

  Handler& handler;
  const std::shared_ptr<RefusalNote> note = std::make_shared<RefusalNote>();
  const std::shared_ptr<const net::TlsMaterial> tls;
  bool answered = false;  // touched by reads and the end alone
  const std::shared_ptr<grpc::Channel> channel;
  const std::unique_ptr<control::v1::Control::Stub> stub;
  grpc::ClientContext context;
  FromMaster incoming;
  std::mutex mutex;
  std::condition_variable cv;
  std::deque<FromNode> queue;  // the first is being written
  bool half_closed = false;
  bool ended = false;
  bool done = false;
};

ControlClient::ControlClient(const std::string& address, uint16_t port,
                             const ControlSecurity& security, Handler& handler)
    : state_(std::make_unique<State>(address, port, security, handler)) {
  state_->stub->async()->Join(&state_->context, state_.get());
  state_->AddHold();
  state_->StartRead(&state_->incoming);
  state_->StartCall();
}

ControlClient::~ControlClient() {
  state_->context.TryCancel();
  std::unique_lock lock(state_->mutex);
  state_->cv.wait(lock, [&] { return state_->done; });  // a cancelled call ends at once
}

void ControlClient::send(const FromNode& message, bool droppable) {
  const std::lock_guard lock(state_->mutex);
  State& s = *state_;
  if (s.ended || s.half_closed || (droppable && !s.queue.empty())) return;
  if (s.queue.size() >= kMaxQueued) {
    s.context.TryCancel();
    return;
  }
  s.queue.push_back(message);
  if (s.queue.size() == 1) s.StartWrite(&s.queue.front());
}

void ControlClient::finish(Deadline deadline) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  if (!s.half_closed && !s.ended) {
    s.half_closed = true;
    if (s.queue.empty()) s.StartWritesDone();
  }
  s.cv.wait_until(lock, deadline.when(), [&] { return s.done; });
}

}  // namespace phalanx::cluster
