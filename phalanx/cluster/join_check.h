#pragma once

// Pure decisions of a join, the same on both ends and tested without a network.

#include <string>
#include <vector>

#include "phalanx/cluster/control.h"

namespace phalanx::cluster {

// `facts`, preceded by those that the control plane adds itself: its version and the digest of the
// rank table (unless given).
[[nodiscard]] JoinFacts all_facts(const ControlOptions& options);

// The rows that differ, as a table of name, master's value, node's value; empty if all agree. A
// fact that one side lacks shows as "-".
[[nodiscard]] std::string mismatch_table(const JoinFacts& master, const JoinFacts& node,
                                         const std::string& master_name,
                                         const std::string& node_name);

// The strongest class that every node offers, by the order of the first (the master's). Empty when
// no node offers any. Throws Error(kFailedPrecondition) with every node's classes if none is
// common.
[[nodiscard]] std::string common_numeric_class(const std::vector<std::string>& names,
                                               const std::vector<NodeOffer>& offers);

// Each node's best class: "10.0.0.1 bf16dp, 10.0.0.2 fma32"; and whether they are all equal.
struct BestClasses {
  std::string text;
  bool equal = true;
};
[[nodiscard]] BestClasses best_classes(const std::vector<std::string>& names,
                                       const std::vector<NodeOffer>& offers);

// Text from the network, made fit for a log line: control characters replaced, length bounded.
[[nodiscard]] std::string printable(const std::string& text, size_t max_bytes = 4000);

// An error code from the network.
[[nodiscard]] Code code_of(int value);

// Codes with which a rank reports that a peer vanished, rather than a fault of its own.
[[nodiscard]] bool may_be_symptom(Code code);

// Milliseconds since 1970 by the clock of `options`.
[[nodiscard]] int64_t unix_ms(const ControlOptions& options);
// A row for mismatch_table() on each side when two clocks differ by more than options allow.
void add_clocks(const ControlOptions& options, int64_t own_ms, int64_t other_ms, JoinFacts& own,
                JoinFacts& other);

}  // namespace phalanx::cluster
