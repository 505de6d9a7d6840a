#include "phalanx/engine/draft_order.h"

#include <fmt/format.h>

#include <cstring>

#include "phalanx/base/error.h"

namespace phalanx::engine {

namespace {

StepLimits limits_of_order(const StepLimits& limits) {
  StepLimits own = limits;
  own.max_rows = limits.draft_sequences;
  return own;
}

[[noreturn]] void refuse(std::string_view field, int64_t found, int64_t expected) {
  throw Error(Code::kDataLoss,
              fmt::format("draft order: {} is {}, expected {}", field, found, expected));
}

void expect_equal(std::string_view field, int64_t found, int64_t expected) {
  if (found != expected) refuse(field, found, expected);
}

}  // namespace

void DraftOrderWriter::begin(uint64_t generation, uint64_t step) {
  plan_.begin(StepKind::kCompute, generation, step);
  wants_.clear();
  any_ = false;
}

void DraftOrderWriter::add(std::span<const int32_t> tokens, int32_t context,
                           std::span<const int32_t> block_table, int32_t block_size,
                           int32_t sequence, int32_t count) {
  plan_.add_sequence(tokens, context, block_table, block_size, count > 0);
  if (count > 0) wants_.push_back({.sequence = sequence, .count = count});
  any_ = true;
}

std::span<const std::byte> DraftOrderWriter::finish() {
  if (!any_) return {};
  const std::span<const std::byte> plan = plan_.finish();
  buffer_.assign(plan.begin(), plan.end());
  const std::span<const std::byte> wants = std::as_bytes(std::span<const DraftWant>(wants_));
  buffer_.insert(buffer_.end(), wants.begin(), wants.end());
  return buffer_;
}

int64_t max_draft_order_bytes(const StepLimits& limits) {
  if (limits.draft_sequences == 0) return 0;
  return limits_of_order(limits).max_plan_bytes() +
         limits.draft_sequences * static_cast<int64_t>(sizeof(DraftWant));
}

void DraftOrderView::decode(std::span<const std::byte> buffer, const StepPlanView& plan,
                            const StepLimits& limits) {
  wants_ = {};
  StepPlanHeader header;
  const auto size = static_cast<int64_t>(buffer.size());
  if (buffer.size() < sizeof(header)) refuse("length", size, sizeof(header));
  std::memcpy(&header, buffer.data(), sizeof(header));
  expect_equal("length", size,
               int64_t{header.bytes} + int64_t{header.num_rows} * int64_t{sizeof(DraftWant)});
  view_.decode(buffer.first(header.bytes), limits_of_order(limits));
  expect_equal("generation", static_cast<int64_t>(header.generation),
               static_cast<int64_t>(plan.header().generation));
  expect_equal("step", static_cast<int64_t>(header.step), static_cast<int64_t>(plan.header().step));
  const std::span<const DraftWant> wants(
      reinterpret_cast<const DraftWant*>(buffer.data() + header.bytes), header.num_rows);
  size_t row = 0;
  int64_t next = 0;  // sequence of the step plan that a want may name
  for (const PlannedSequence& own : view_.sequences()) {
    if (row == wants.size()) break;
    const int32_t last = own.token_begin + own.token_count - 1;
    if (view_.inputs().sample_rows[row] > last) continue;
    expect_equal("row", view_.inputs().sample_rows[row], last);
    const DraftWant& want = wants[row++];
    if (want.sequence < next || want.sequence >= std::ssize(plan.sequences()))
      refuse("sequence", want.sequence, next);
    next = int64_t{want.sequence} + 1;
    const PlannedSequence& target = plan.sequences()[static_cast<size_t>(want.sequence)];
    if (want.count < 1 || want.count >= target.token_count)
      refuse("count", want.count, int64_t{target.token_count} - 1);
    expect_equal("context", int64_t{own.context} + want.count, target.context);
  }
  wants_ = wants;
}

}  // namespace phalanx::engine
