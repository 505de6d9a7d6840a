#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/engine/adapter_order.h"

namespace phalanx::engine {

// The LoRA adapters of an engine: their slots in the ranks, who uses them, what the ranks must be
// told next. At most one is being read at a time. Not thread-safe.
class AdapterTable {
 public:
  // nullopt: it may be used. Called once.
  using Done = std::function<void(const std::optional<Error>&)>;
  explicit AdapterTable(int64_t slots) : slots_(slots) {}

  // Takes a slot; the ranks are told later. Throws Error(kFailedPrecondition) where there are no
  // slots, kAlreadyExists, or kResourceExhausted.
  void add(const std::string& name, const std::string& path, Done done);
  // New requests cannot use it from now on; the slot is free after the last that does. Throws
  // Error(kNotFound), or kFailedPrecondition while it is being loaded.
  void remove(std::string_view name);

  struct Found {
    uint64_t id = 0;  // never used again
    int32_t slot = -1;
  };
  // One that may be used.
  [[nodiscard]] std::optional<Found> find(std::string_view name) const;
  void acquire(uint64_t id);
  void release(uint64_t id);
  struct Named {
    std::string name;
    std::string path;
  };
  [[nodiscard]] std::vector<Named> usable() const;

  // What the ranks are to be told now, if anything.
  struct Order {
    AdapterAct act = AdapterAct::kSettle;
    uint32_t slot = 0;
    std::string path;  // with kRead
  };
  [[nodiscard]] std::optional<Order> next() const;
  // The ranks were told. verdict: of kSettle. Returns what `done` is to be called with, outside any
  // lock, and whose requests have to end because the adapter could not be read again.
  struct Outcome {
    Done done;
    std::optional<Error> error;
    uint64_t lost = 0;  // id, 0: none
    std::string name;   // of it
  };
  [[nodiscard]] Outcome told(const Order& order, const AdapterVerdict& verdict);

  // The ranks are new: they have to read everything again before they compute anything.
  void restart();
  [[nodiscard]] bool restoring() const;
  // Nothing will be read any more.
  [[nodiscard]] std::vector<Done> abandon();

 private:
  enum class State {
    kWanted,   // no rank was told yet
    kReading,
    kReady,    // the ranks have it
  };
  struct Entry {
    uint64_t id = 0;
    std::string name;
    std::string path;
    int32_t slot = -1;
    State state = State::kWanted;
    bool restore = false;  // was ready before
    bool leaving = false;
    int64_t users = 0;
    Done done;
  };
  Entry* by_id(uint64_t id);

  int64_t slots_;
  uint64_t last_id_ = 0;
  std::vector<Entry> entries_;  // as they came
};

}  // namespace phalanx::engine
