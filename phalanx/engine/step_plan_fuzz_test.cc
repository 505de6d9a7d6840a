// Damaged step plans: read with every index inside its bounds, or refused. PHALANX_FUZZ_SECONDS;
// `make fuzz`.

#include <gtest/gtest.h>

#include <cstring>
#include <iostream>

#include "phalanx/base/error.h"
#include "phalanx/base/fuzz.h"
#include "phalanx/engine/draft_order.h"
#include "phalanx/engine/step_plan.h"

namespace phalanx::engine {
namespace {

TEST(StepPlanFuzz, ReadOrRefused) {
  constexpr StepLimits kLimits{.max_tokens = 64,
                               .max_rows = 16,
                               .max_sequence = 40,
                               .blocks = 32,
                               .block_size = 4,
                               .vocab_size = 100,
                               .max_adapters = 2};
  StepPlanWriter writer;
  std::vector<std::string> seeds;
  for (int sequences = 0; sequences < 4; ++sequences) {
    writer.begin(sequences == 0 ? StepKind::kIdle : StepKind::kCompute, 7, 3);
    for (int i = 0; i < sequences; ++i) {
      const std::vector<int32_t> tokens(static_cast<size_t>(i) * 3 + 1, 10 + i);
      const std::vector<int32_t> blocks{i, i + 8, i + 16};
      writer.add_sequence(tokens, 9 + i, blocks, 4, i != 1, 40u + static_cast<uint32_t>(i), i - 1);
    }
    const auto bytes = writer.finish();
    seeds.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  writer.begin(StepKind::kAdapter, 7, 3);
  writer.set_order(AdapterAct::kRead, 1, "/adapters/a");
  const auto order = writer.finish();
  seeds.emplace_back(reinterpret_cast<const char*>(order.data()), order.size());
  int64_t read = 0;
  const int64_t tried = fuzz(seeds, [&](const std::string& text, int64_t number) {
    SCOPED_TRACE(number);
    std::vector<uint32_t> aligned(text.size() / 4 + 1);  // never empty: memcpy wants an address
    std::memcpy(aligned.data(), text.data(), text.size());
    StepPlanView view;
    try {
      view.decode(std::as_bytes(std::span(aligned)).first(text.size()), kLimits);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kDataLoss);
      EXPECT_TRUE(view.inputs().tokens.empty());
      return;
    }
    ++read;
    for (const int32_t adapter : view.inputs().adapters) ASSERT_LT(adapter, kLimits.max_adapters);
    if (view.header().kind == StepKind::kAdapter) {
      ASSERT_LT(view.order().slot, kLimits.max_adapters);
      ASSERT_LE(sizeof(StepPlanHeader) + sizeof(AdapterOrder) + view.order_path().size(), text.size());
    }
    for (const int32_t token : view.inputs().tokens) {
      ASSERT_GE(token, 0);
      ASSERT_LT(token, kLimits.vocab_size);
    }
  });
  std::cout << tried << " plans, " << read << " read\n";
  EXPECT_GT(tried, 1000);
}

TEST(StepPlanFuzz, DraftOrdersAreReadOrRefused) {
  constexpr StepLimits kLimits{.max_tokens = 64,
                               .max_rows = 16,
                               .max_sequence = 40,
                               .blocks = 32,
                               .block_size = 4,
                               .vocab_size = 100,
                               .draft_sequences = 3};
  StepPlanWriter plan;
  plan.begin(StepKind::kCompute, 7, 3);
  DraftOrderWriter order;
  order.begin(7, 3);
  for (int32_t i = 0; i < 4; ++i) {
    const std::vector<int32_t> tokens(static_cast<size_t>(i) + 1, 0);
    const std::vector<int32_t> blocks{i, i + 8, i + 16};
    plan.add_scored_sequence(tokens, 9 + i, blocks, 4);
    order.add(std::vector<int32_t>{10, 11}, 9, blocks, 4, i, i);
  }
  StepPlanView view;
  view.decode(plan.finish(), kLimits);
  const auto bytes = order.finish();
  const std::vector<std::string> seeds{{reinterpret_cast<const char*>(bytes.data()), bytes.size()}};
  int64_t read = 0;
  const int64_t tried = fuzz(seeds, [&](const std::string& text, int64_t number) {
    SCOPED_TRACE(number);
    std::vector<uint32_t> aligned(text.size() / 4 + 1);
    std::memcpy(aligned.data(), text.data(), text.size());
    DraftOrderView found;
    try {
      found.decode(std::as_bytes(std::span(aligned)).first(text.size()), view, kLimits);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kDataLoss);
      EXPECT_TRUE(found.wants().empty());
      return;
    }
    ++read;
    for (const DraftWant& want : found.wants()) {
      ASSERT_GE(want.sequence, 0);
      ASSERT_LT(want.sequence, 4);
      ASSERT_GE(want.count, 1);
      ASSERT_LE(want.count, want.sequence);
    }
  });
  std::cout << tried << " draft orders, " << read << " read\n";
  EXPECT_GT(tried, 1000);
}

}  // namespace
}  // namespace phalanx::engine
