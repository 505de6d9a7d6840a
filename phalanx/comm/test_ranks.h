#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/shm/node_memory.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::comm {

// For tests: ranks as threads, each with its own listener on 127.0.0.(1 + node).
class TestRanks {
 public:
  // node_of[r]: the node of rank r.
  // Small slots, so that messages of some size go in pieces.
  explicit TestRanks(std::vector<int> node_of, int64_t slot_bytes = 256 << 10)
      : node_of_(node_of) {
    int nodes = 0;
    for (const int node : node_of) nodes = std::max(nodes, node + 1);
    memories_.resize(nodes);
    for (int node = 0; node < nodes; ++node) {
      const auto count = std::count(node_of.begin(), node_of.end(), node);
      if (count > 1) memories_[node] = NodeMemory::create(static_cast<int>(count), slot_bytes);
    }
    options_.generation = 7;
    options_.connect_seconds = 20;
    options_.operation_seconds = 20;
    for (size_t i = 0; i < options_.token.size(); ++i)
      options_.token[i] = static_cast<std::byte>(i * 37 + 11);
    for (size_t rank = 0; rank < node_of.size(); ++rank) {
      Member member;
      member.rank = static_cast<int>(rank);
      member.node = node_of[rank];
      member.host = fmt::format("host-{}", static_cast<char>('a' + node_of[rank]));
      member.data_address = fmt::format("127.0.0.{}", 1 + node_of[rank]);
      listeners_.push_back(listen_on(member.data_address, 0, 0, &member.data_port));
      options_.members.push_back(member);
    }
  }

  [[nodiscard]] int size() const { return static_cast<int>(node_of_.size()); }
  [[nodiscard]] GroupOptions options(int rank) const {
    GroupOptions options = options_;
    options.rank = rank;
    return options;
  }
  GroupOptions& shared_options() { return options_; }
  // Links under TLS, with a certificate for all nodes' addresses; `tls` is kept by options().
  void encrypt(std::shared_ptr<const net::TlsMaterial> tls) { options_.tls = std::move(tls); }
  [[nodiscard]] int listener(int rank) const { return listeners_[rank].get(); }
  [[nodiscard]] int memory(int rank) const { return memories_[node_of_[rank]].get(); }

  [[nodiscard]] std::unique_ptr<Group> form(int rank) const {
    return form_group(options(rank), listener(rank), memory(rank));
  }

  struct Outcome {
    std::optional<Error> error;
    double seconds = 0;  // from the start of the body to its end
    Clock::time_point end;
  };

  // Forms the group on every rank and runs body(group) there. Returns what each rank threw.
  std::vector<Outcome> run(const std::function<void(Group&)>& body) const {
    return run_with([&](int rank) {
      const auto group = form(rank);
      body(*group);
    });
  }

  std::vector<Outcome> run_with(const std::function<void(int rank)>& body) const {
    std::vector<Outcome> outcomes(size());
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < size(); ++rank)
      threads.emplace_back([&, rank] {
        const auto start = Clock::now();
        try {
          body(rank);
        } catch (const Error& error) {
          outcomes[rank].error = error;
        }
        outcomes[rank].end = Clock::now();
        outcomes[rank].seconds = std::chrono::duration<double>(outcomes[rank].end - start).count();
      });
    threads.clear();
    return outcomes;
  }

 private:
  std::vector<int> node_of_;
  std::vector<UniqueFd> memories_, listeners_;
  GroupOptions options_;
};

}  // namespace phalanx::comm
