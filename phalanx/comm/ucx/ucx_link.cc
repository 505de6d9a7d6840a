#include <dlfcn.h>
#include <fmt/format.h>
#include <poll.h>
#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"
#include "phalanx/comm/ucx/ucx.h"
#include "phalanx/comm/ucx/ucx_link.h"

namespace phalanx::comm {

namespace {

// Small enough that its copies stay in the cache.
constexpr int64_t kChunkBytes = 64 << 10;
constexpr size_t kChunks = 8;
// UCX over TCP calls a send done when its rest lies in a buffer of its own, which nobody empties while
// this rank computes. The next send starts when that is empty, so a large message ends with a small one.
constexpr int64_t kTailBytes = 64;
constexpr int64_t kTailFrom = 32 << 10;
constexpr int64_t kLookEveryNs = 1'000'000;
constexpr int kEvidenceMs = 30;  // for the reason of a failed connection to arrive
constexpr std::chrono::seconds kArrival{2};   // for what a peer sent before it left
constexpr std::chrono::seconds kClosing{1};
constexpr std::chrono::milliseconds kFlushing{200};  // the peer takes part, and may be busy

// --- the library ---------------------------------------------------------------------------------

#define PHALANX_UCX_FUNCTIONS(X)                                                                   \
  X(ucp_get_version) X(ucp_config_read) X(ucp_config_modify) X(ucp_config_release)                 \
  X(ucp_init_version) X(ucp_cleanup) X(ucp_worker_create) X(ucp_worker_destroy)                    \
  X(ucp_worker_get_address) X(ucp_worker_release_address) X(ucp_worker_get_efd) X(ucp_worker_arm)  \
  X(ucp_worker_progress) X(ucp_ep_create) X(ucp_ep_close_nbx)                                      \
  X(ucp_ep_flush_nbx) X(ucp_stream_send_nbx) X(ucp_stream_recv_data_nb) X(ucp_stream_data_release)                     \
  X(ucp_request_check_status) X(ucp_request_free) X(ucs_status_string)

struct Ucx {
#define PHALANX_UCX_MEMBER(name) decltype(&::name) name = nullptr;
  PHALANX_UCX_FUNCTIONS(PHALANX_UCX_MEMBER)
#undef PHALANX_UCX_MEMBER
  std::string problem;  // else all functions are there
  std::array<uint32_t, 3> version{};

  Ucx() {
    prepare_environment_for_ucx();
    // Never closed: UCX keeps threads and handlers of its own.
    void* const library = ::dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = ::dlerror();
      problem = fmt::format("the library of UCX cannot be loaded: {}. Fix: install libucx0 on this "
                            "machine, or leave ucx out of PHALANX_DATA_PLANE",
                            why != nullptr ? why : "unknown reason");
      return;
    }
#define PHALANX_UCX_LOAD(name)                                                \
  this->name = reinterpret_cast<decltype(&::name)>(::dlsym(library, #name));  \
  if (this->name == nullptr && problem.empty())                               \
    problem = "the library of UCX on this machine has no " #name              \
              ". Fix: install UCX 1.11 or later";
    PHALANX_UCX_FUNCTIONS(PHALANX_UCX_LOAD)
#undef PHALANX_UCX_LOAD
    if (problem.empty()) ucp_get_version(&version[0], &version[1], &version[2]);
  }
};

// --- one worker for all links of a rank ------------------------------------------------------------

class Endpoint;

class Worker final : public UcxWorker, public std::enable_shared_from_this<Worker> {
 public:
  explicit Worker(const std::string& data_address) {
    if (!ucx.problem.empty()) throw Error(Code::kUnimplemented, ucx.problem);
    ucp_config_t* config = nullptr;
    check(ucx.ucp_config_read(nullptr, nullptr, &config), "read its settings");
    if (const char* written = std::getenv("UCX_NET_DEVICES")) {
      devices_ = written;
    } else if (devices_ = ucx_devices(data_address); !devices_.empty()) {
      const ucs_status_t status =
          ucx.ucp_config_modify(config, "NET_DEVICES", devices_.c_str());
      if (status != UCS_OK) ucx.ucp_config_release(config);
      check(status, "take its devices");
    }
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_STREAM | UCP_FEATURE_WAKEUP;
    const ucs_status_t status =
        ucx.ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &context_);
    ucx.ucp_config_release(config);
    check(status, "start");
    ucp_worker_params_t worker{};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    const ucs_status_t made = ucx.ucp_worker_create(context_, &worker, &worker_);
    if (made != UCS_OK) ucx.ucp_cleanup(context_);
    check(made, "open its devices");
    if (ucx.ucp_worker_get_efd(worker_, &wake_fd_) != UCS_OK) wake_fd_ = -1;
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() override {
    ucx.ucp_worker_destroy(worker_);
    ucx.ucp_cleanup(context_);
  }

