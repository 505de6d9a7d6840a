#pragma once

#include <memory>
#include <string>
#include <vector>

#include "apps/doctor_node.h"

namespace phalanx::apps {

// Answers the doctors of the other nodes: holds the doctor's, the control and the data ports of this
// node's address, and measures links when it is asked to. Connections and datagrams from addresses
// outside the rank table are dropped; it connects to addresses of the rank table only. Threads of
// its own; bounded numbers of connections and bytes, every read has a deadline.
class DoctorListener {
 public:
  // Throws Error(kUnavailable) if the doctor's own port cannot be had; other ports that cannot are
  // reported as taken.
  explicit DoctorListener(const DoctorOptions& options);
  ~DoctorListener();

  [[nodiscard]] const std::vector<DoctorPort>& ports() const;
  // Sources outside the rank table that were turned away.
  [[nodiscard]] int64_t strangers() const;
  [[nodiscard]] int64_t sessions() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::apps
