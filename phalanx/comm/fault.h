#pragma once

#include <string>

#include "phalanx/base/error.h"

namespace phalanx::comm {

// Why a group ends, in the words that every rank repeats.
struct Fault {
  Code code = Code::kUnavailable;
  int culprit = -1;  // rank at fault, -1 if unknown
  std::string text;
};

// Thrown inside the room; the group passes it on to its peers and to the caller.
class FaultError : public Error {
 public:
  explicit FaultError(Fault fault) : Error(fault.code, fault.text), fault_(std::move(fault)) {}
  [[nodiscard]] const Fault& fault() const { return fault_; }

 private:
  Fault fault_;
};

// What a wait asks while it sleeps.
class Watch {
 public:
  virtual ~Watch() = default;
  // Cheap, for spinning: has anybody on this node aborted the group?
  [[nodiscard]] virtual bool aborted() const = 0;
  // Throws FaultError if the group was aborted, a peer is lost or the operation's cap has passed.
  // `awaited` is the rank waited for (one of them), -1 if none.
  virtual void check(int awaited) = 0;
  // Throws FaultError if something on this node explains why a peer elsewhere is gone.
  virtual void explain_loss() = 0;
};

}  // namespace phalanx::comm
