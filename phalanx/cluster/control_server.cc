#include "phalanx/cluster/control_server.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <charconv>
#include <chrono>
#include <deque>
#include <map>
#include <mutex>

#include "control.grpc.pb.h"
#include "phalanx/base/error.h"
#include "phalanx/base/log.h"
#include "phalanx/cluster/control_listener.h"
#include "phalanx/cluster/credentials.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {
namespace {

using control::v1::FromMaster;
using control::v1::FromNode;

constexpr size_t kMaxQueued = 256;  // a peer that does not read is cut off
constexpr int kHandshakeMs = 5'000;       // from the connection to HTTP/2's first frame
constexpr size_t kMemory = 64 << 20;      // of all connections together

// "ipv4:10.0.0.2:43210".
uint16_t peer_port(const std::string& peer) {
  uint16_t port = 0;
  const size_t colon = peer.rfind(':');
  if (colon != std::string::npos)
    std::from_chars(peer.data() + colon + 1, peer.data() + peer.size(), port);
  return port;
}

}  // namespace

struct ControlServer::State {
  class Stream;
  // Refuses a stream at once.
  class Refusal final : public grpc::ServerBidiReactor<FromNode, FromMaster> {
   public:
    explicit Refusal(const grpc::Status& status) { Finish(status); }
    void OnDone() override { delete this; }
  };
  class Service final : public control::v1::Control::CallbackService {
   public:
    explicit Service(State& state) : state_(state) {}
    grpc::ServerBidiReactor<FromNode, FromMaster>* Join(
        grpc::CallbackServerContext* context) override {
      return state_.open(context);
    }

   private:
    State& state_;
  };

  State(const Options& options, Handler& handler)
      : options(options), handler(handler), service(*this) {}

  grpc::ServerBidiReactor<FromNode, FromMaster>* open(grpc::CallbackServerContext* context);
  std::shared_ptr<Stream> find(StreamId id) {
    const std::lock_guard lock(mutex);
    const auto it = streams.find(id);
    return it == streams.end() ? nullptr : it->second;
  }

  const Options options;
  Handler& handler;
  Service service;
  std::mutex mutex;
  StreamId last_id = 0;                                // guarded by mutex
  std::map<StreamId, std::shared_ptr<Stream>> streams;  // guarded by mutex; until OnDone
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<ControlListener> listener;  // hands connections to the server
};

// Lives in State::streams from open() to OnDone(). One read is always outstanding.
class ControlServer::State::Stream final : public grpc::ServerBidiReactor<FromNode, FromMaster> {
 public:
  Stream(State& state, StreamId id, grpc::CallbackServerContext* context)
      : state_(state), id_(id), context_(context) {}

  void start() { StartRead(&incoming_); }

  void send(const FromMaster& message, bool droppable) {
    const std::lock_guard lock(mutex_);
    if (closing_ || finished_ || (droppable && !queue_.empty())) return;
    if (queue_.size() >= kMaxQueued) {
      context_->TryCancel();
      return;
    }
    queue_.push_back(message);
    if (queue_.size() == 1) StartWrite(&queue_.front());
  }

  void finish() {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    if (queue_.empty()) finish_locked(grpc::Status::OK);
  }

  void cancel() {
    const std::lock_guard lock(mutex_);
    if (!done_) context_->TryCancel();
  }

  void OnReadDone(bool ok) override {
    if (ok) {
      if (!refused_ && incoming_.has_join()) refused_ = !is_node(incoming_.join());
      if (!refused_) state_.handler.on_message(id_, incoming_);
      incoming_.Clear();
      StartRead(&incoming_);
      return;
    }
    state_.handler.on_end(id_);
    finish();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    queue_.pop_front();
    if (!ok) {
      queue_.clear();
      finish_locked(grpc::Status::CANCELLED);
    } else if (!queue_.empty()) {
      StartWrite(&queue_.front());
    } else if (closing_) {
      finish_locked(grpc::Status::OK);
    }
  }

  void OnDone() override {
    std::shared_ptr<Stream> self;
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    const std::lock_guard lock(state_.mutex);
    const auto it = state_.streams.find(id_);
    self = std::move(it->second);
    state_.streams.erase(it);
  }

