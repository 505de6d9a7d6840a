#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"

namespace phalanx::cluster {

struct Device {
  int device_id = 0;
  std::string device_ip;   // may be empty: taken from container_ip
  int rank_id = 0;         // -1 on a spare server
  double weight = 1.0;     // "weight": share of the model; default 1
  bool auto_weight = false;  // "weight": "auto": decided at the start, see seating.h
};

// One entry of server_list.
struct Server {
  std::string server_id;
  std::string container_ip;  // = server_id where the file gives none
  std::vector<Device> devices;  // by rank_id
  bool spare = false;           // holds no ranks until it takes over those of a lost server
  // container_ip, else server_id.
  [[nodiscard]] const std::string& address() const {
    return container_ip.empty() ? server_id : container_ip;
  }
};

// Any number of servers and devices, equal or not; ranks 0..N-1, each once. A spare's devices have no
// rank and need not be given; they lend their device_ip to the ranks that it takes over.
struct RankTable {
  std::vector<Server> servers;     // in file order
  int world_size = 0;              // without spares
  std::vector<std::string> notes;  // what was accepted with a remark ("server_count is a number")

  [[nodiscard]] int master() const;                 // index of the server that holds rank 0
  [[nodiscard]] int server_of_rank(int rank) const;
  [[nodiscard]] const Device& device_of_rank(int rank) const;
  [[nodiscard]] bool has_auto_weights() const;
  // Of the canonical content (not of the bytes), for comparison at a join.
  [[nodiscard]] std::string digest() const;
};

// Parses and validates the whole table, forms A and B. `where` is the file's name for messages.
// Throws Error(kInvalidArgument) with all problems.
[[nodiscard]] RankTable parse_rank_table(std::string_view text, const std::string& where);
// Admission rules of the file (owner, mode, link, size), then parse.
[[nodiscard]] RankTable load_rank_table(const std::string& path);

// The entry of this node (ranktable-and-env.md §5): container_ip equals own_container_ip or
// server_id equals own_host_ip. Throws Error naming own addresses and those of the table.
[[nodiscard]] int find_own_server(const RankTable& table, const std::string& own_container_ip,
                                  const std::string& own_host_ip, const std::string& where);

// Form B as JSON text, for `phalanx ranktable make`.
[[nodiscard]] std::string to_json(const RankTable& table);

}  // namespace phalanx::cluster
