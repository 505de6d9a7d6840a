#include "phalanx/engine/draft_order.h"

#include <gtest/gtest.h>

#include <string>

#include "phalanx/base/error.h"
#include "phalanx/engine/drafter.h"
#include "phalanx/engine/history_model.h"

namespace phalanx::engine {
namespace {

const StepLimits kLimits{.max_tokens = 32,
                         .max_rows = 16,
                         .max_sequence = 64,
                         .blocks = 16,
                         .block_size = 4,
                         .vocab_size = kHistoryVocab,
                         .draft_sequences = 2};

using Ids = std::vector<int32_t>;

// A prompt's piece and a sequence of 6 tokens with `guesses` to come, in a step plan and its order.
struct Step {
  explicit Step(int32_t guesses = 3, int32_t sequence = 1, int32_t context = 6, uint64_t step = 7) {
    StepPlanWriter plan;
    plan.begin(StepKind::kCompute, 5, 7);
    plan.add_sequence(Ids{1, 2, 3}, 3, Ids{2}, 4, false);
    plan.add_scored_sequence(Ids{9, 0, 0, 0}, 9, Ids{4, 0, 3}, 4);
    const auto bytes = plan.finish();
    buffer.assign(bytes.begin(), bytes.end());
    view.decode(buffer, kLimits);
    writer.begin(5, step);
    writer.add(Ids{1, 2, 3}, 3, Ids{2}, 4, 0, 0);
    writer.add(Ids{4, 5, 6, 7, 8, 9}, context, Ids{4, 0, 3}, 4, sequence, guesses);
    order = writer.finish();
  }
  std::vector<std::byte> buffer;
  StepPlanView view;
  DraftOrderWriter writer;
  std::span<const std::byte> order;
};

std::string refusal(const Step& step, std::span<const std::byte> order) {
  DraftOrderView view;
  try {
    view.decode(order, step.view, kLimits);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kDataLoss);
    EXPECT_TRUE(view.wants().empty());
    return error.what();
  }
  return "taken";
}

TEST(DraftOrder, IsReadAsItWasWritten) {
  const Step step;
  EXPECT_LE(std::ssize(step.order), max_draft_order_bytes(kLimits));
  DraftOrderView view;
  view.decode(step.order, step.view, kLimits);
  ASSERT_EQ(view.wants().size(), 1u);
  EXPECT_EQ(view.wants()[0].sequence, 1);
  EXPECT_EQ(view.wants()[0].count, 3);
  EXPECT_EQ(view.inputs().tokens.size(), 9u);
  DraftOrderWriter none;
  none.begin(5, 7);
  EXPECT_TRUE(none.finish().empty());
  EXPECT_EQ(max_draft_order_bytes({.max_tokens = 32, .blocks = 16, .block_size = 4}), 0);
}

TEST(DraftOrder, RefusesWhatDoesNotFitThePlan) {
  EXPECT_EQ(refusal(Step(3, 2), Step(3, 2).order), "draft order: sequence is 2, expected 0");
  EXPECT_EQ(refusal(Step(3, -1), Step(3, -1).order), "draft order: sequence is -1, expected 0");
  EXPECT_EQ(refusal(Step(4), Step(4).order), "draft order: count is 4, expected 3");
  EXPECT_EQ(refusal(Step(3, 1, 7), Step(3, 1, 7).order), "draft order: context is 10, expected 9");
  EXPECT_EQ(refusal(Step(3, 1, 6, 8), Step(3, 1, 6, 8).order), "draft order: step is 8, expected 7");
}

TEST(DraftOrder, RefusesEveryShorterLengthAndChangedBytes) {
  const Step step;
  for (size_t size = 0; size < step.order.size(); ++size)
    EXPECT_NE(refusal(step, step.order.first(size)), "taken") << size;
  std::vector<std::byte> changed(step.order.begin(), step.order.end());
  for (std::byte& byte : changed) {
    const std::byte before = std::exchange(byte, byte ^ std::byte{0x80});
    (void)refusal(step, changed);  // it may be another valid token, never a crash
    byte = before;
  }
  EXPECT_EQ(refusal(step, changed), "taken");
}

TEST(Drafter, PutsGuessesIntoThePlan) {
  Step step;
  HistoryModel model(kLimits.blocks, kLimits.block_size);
  Drafter drafter(model, kLimits);
  std::vector<int32_t> guesses(16, -1);
  drafter.run(step.order, step.view, step.buffer, guesses);
  Ids history{4, 5, 6, 7, 8, 9};
  std::vector<float> logits(kHistoryVocab);
  for (int i = 0; i < 3; ++i) {
    history_logits(history, logits.data());
    history.push_back(static_cast<int32_t>(
        std::max_element(logits.begin(), logits.end()) - logits.begin()));
    EXPECT_EQ(guesses[static_cast<size_t>(i)], history.back());
  }
  EXPECT_EQ(guesses[3], -1);
  step.view.decode(step.buffer, kLimits);
  const auto tokens = step.view.inputs().tokens;
  EXPECT_EQ(Ids(tokens.begin(), tokens.end()), (Ids{1, 2, 3, 9, history[6], history[7], history[8]}));
}

}  // namespace
}  // namespace phalanx::engine