 private:
  // Whether the certificate of the connection is of the node that the join names. If not the node
  // is told, and nobody else hears of it.
  bool is_node(const control::v1::Join& join) {
    const ControlSecurity& security = state_.options.security;
    if (security.tls == nullptr || join.server() >= security.table.servers.size()) return true;
    std::string reason = "the connection has no certificate";
    const auto pem = context_->auth_context()->FindPropertyValues(GRPC_X509_PEM_CERT_PROPERTY_NAME);
    if (!pem.empty()) {
      const auto chain =
          net::Certificate::parse({pem[0].data(), pem[0].size()}, "certificate of the peer");
      const auto problem = slave_problem(chain[0].info(), security.table,
                                         static_cast<int>(join.server()));
      if (!problem) return true;
      reason = to_string(*problem);
    }
    log_warn("control plane refused a peer that claims to be server_list[{}]: {}", join.server(),
             reason);
    FromMaster message;
    message.mutable_refused()->set_code(static_cast<int>(Code::kPermissionDenied));
    message.mutable_refused()->set_reason(reason);
    send(message, false);
    finish();
    return false;
  }

  void finish_locked(const grpc::Status& status) {
    if (finished_) return;
    finished_ = true;
    Finish(status);
  }

  State& state_;
  const StreamId id_;
  FromNode incoming_;
  std::mutex mutex_;
  grpc::CallbackServerContext* const context_;  // valid until done_
  std::deque<FromMaster> queue_;                // the first is being written
  bool refused_ = false;  // by is_node(); touched by reads alone
  bool closing_ = false;
  bool finished_ = false;
  bool done_ = false;
};

grpc::ServerBidiReactor<FromNode, FromMaster>* ControlServer::State::open(
    grpc::CallbackServerContext* context) {
  std::shared_ptr<Stream> stream;
  StreamId id = 0;
  {
    const std::lock_guard lock(mutex);
    if (streams.size() < options.max_streams) {
      id = ++last_id;
      stream = std::make_shared<Stream>(*this, id, context);
      streams.emplace(id, stream);
    }
  }
  if (!stream) {
    return new Refusal(grpc::Status(
        grpc::RESOURCE_EXHAUSTED,
        fmt::format("the master already has {} connections", options.max_streams)));
  }
  listener->proved(peer_port(context->peer()));
  handler.on_open(id, context->peer());
  stream->start();
  return stream.get();
}

ControlServer::ControlServer(const Options& options, Handler& handler)
    : state_(std::make_unique<State>(options, handler)) {
  const std::string where = net::endpoint(options.address, options.port);
  const std::string problem = net::port_problem(options.address, options.port);
  if (problem.empty()) {
    grpc::ServerBuilder builder;
    auto acceptor = builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        server_credentials(options.security));
    builder.RegisterService(&state_->service);
    builder.SetMaxReceiveMessageSize(kMaxControlMessageBytes);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 4);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, 30'000);
    builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeMs);
    builder.SetResourceQuota(grpc::ResourceQuota("control plane").Resize(kMemory));
    state_->listener = std::make_unique<ControlListener>(
        ControlListener::Options{.address = options.address, .port = options.port});
    state_->server = builder.BuildAndStart();
    if (state_->server)
      state_->listener->start([acceptor = std::shared_ptr(std::move(acceptor))](UniqueFd connection) {
        grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters handed;
        handed.fd = connection.release();
        acceptor->HandleNewConnection(&handed);
      });
  }
  if (!state_->server) {
    throw Error(Code::kUnavailable,
                fmt::format("control plane: cannot listen on {}: {}. Fix: free the port, or set "
                            "multiNodesInferPort to another one on every node",
                            where, problem.empty() ? "gRPC server did not start" : problem));
  }
}

ControlServer::~ControlServer() {
  if (!state_->server) return;
  state_->listener.reset();
  // A deadline in the past ends the calls that are open, then the handlers run to their end.
  state_->server->Shutdown(std::chrono::system_clock::now());
  state_->server->Wait();
  state_->server.reset();
}

void ControlServer::send(StreamId stream, const FromMaster& message, bool droppable) {
  if (const auto found = state_->find(stream)) found->send(message, droppable);
}

void ControlServer::finish(StreamId stream) {
  if (const auto found = state_->find(stream)) found->finish();
}

void ControlServer::cancel(StreamId stream) {
  if (const auto found = state_->find(stream)) found->cancel();
}

}  // namespace phalanx::cluster