  [[nodiscard]] std::vector<std::byte> address() const override {
    ucp_address_t* address = nullptr;
    size_t size = 0;
    check(ucx.ucp_worker_get_address(worker_, &address, &size), "tell its address");
    const auto* begin = reinterpret_cast<const std::byte*>(address);
    std::vector<std::byte> bytes(begin, begin + size);
    ucx.ucp_worker_release_address(worker_, address);
    if (size > kMaxAddressBytes)
      throw Error(Code::kResourceExhausted,
                  fmt::format("the address of UCX has {} bytes, expected at most {}. Fix: name fewer "
                              "devices in UCX_NET_DEVICES",
                              size, kMaxAddressBytes));
    return bytes;
  }
  std::unique_ptr<UcxLink> link(std::unique_ptr<Link> channel) override;
  void progress() override;
  bool arm() override {
    armed_ = armed_ || ucx.ucp_worker_arm(worker_) == UCS_OK;
    return armed_;
  }
  [[nodiscard]] int wake_fd() const override { return wake_fd_; }
  [[nodiscard]] ucp_worker_h get() const { return worker_; }
  [[nodiscard]] std::string settings() const override {
    const char* transports = std::getenv("UCX_TLS");
    return fmt::format("UCX_NET_DEVICES={}, UCX_TLS={}", devices_.empty() ? "all" : devices_,
                       transports != nullptr ? transports : "all");
  }

  [[nodiscard]] std::array<uint32_t, 3> version() const override { return ucx.version; }

  const Ucx ucx;
  std::vector<Endpoint*> links;

 private:
  void check(ucs_status_t status, const char* what) const {
    if (status == UCS_OK) return;
    throw Error(Code::kUnavailable,
                fmt::format("UCX {} could not {}: {}. It was told {}. Fix: correct "
                            "those, or leave ucx out of PHALANX_DATA_PLANE",
                            ucx_version_text(ucx.version), what, ucx.ucs_status_string(status),
                            settings()));
  }

  std::string devices_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int wake_fd_ = -1;
  bool armed_ = false;
};

// --- a link ----------------------------------------------------------------------------------------

// What is said over the channel before the farewell, so that a peer knows whether all has arrived.
struct Account {
  uint64_t magic = 0x315443414C4E4850;  // "PHNLACT1"
  uint64_t sent = 0;                    // bytes over UCX since the link was made
  uint64_t received = 0;

  bool operator==(const Account&) const = default;
};
static_assert(sizeof(Account) == 24);

// A stream of a UCX endpoint for the bytes, a channel for the rest.
class Endpoint final : public UcxLink {
 public:
  Endpoint(std::shared_ptr<Worker> worker, std::unique_ptr<Link> channel)
      : worker_(std::move(worker)), ucx_(worker_->ucx), channel_(std::move(channel)) {
    worker_->links.push_back(this);
  }
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;
  ~Endpoint() override {
    if (endpoint_ != nullptr) close();
    std::erase(worker_->links, this);
  }

