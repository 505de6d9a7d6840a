#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/comm/group.h"

namespace phalanx::net {
class TlsMaterial;
}

namespace phalanx::comm {

// Where a rank of the group lives and how it is reached.
struct Member {
  int rank = 0;
  int node = 0;               // index of its node; ranks of one node share memory
  std::string host;           // for messages
  std::string data_address;   // numeric address its listener is bound to
  uint16_t data_port = 0;
};

using Token = std::array<std::byte, 32>;  // one-time, from the control plane
// A new one, of the system's random numbers.
[[nodiscard]] Token random_token();

// What carries the bytes between nodes once a link has proved itself.
enum class Transport {
  kTcp,  // in clear or under TLS
  kUcx,  // always in clear, and UCX takes orders from whoever reaches its port: closed networks only
};

// Why this process cannot have links over UCX, with how to mend it; "" when it can. Loads UCX.
[[nodiscard]] std::string ucx_problem();
// What UCX reads when it is loaded, set where the environment does not. Changes the environment: to be
// called while there is one thread.
void prepare_environment_for_ucx();

struct GroupOptions {
  std::vector<Member> members;     // by rank
  int rank = 0;                    // own rank
  uint64_t generation = 0;         // in every hello and frame
  Token token{};                   // checked before any frame is parsed
  // Links between nodes run under TLS 1.3: each side shows this certificate, and the peer's must
  // name its data_address and, if it names a role, an inter-node one. Null: links in the clear.
  std::shared_ptr<const net::TlsMaterial> tls;
  // kUcx: `tls` protects the proof, the exchange of addresses and farewells, not the payload.
  Transport transport = Transport::kTcp;
  double connect_seconds = 120;    // forming the group
  double operation_seconds = 120;  // cap for one collective
  // Asked at least every 100 ms while the group forms: why to give up, or "". Null: never.
  std::function<std::string()> abandoned;
  int spin_us = 50;                // then futex or poll
};

// A listening socket on `address`, the port chosen by the system or the first free one of
// [port_begin, port_end] if port_end > 0. Throws Error(kUnavailable) naming address, ports, errno
// and the machine's own addresses. `port` receives the choice. CLOEXEC.
[[nodiscard]] UniqueFd listen_on(const std::string& address, uint16_t port_begin,
                                 uint16_t port_end, uint16_t* port);

// Shared memory for the ranks of one node: created by the supervisor, handed down by descriptor.
// A sealed memfd; nothing appears in /dev/shm.
[[nodiscard]] UniqueFd create_node_memory(int local_ranks);

// Connects this rank to all others: shared memory within the node (node_memory, may be -1 when it
// is alone on its node), TCP or UCX between nodes (listener, may be -1 when there is one node), and
// runs a self-test. Blocks up to connect_seconds; throws Error naming who is missing.
// `local_index` is this rank's place among the ranks of its node, in rank order.
[[nodiscard]] std::unique_ptr<Group> form_group(const GroupOptions& options, int listener,
                                                int node_memory);

// A group of one.
[[nodiscard]] std::unique_ptr<Group> single_group();

}  // namespace phalanx::comm
