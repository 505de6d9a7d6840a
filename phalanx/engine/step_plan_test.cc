#include "phalanx/engine/step_plan.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "phalanx/base/error.h"

namespace phalanx::engine {
namespace {

constexpr StepLimits kLimits{.max_tokens = 64,
                             .max_rows = 16,
                             .max_sequence = 40,
                             .blocks = 32,
                             .block_size = 4,
                             .vocab_size = 100};

// Two sequences: 5 prompt tokens at positions [0, 5) without a row, 1 token at position 8 with one.
std::vector<std::byte> two_sequences() {
  StepPlanWriter writer;
  writer.begin(StepKind::kCompute, 7, 3);
  const std::vector<int32_t> prompt{10, 11, 12, 13, 14};
  const std::vector<int32_t> prompt_blocks{5, 9, 1};
  writer.add_sequence(prompt, 5, prompt_blocks, 4, false, 40);
  const std::vector<int32_t> token{99};
  const std::vector<int32_t> token_blocks{0, 31, 7};
  writer.add_sequence(token, 9, token_blocks, 4, true, 41);
  const auto bytes = writer.finish();
  return {bytes.begin(), bytes.end()};
}

std::string refusal(const std::vector<std::byte>& plan, const StepLimits& limits = kLimits) {
  StepPlanView view;
  try {
    view.decode(plan, limits);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kDataLoss);
    EXPECT_TRUE(view.inputs().tokens.empty());
    return error.what();
  }
  return "accepted";
}

// The plan with the 32-bit word at `offset` replaced.
std::vector<std::byte> with_word(std::vector<std::byte> plan, size_t offset, uint32_t value) {
  std::memcpy(plan.data() + offset, &value, sizeof(value));
  return plan;
}

TEST(StepPlan, WhatIsWrittenIsRead) {
  const auto plan = two_sequences();
  EXPECT_EQ(plan.size(), 48u + 6 * 12 + 2 * 28 + 4 + 5 * 4);
  EXPECT_LE(static_cast<int64_t>(plan.size()), kLimits.max_plan_bytes());
  StepPlanView view;
  view.decode(plan, kLimits);
  EXPECT_EQ(view.header().generation, 7u);
  EXPECT_EQ(view.header().step, 3u);
  EXPECT_EQ(view.header().kind, StepKind::kCompute);
  const auto& in = view.inputs();
  EXPECT_EQ(std::vector<int32_t>(in.tokens.begin(), in.tokens.end()),
            (std::vector<int32_t>{10, 11, 12, 13, 14, 99}));
  EXPECT_EQ(std::vector<int32_t>(in.positions.begin(), in.positions.end()),
            (std::vector<int32_t>{0, 1, 2, 3, 4, 8}));
  EXPECT_EQ(std::vector<int32_t>(in.slots.begin(), in.slots.end()),
            (std::vector<int32_t>{20, 21, 22, 23, 36, 28}));
  EXPECT_EQ(std::vector<int32_t>(in.sample_rows.begin(), in.sample_rows.end()),
            (std::vector<int32_t>{5}));
  ASSERT_EQ(in.sequences.size(), 2u);
  EXPECT_EQ(in.sequences[0].context, 5);
  EXPECT_EQ(in.sequences[0].block_table[1], 9);
  EXPECT_EQ(in.sequences[1].token_begin, 5);
  EXPECT_EQ(in.sequences[1].block_table[2], 7);
  EXPECT_EQ(view.sequences()[1].tag, 41u);
}

TEST(StepPlan, ScoredSequenceWantsEveryRow) {
  StepPlanWriter writer;
  writer.begin(StepKind::kCompute, 1, 1);
  const std::vector<int32_t> tokens{1, 2, 3};
  const std::vector<int32_t> blocks{2, 3};
  writer.add_scored_sequence(tokens, 6, blocks, 4);
  StepPlanView view;
  view.decode(writer.finish(), kLimits);
  const auto rows = view.inputs().sample_rows;
  EXPECT_EQ(std::vector<int32_t>(rows.begin(), rows.end()), (std::vector<int32_t>{0, 1, 2}));
}

TEST(StepPlan, IdleAndStopAreEmpty) {
  for (const StepKind kind : {StepKind::kIdle, StepKind::kStop}) {
    StepPlanWriter writer;
    writer.begin(kind, 2, 9);
    const auto plan = writer.finish();
    EXPECT_EQ(plan.size(), sizeof(StepPlanHeader));
    StepPlanView view;
    view.decode(plan, kLimits);
    EXPECT_EQ(view.header().kind, kind);
    EXPECT_TRUE(view.inputs().tokens.empty());
  }
}

TEST(StepPlan, RefusalsNameTheField) {
  const auto plan = two_sequences();
  const size_t tokens = 48, positions = tokens + 24, slots = positions + 24, seqs = slots + 24,
               rows = seqs + 56, blocks = rows + 4;
  const auto expect = [&](size_t offset, uint32_t value, const char* text) {
    const std::string message = refusal(with_word(plan, offset, value));
    EXPECT_NE(message.find(text), std::string::npos) << message << "\nexpected: " << text;
  };
  expect(0, 1, "magic is 1, expected 1280333904");
  expect(4, 1 | 1 << 16, "version is 1, expected 3");
  expect(4, 3 | 9 << 16, "kind is 9, expected 1 to 3");
  expect(24, 12, "bytes is 12, expected 200");
  expect(28, 65, "num_tokens is 65, expected 1 to 64");
  expect(32, 7, "num_sequences is 7, expected 1 to 6");
  expect(36, 0xffffffffu, "num_rows is 4294967295, expected 0 to 6");
  expect(40, 321, "num_blocks is 321, expected 2 to 320");  // sequences may share blocks
  expect(44, 2, "flags is 2");
  expect(tokens, 100, "token id is 100, expected 0 to 99");
  expect(tokens, 0xffffffffu, "token id is -1");
  expect(positions + 8, 3, "position is 3, expected 2");
  expect(slots, 0, "slot is 0, expected 20");
  expect(seqs, 1, "token_begin is 1, expected 0");
  expect(seqs + 4, 0, "token_count is 0, expected 1 to 6");
  expect(seqs + 4, 7, "token_count is 7");
  expect(seqs + 8, 41, "context is 41, expected 5 to 40");
  expect(seqs + 8, 4, "context is 4");
  expect(seqs + 12, 1, "block_begin is 1, expected 0");
  expect(seqs + 16, 3, "block_count is 3, expected 2");
  expect(seqs + 24, 0, "adapter is 0, expected -1 to -1");
  expect(rows, 6, "sample row is 6, expected 0 to 5");
  expect(blocks, 32, "block id is 32, expected 0 to 31");
  expect(blocks, 0xffffffffu, "block id is -1");
  auto shorter = plan;
  shorter.pop_back();
  EXPECT_NE(refusal(shorter).find("length of the buffer is 199, expected 200"), std::string::npos);
  EXPECT_NE(refusal({}).find("length of the buffer is 0"), std::string::npos);
}

TEST(StepPlan, AdaptersOfSequencesAndOrders) {
  StepLimits limits = kLimits;
  limits.max_adapters = 3;
  StepPlanWriter writer;
  writer.begin(StepKind::kCompute, 1, 1);
  const std::vector<int32_t> tokens{1, 2};
  const std::vector<int32_t> blocks{2};
  writer.add_sequence(tokens, 2, blocks, 4, true);
  writer.add_sequence(tokens, 2, blocks, 4, true, 0, 2);
  StepPlanView view;
  const auto compute = writer.finish();
  const std::vector<std::byte> plan(compute.begin(), compute.end());
  view.decode(plan, limits);
  EXPECT_EQ(std::vector<int32_t>(view.inputs().adapters.begin(), view.inputs().adapters.end()),
            (std::vector<int32_t>{-1, 2}));
  EXPECT_NE(refusal(plan).find("adapter is 2, expected -1 to -1"), std::string::npos);

  writer.begin(StepKind::kAdapter, 1, 2);
  writer.set_order(AdapterAct::kRead, 1, "/a/b/c");
  const auto order = writer.finish();
  std::vector<std::byte> bytes(order.begin(), order.end());
  EXPECT_EQ(bytes.size(), 48u + 16 + 8);
  EXPECT_LE(static_cast<int64_t>(48 + 16 + kMostAdapterPath), limits.max_plan_bytes());
  view.decode(bytes, limits);
  EXPECT_EQ(view.order().act, AdapterAct::kRead);
  EXPECT_EQ(view.order().slot, 1u);
  EXPECT_EQ(view.order_path(), "/a/b/c");
  const auto refused = [&](size_t offset, uint32_t value) -> std::string {
    const auto damaged = with_word(bytes, offset, value);
    try {
      view.decode(damaged, limits);
    } catch (const Error& error) {
      EXPECT_TRUE(view.order_path().empty());
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refused(48, 4), "step plan: act is 4, expected 1 to 3");
  EXPECT_EQ(refused(52, 3), "step plan: slot is 3, expected 0 to 2");
  EXPECT_EQ(refused(56, 0), "step plan: path_bytes is 0, expected 1 to 4096");
  EXPECT_EQ(refused(56, 9), "step plan: length of the order is 24, expected 28");
  EXPECT_EQ(refused(48, 2), "step plan: path_bytes is 6, expected 0 to 0");
  EXPECT_EQ(refused(60, 1), "step plan: reserved is 1, expected 0");
  EXPECT_NE(refusal(bytes).find("kind is 4, expected 1 to 3"), std::string::npos);
}

TEST(StepPlan, AnUnalignedBufferIsRefused) {
  auto plan = two_sequences();
  plan.insert(plan.begin(), std::byte{0});
  StepPlanView view;
  EXPECT_THROW(view.decode(std::span<const std::byte>(plan).subspan(1), kLimits), Error);
}

// Whatever the bytes, decode either refuses or returns views that stay inside (ASan watches, and
// everything an accepted plan points at is read here).
TEST(StepPlan, HostileBuffersStayInside) {
  const auto plan = two_sequences();
  std::mt19937 random(1);
  int accepted = 0;
  for (int round = 0; round < 60000; ++round) {
    auto bytes = plan;
    const int flips = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < flips; ++i) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random() % 4 == 0 ? 255 : random());
    }
    if (random() % 8 == 0) bytes.resize(random() % (bytes.size() + 1));
    StepPlanView view;
    try {
      view.decode(bytes, kLimits);
    } catch (const Error&) {
      continue;
    }
    ++accepted;
    const auto& in = view.inputs();
    int64_t sum = 0;
    for (const auto& s : in.sequences) {
      for (int32_t p = 0; p < s.context; ++p) {
        const int32_t block = s.block_table[p / kLimits.block_size];
        ASSERT_GE(block, 0);
        ASSERT_LT(block, kLimits.blocks);
      }
      for (int32_t t = s.token_begin; t < s.token_begin + s.token_count; ++t) {
        sum += in.tokens[static_cast<size_t>(t)];
        ASSERT_LT(in.slots[static_cast<size_t>(t)], kLimits.blocks * kLimits.block_size);
      }
    }
    for (const int32_t row : in.sample_rows) ASSERT_LT(row, std::ssize(in.tokens));
    ASSERT_GE(sum, 0);
  }
  EXPECT_GT(accepted, 0);  // flips in tokens, tags, step and generation are still plans
}

TEST(StepPlan, TheLargestPlanFits) {
  StepPlanWriter writer;
  writer.begin(StepKind::kCompute, 1, 1);
  const std::vector<int32_t> two{1, 2};
  for (int32_t i = 0; i < 32; ++i) {
    const std::vector<int32_t> table{0, 1, 2, 3, 4, 5, 6, 7, 8, i};
    writer.add_sequence(two, 40, table, 4, i < 16);
  }
  const auto plan = writer.finish();
  EXPECT_EQ(static_cast<int64_t>(plan.size()), kLimits.max_plan_bytes());
  StepPlanView view;
  view.decode(plan, kLimits);
}

}  // namespace
}  // namespace phalanx::engine