  std::string connect(const std::vector<std::byte>& address) override {
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler = {on_error, this};
    const ucs_status_t status = ucx_.ucp_ep_create(worker_->get(), &params, &endpoint_);
    if (status == UCS_OK) return {};
    endpoint_ = nullptr;
    return ucx_.ucs_status_string(status);
  }

  int64_t send_some(std::span<const iovec> runs) override {
    if (closed_.load(std::memory_order_acquire)) return -1;
    int64_t total = 0;
    for (const iovec& run : runs) total += static_cast<int64_t>(run.iov_len);
    PHALANX_CHECK(total >= staged_);
    bool progressed = false;
    for (;;) {
      while (staged_ < total && chunks_.size() < kChunks && !failed_) stage(runs, total);
      if (failed_) return settle(total);
      const int64_t gone = reap();
      if (failed_) return settle(total);
      if (gone != 0 || progressed) return gone;
      worker_->progress();
      progressed = true;
    }
  }

  int64_t recv_some(std::span<const iovec> runs) override {
    if (closed_.load(std::memory_order_acquire)) return -1;
    if (arrived_.empty()) worker_->progress();
    int64_t moved = 0;
    for (const iovec& run : runs) {
      size_t filled = 0;
      while (filled < run.iov_len && !arrived_.empty()) {
        Arrived& from = arrived_.front();
        const size_t count = std::min(run.iov_len - filled, from.size - from.taken);
        std::memcpy(static_cast<std::byte*>(run.iov_base) + filled,
                    static_cast<const std::byte*>(from.data) + from.taken, count);
        filled += count;
        from.taken += count;
        moved += static_cast<int64_t>(count);
        if (from.taken < from.size) break;
        ucx_.ucp_stream_data_release(endpoint_, from.data);
        arrived_.pop_front();
      }
      if (filled < run.iov_len) break;
    }
    if (moved > 0) return moved;
    return failed_ || ended() ? -1 : 0;
  }

  [[nodiscard]] std::string why() const override {
    if (!failed_) return channel_->why();
    return fmt::format("its connection over UCX failed: {}", ucx_.ucs_status_string(*failed_));
  }
  // A farewell travels beside the frames, so it cannot cut into one.
  [[nodiscard]] bool begin_frame() override { return !closed_.load(std::memory_order_acquire); }
  void end_frame() override {}
  [[nodiscard]] int fd() const override { return channel_->fd(); }
  [[nodiscard]] short events(bool, bool) const override { return channel_->events(false, false); }
  [[nodiscard]] int wake_fd() const override { return worker_->wake_fd(); }
  [[nodiscard]] bool prepare_sleep() override { return worker_->arm(); }

  Peer look(Farewell* farewell) override {
    if (endpoint_ != nullptr) worker_->progress();
    const Peer peer = look_at_channel(farewell);
    // A peer that left may have taken what send_some() has not told yet.
    return peer == Peer::kLeft && staged_ > 0 && took_all() ? Peer::kAlive : peer;
  }

  void farewell(const FarewellFrame& frame) noexcept override {
    if (!closed_.exchange(true, std::memory_order_acq_rel)) {
      Account account;
      account.sent = sent_.load(std::memory_order_acquire);
      account.received = received_.load(std::memory_order_acquire);
      const iovec run{&account, sizeof account};
      (void)channel_->send_some({&run, 1});
    }
    channel_->farewell(frame);
  }

  [[nodiscard]] Link& channel() override { return *channel_; }

  // Takes over what came for this link, before a failure of the endpoint can drop it.
  void collect() {
    while (endpoint_ != nullptr) {
      size_t size = 0;
      void* const data = ucx_.ucp_stream_recv_data_nb(endpoint_, &size);
      if (data == nullptr) return;
      if (UCS_PTR_IS_ERR(data)) return fail(UCS_PTR_STATUS(data));
      received_.fetch_add(size, std::memory_order_release);
      arrived_.push_back({data, size, 0});
    }
  }

