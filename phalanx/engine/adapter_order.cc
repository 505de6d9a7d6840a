#include "phalanx/engine/adapter_order.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "phalanx/base/error.h"

namespace phalanx::engine {

AdapterVerdict judge(std::span<const AdapterReport> reports, std::span<const std::string> places) {
  AdapterVerdict verdict;
  const auto place = [&](size_t rank) {
    return rank < places.size() ? places[rank] : fmt::format("rank {}", rank);
  };
  const auto digest = [](const AdapterReport& report) {
    return std::string_view(report.digest.data(), report.digest.size());
  };
  for (const AdapterReport& report : reports)
    verdict.pending |=
        report.state != AdapterReport::kRead && report.state != AdapterReport::kFailed;
  if (verdict.pending) return verdict;
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    const AdapterReport& report = reports[rank];
    if (report.state != AdapterReport::kFailed) continue;
    const size_t length = ::strnlen(report.message.data(), report.message.size());
    verdict.error =
        fmt::format("{}: {}", place(rank), std::string_view(report.message.data(), length));
    return verdict;
  }
  for (size_t rank = 1; rank < reports.size(); ++rank) {
    if (digest(reports[rank]) == digest(reports[0])) continue;
    verdict.error = fmt::format(
        "the adapter's files differ between nodes: found digest {} at {}, expected {} as at {}. "
        "Fix: "
        "copy the same adapter to that path on every node",
        digest(reports[rank]).substr(0, 16), place(rank), digest(reports[0]).substr(0, 16),
        place(0));
    return verdict;
  }
  return verdict;
}

struct AdapterLoader::Reading {
  std::atomic<bool> done{false};
  // Read only when done.
  std::unique_ptr<models::Adapter> adapter;
  std::string error;
};

AdapterLoader::~AdapterLoader() {
  if (thread_.joinable()) thread_.join();
}

void AdapterLoader::begin(uint32_t slot, std::string path) {
  if (thread_.joinable()) thread_.join();
  slot_ = slot;
  reading_ = std::make_shared<Reading>();
  thread_ = std::thread([reading = reading_, path = std::move(path), &model = model_] {
    try {
      reading->adapter = model.read_adapter(path);
    } catch (const std::exception& error) {
      reading->error = error.what();
    }
    reading->done.store(true, std::memory_order_release);
  });
}

AdapterReport AdapterLoader::report() const {
  AdapterReport report{.state = AdapterReport::kFailed};
  const auto say = [&](std::string_view text) {
    std::memcpy(report.message.data(), text.data(),
                std::min(text.size(), report.message.size() - 1));
  };
  if (reading_ == nullptr) {
    say("no adapter was being read");
  } else if (!reading_->done.load(std::memory_order_acquire)) {
    report.state = AdapterReport::kReading;
  } else if (reading_->adapter == nullptr) {
    say(reading_->error);
  } else {
    report.state = AdapterReport::kRead;
    const std::string& digest = reading_->adapter->digest();
    std::memcpy(report.digest.data(), digest.data(), std::min(digest.size(), report.digest.size()));
  }
  return report;
}

void AdapterLoader::settle(std::span<const AdapterReport> reports) {
  const AdapterVerdict verdict = judge(reports);
  if (verdict.pending) return;
  if (!verdict.error) model_.set_adapter(slot_, std::move(reading_->adapter));
  reading_.reset();
  thread_.join();
}

}  // namespace phalanx::engine
