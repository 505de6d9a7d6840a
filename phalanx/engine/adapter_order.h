#pragma once

// What head and ranks say to each other about LoRA adapters, between the steps that compute. One
// is read beside the steps; all ranks take it into use with the same plan, or none does.

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>

#include "phalanx/models/model.h"

namespace phalanx::engine {

enum class AdapterAct : uint32_t {
  kRead = 1,    // every rank begins to read the adapter at `path`
  kSettle = 2,  // every rank says how far it is; once all have equal files the slot gets it
  kDrop = 3,    // the slot becomes empty
};

// The body of a plan of StepKind::kAdapter; `path_bytes` of path follow, filled up with zeros to a
// multiple of 4.
struct AdapterOrder {
  AdapterAct act = AdapterAct::kSettle;
  uint32_t slot = 0;
  uint32_t path_bytes = 0;  // kRead: 1 to kMostAdapterPath; else 0
  uint32_t reserved = 0;
};
static_assert(sizeof(AdapterOrder) == 16);
inline constexpr uint32_t kMostAdapterPath = 4096;

// How far a rank is: gathered by all ranks with kSettle, and left by rank 0 in the step channel.
struct AdapterReport {
  enum : uint32_t { kReading = 1, kRead = 2, kFailed = 3 };
  uint32_t state = 0;
  uint32_t reserved = 0;
  std::array<char, 64> digest{};     // with kRead; not terminated
  std::array<char, 1976> message{};  // with kFailed; terminated
};
static_assert(sizeof(AdapterReport) == 2048);

// What the reports of all ranks come to; the same for whoever reads them.
struct AdapterVerdict {
  bool pending = false;              // some still read
  std::optional<std::string> error;  // why the adapter is not taken; none and not pending: it is
};
// places: of the ranks, for messages ("rank 2 (node 10.0.0.2)"); missing ones are "rank N".
[[nodiscard]] AdapterVerdict judge(std::span<const AdapterReport> reports,
                                   std::span<const std::string> places = {});

// One rank's side. Used from the worker thread; reads on a thread of its own.
class AdapterLoader {
 public:
  explicit AdapterLoader(models::Model& model) : model_(model) {}
  ~AdapterLoader();  // waits for what is being read
  // What was read before and not settled is forgotten.
  void begin(uint32_t slot, std::string path);
  [[nodiscard]] AdapterReport report() const;
  // reports: of all ranks.
  void settle(std::span<const AdapterReport> reports);
  void drop(uint32_t slot) { model_.set_adapter(slot, nullptr); }

 private:
  struct Reading;
  models::Model& model_;
  uint32_t slot_ = 0;
  std::shared_ptr<Reading> reading_;
  std::thread thread_;
};

}  // namespace phalanx::engine