 private:
  struct Chunk {
    std::vector<std::byte> bytes;
    int64_t size = 0;
    void* request = nullptr;  // null: gone
  };
  struct Arrived {
    void* data;
    size_t size;
    size_t taken;
  };

  static void on_error(void* self, ucp_ep_h, ucs_status_t status) {
    static_cast<Endpoint*>(self)->fail(status);
  }
  void fail(ucs_status_t status) {
    if (!failed_) failed_ = status;
  }
  // The request of a call that may end at once, else null.
  template <typename Call>
  void* start(Call call) {
    void* const request = call();
    if (!UCS_PTR_IS_ERR(request)) return request;
    fail(UCS_PTR_STATUS(request));
    return nullptr;
  }
  // True when it has ended; then it is freed.
  bool done(void** request) {
    if (*request == nullptr) return true;
    const ucs_status_t status = ucx_.ucp_request_check_status(*request);
    if (status == UCS_INPROGRESS) return false;
    if (status != UCS_OK) fail(status);
    ucx_.ucp_request_free(*request);
    *request = nullptr;
    return true;
  }

  // Hands UCX a copy of the bytes of `runs`, `total` in all, that follow the staged ones; at most a
  // chunk.
  void stage(std::span<const iovec> runs, int64_t total) {
    const int64_t left = total - staged_;
    const int64_t limit = std::min(
        kChunkBytes, total >= kTailFrom && left > kTailBytes ? left - kTailBytes : left);
    Chunk chunk;
    if (spare_.empty()) {
      chunk.bytes.resize(kChunkBytes);
    } else {
      chunk = std::move(spare_.back());
      spare_.pop_back();
      chunk.size = 0;
    }
    int64_t skip = staged_;
    for (const iovec& run : runs) {
      const auto length = static_cast<int64_t>(run.iov_len);
      const int64_t begin = std::min(skip, length);
      skip -= begin;
      const int64_t count = std::min(length - begin, limit - chunk.size);
      std::memcpy(chunk.bytes.data() + chunk.size,
                  static_cast<const std::byte*>(run.iov_base) + begin, static_cast<size_t>(count));
      chunk.size += count;
      if (chunk.size == limit) break;
    }
    staged_ += chunk.size;
    sent_.fetch_add(static_cast<uint64_t>(chunk.size), std::memory_order_release);
    chunk.request = start([&] {
      return ucx_.ucp_stream_send_nbx(endpoint_, chunk.bytes.data(),
                                      static_cast<size_t>(chunk.size), &plain_);
    });
    chunks_.push_back(std::move(chunk));
  }

  // Bytes of the staged ones that need no more care, in order.
  int64_t reap() {
    int64_t gone = 0;
    while (!chunks_.empty() && done(&chunks_.front().request)) {
      gone += chunks_.front().size;
      spare_.push_back(std::move(chunks_.front()));
      chunks_.pop_front();
    }
    staged_ -= gone;
    return gone;
  }

  // After a failure: `total` if the peer had all of it before it left, else -1.
  int64_t settle(int64_t total) {
    if (staged_ < total || !took_all()) return -1;
    staged_ = 0;
    return total;
  }

  Peer channel_says(Farewell* farewell) {
    Peer peer = channel_->look(farewell);
    if (peer != Peer::kAlive || !failed_) return peer;
    if (!waited_) {  // a peer that closes its endpoint says why, on the channel
      waited_ = true;
      pollfd entry{channel_->fd(), channel_->events(false, false), 0};
      (void)::poll(&entry, 1, kEvidenceMs);
      peer = channel_->look(farewell);
    }
    return peer == Peer::kAlive ? Peer::kGone : peer;
  }
  Peer look_at_channel(Farewell* farewell) {
    const Peer peer = channel_says(farewell);
    peer_ended_ = peer_ended_ || peer != Peer::kAlive;
    return peer;
  }

