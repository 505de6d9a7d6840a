#include "phalanx/engine/adapter_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "phalanx/base/check.h"

namespace phalanx::engine {

void AdapterTable::add(const std::string& name, const std::string& path, Done done) {
  if (slots_ == 0)
    throw Error(
        Code::kFailedPrecondition,
        "LoRA adapters are not enabled: maxLoras is 0. Fix: set maxLoras (and maxLoraRank) in "
        "ModelDeployConfig, or start with --max-loras, and start again");
  const auto known = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& e) { return e.name == name && !e.leaving; });
  if (known != entries_.end())
    throw Error(
        Code::kAlreadyExists,
        fmt::format("the LoRA adapter '{}' is {} already, from {}. Fix: unload it first, or "
                    "use another name",
                    name, known->state == State::kReady ? "loaded" : "being loaded", known->path));
  if (std::ssize(entries_) >= slots_) {
    std::string holders;
    for (const Entry& e : entries_)
      holders += fmt::format(
          "{}{}{}", holders.empty() ? "" : ", ", e.name,
          e.leaving ? fmt::format(" (unloaded, {} requests still use it)", e.users) : "");
    throw Error(
        Code::kResourceExhausted,
        fmt::format("no room for the LoRA adapter '{}': all {} slots are taken (maxLoras) by "
                    "{}. Fix: unload one, or raise maxLoras",
                    name, slots_, holders));
  }
  int32_t slot = 0;
  while (
      std::any_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.slot == slot; }))
    ++slot;
  entries_.push_back(
      {.id = ++last_id_, .name = name, .path = path, .slot = slot, .done = std::move(done)});
}

void AdapterTable::remove(std::string_view name) {
  const auto at = std::find_if(entries_.begin(), entries_.end(),
                               [&](const Entry& e) { return e.name == name && !e.leaving; });
  if (at == entries_.end())
    throw Error(Code::kNotFound, fmt::format("the LoRA adapter '{}' is not loaded", name));
  if (at->state != State::kReady && !at->restore)
    throw Error(
        Code::kFailedPrecondition,
        fmt::format("the LoRA adapter '{}' is being loaded. Fix: unload it afterwards", name));
  at->leaving = true;
}

std::optional<AdapterTable::Found> AdapterTable::find(std::string_view name) const {
  for (const Entry& e : entries_)
    if (e.name == name && !e.leaving && (e.state == State::kReady || e.restore))
      return Found{.id = e.id, .slot = e.slot};
  return std::nullopt;
}

std::vector<AdapterTable::Named> AdapterTable::usable() const {
  std::vector<Named> result;
  for (const Entry& e : entries_)
    if (!e.leaving && (e.state == State::kReady || e.restore)) result.push_back({e.name, e.path});
  return result;
}

AdapterTable::Entry* AdapterTable::by_id(uint64_t id) {
  const auto at =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.id == id; });
  return at == entries_.end() ? nullptr : &*at;
}

void AdapterTable::acquire(uint64_t id) {
  Entry* entry = by_id(id);
  PHALANX_CHECK(entry != nullptr);
  ++entry->users;
}

void AdapterTable::release(uint64_t id) {
  // One that could not be read again is gone before its last request.
  if (Entry* entry = by_id(id)) --entry->users;
}

std::optional<AdapterTable::Order> AdapterTable::next() const {
  for (const Entry& e : entries_)
    if (e.state == State::kReading)
      return Order{.act = AdapterAct::kSettle, .slot = static_cast<uint32_t>(e.slot), .path = {}};
  for (const Entry& e : entries_)
    if (e.leaving && e.users == 0 && e.state == State::kReady)
      return Order{.act = AdapterAct::kDrop, .slot = static_cast<uint32_t>(e.slot), .path = {}};
  for (const Entry& e : entries_)
    if (e.state == State::kWanted)
      return Order{.act = AdapterAct::kRead, .slot = static_cast<uint32_t>(e.slot), .path = e.path};
  return std::nullopt;
}

AdapterTable::Outcome AdapterTable::told(const Order& order, const AdapterVerdict& verdict) {
  const auto at = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) {
    return e.slot == static_cast<int32_t>(order.slot);
  });
  PHALANX_CHECK(at != entries_.end());
  Outcome outcome;
  switch (order.act) {
    case AdapterAct::kRead:
      at->state = State::kReading;
      return outcome;
    case AdapterAct::kDrop:
      entries_.erase(at);
      return outcome;
    case AdapterAct::kSettle:
      break;
  }
  if (verdict.pending) return outcome;
  outcome.done = std::exchange(at->done, nullptr);
  outcome.name = at->name;
  if (verdict.error) {
    outcome.error = Error(Code::kInvalidArgument, *verdict.error);
    if (at->restore) outcome.lost = at->id;
    entries_.erase(at);
    return outcome;
  }
  at->state = State::kReady;
  at->restore = false;
  return outcome;
}

void AdapterTable::restart() {
  std::erase_if(entries_, [](const Entry& e) { return e.leaving && e.users == 0; });
  for (Entry& e : entries_) {
    e.restore = e.restore || e.state == State::kReady;
    e.state = State::kWanted;
  }
  // Those with requests first; what is new waits.
  std::stable_partition(entries_.begin(), entries_.end(), [](const Entry& e) { return e.restore; });
}

bool AdapterTable::restoring() const {
  return std::any_of(entries_.begin(), entries_.end(), [](const Entry& e) { return e.restore; });
}

std::vector<AdapterTable::Done> AdapterTable::abandon() {
  std::vector<Done> waiting;
  for (Entry& e : entries_)
    if (e.done) waiting.push_back(std::exchange(e.done, nullptr));
  entries_.clear();
  return waiting;
}

}  // namespace phalanx::engine
