#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <poll.h>

#include "phalanx/comm/fault.h"
#include "phalanx/comm/frame.h"
#include "phalanx/comm/link.h"
#include "phalanx/comm/region.h"

namespace phalanx::comm {

// Moves one message to and one from each of several peers at once. All waiting on links happens
// here: spin, then poll all links, so that a lost peer is noticed whoever is waited for.
// One thread; abort() and farewells from any.
class Exchange {
 public:
  struct Stats {
    uint64_t bytes_sent = 0;
    uint64_t bytes_received = 0;
    uint64_t wait_ns = 0;
  };

  // `links` by rank, null where there is none. `names` by rank, for messages. `watch` must
  // outlive this.
  Exchange(std::vector<std::unique_ptr<Link>> links, std::vector<std::string> names, int rank,
           uint64_t generation, int spin_us, Watch* watch);

  // Names the operation of the messages that follow.
  void begin(Operation operation, uint64_t sequence);
  // At most one of each per peer until run(). Nothing is sent for zero bytes.
  void send(int peer, std::span<const Region> regions);
  void recv(int peer, std::span<const Region> regions);
  // For messages that carry nothing but their arrival.
  void send_signal(int peer);
  void recv_signal(int peer);
  // Until all are done. Throws FaultError.
  void run();

  // Throws FaultError if a peer is gone. For waits that happen elsewhere.
  void look_at_peers();
  // Any thread.
  void farewell(const FarewellFrame& frame) noexcept;
  [[nodiscard]] const Stats& stats() const { return stats_; }
  [[nodiscard]] bool has_links() const { return has_links_; }
  // For another transport to take over; this exchanges nothing any more.
  [[nodiscard]] std::vector<std::unique_ptr<Link>> take_links() { return std::exchange(links_, {}); }

 private:
  struct Message {
    bool active = false;
    FrameHeader header;          // to send, or expected
    FrameHeader received;
    int64_t header_done = 0;     // bytes of the header that were moved
    std::vector<Region> regions;
    RegionCursor cursor;
  };

  void start(Message* message, std::vector<int>* list, int peer, std::span<const Region> regions,
             int sender);
  bool push(int peer);  // true if bytes moved
  bool pull(int peer);
  void check_header(int peer, Message& message);
  void sleep();
  // Throws FaultError if the network to a peer is cut. Cheap; asks four times a second at most.
  void look_for_silence();
  [[noreturn]] void lost(int peer);
  [[noreturn]] void lost_after(int peer, const Farewell& farewell, const std::string& why);

  std::vector<std::unique_ptr<Link>> links_;
  std::vector<std::string> names_;
  int rank_;
  uint64_t generation_;
  int64_t spin_ns_;
  Watch* watch_;
  bool has_links_ = false;

  Operation operation_ = Operation::kBarrier;
  uint64_t sequence_ = 0;
  std::vector<Message> outgoing_, incoming_;  // by rank
  std::vector<int> sending_, receiving_;      // ranks with an active message
  int64_t listened_ns_ = 0;                   // look_for_silence()
  std::vector<bool> ignored_;                 // by rank: left cleanly, or cannot be judged yet
  std::vector<pollfd> polled_;
  std::vector<int> polled_ranks_;
  Stats stats_;
};

}  // namespace phalanx::comm