  // What the peer said when it left; null while it has not left.
  const Account* parting() {
    if (parting_) return &*parting_;
    Farewell farewell;
    if (look_at_channel(&farewell) != Peer::kLeft) return nullptr;
    arrival_ = Deadline::in(kArrival);
    Account account;
    const iovec run{&account, sizeof account};
    const bool whole = channel_->recv_some({&run, 1}) == sizeof account;
    parting_ = whole && account.magic == Account{}.magic ? account : Account{};
    return &*parting_;
  }
  bool took_all() {
    const Account* const said = parting();
    return said != nullptr && said->received == sent_.load(std::memory_order_relaxed);
  }

  // Whether the peer has ended, and nothing more can come. Asks the channel once in a while.
  bool ended() {
    const int64_t now = now_ns();
    if (now - looked_ns_ < kLookEveryNs) return false;
    looked_ns_ = now;
    Farewell farewell;
    const Peer peer = look_at_channel(&farewell);
    if (peer != Peer::kLeft) return peer != Peer::kAlive;
    return received_.load(std::memory_order_relaxed) >= parting()->sent || arrival_.passed();
  }

  // By force, since a close in order asks the peer, who may be long busy with something else. What UCX
  // still holds goes out first.
  void close() {
    worker_->progress();
    if (!failed_ && !peer_ended_) {
      void* flush = start([&] { return ucx_.ucp_ep_flush_nbx(endpoint_, &plain_); });
      const Deadline deadline = Deadline::in(kFlushing);
      while (!done(&flush) && !failed_ && !deadline.passed()) worker_->progress();
      if (flush != nullptr) ucx_.ucp_request_free(flush);
    }
    for (const Arrived& one : arrived_) ucx_.ucp_stream_data_release(endpoint_, one.data);
    arrived_.clear();
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    // From here on nothing is collected.
    void* closing = ucx_.ucp_ep_close_nbx(std::exchange(endpoint_, nullptr), &param);
    if (UCS_PTR_IS_ERR(closing)) closing = nullptr;
    const Deadline deadline = Deadline::in(kClosing);
    const auto all_done = [&] {
      bool all = done(&closing);
      for (Chunk& chunk : chunks_) all = done(&chunk.request) && all;
      return all;
    };
    while (!all_done() && !deadline.passed()) worker_->progress();
  }

  std::shared_ptr<Worker> worker_;
  const Ucx& ucx_;
  std::unique_ptr<Link> channel_;
  ucp_ep_h endpoint_ = nullptr;
  const ucp_request_param_t plain_{};
  std::optional<ucs_status_t> failed_;
  std::atomic<bool> closed_{false};

  std::deque<Chunk> chunks_;   // handed to UCX, in order
  std::vector<Chunk> spare_;
  int64_t staged_ = 0;         // bytes of the caller's runs that UCX has and that were not reported
  std::atomic<uint64_t> sent_{0};

  std::deque<Arrived> arrived_;
  std::atomic<uint64_t> received_{0};
  int64_t looked_ns_ = 0;
  bool waited_ = false;
  bool peer_ended_ = false;
  std::optional<Account> parting_;
  Deadline arrival_ = Deadline::in(kArrival);  // with parting_: what was sent must be here by then
};

void Worker::progress() {
  armed_ = false;
  ucx.ucp_worker_progress(worker_);
  for (Endpoint* link : links) link->collect();
}

std::unique_ptr<UcxLink> Worker::link(std::unique_ptr<Link> channel) {
  return std::make_unique<Endpoint>(shared_from_this(), std::move(channel));
}

}  // namespace

std::string ucx_problem() { return Ucx().problem; }

std::string ucx_version_text(const std::array<uint32_t, 3>& version) {
  return fmt::format("{}.{}.{}", version[0], version[1], version[2]);
}

std::shared_ptr<UcxWorker> UcxWorker::open(const std::string& data_address) {
  return std::make_shared<Worker>(data_address);
}

}  // namespace phalanx::comm
