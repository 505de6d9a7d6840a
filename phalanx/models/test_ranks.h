#pragma once

// A model cut over N ranks, each a thread of the test, stepped as one.

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/comm/bootstrap.h"
#include "phalanx/models/decoder_model.h"
#include "phalanx/models/registry.h"

namespace phalanx::models {

inline constexpr int64_t kTestBlock = 16;
inline constexpr int64_t kTestSequence = 320;

// One sequence's part of a step.
struct TestSlice {
  int sequence = 0;                // its number; blocks follow from it
  int64_t begin = 0;               // first position
  std::vector<int32_t> tokens;     // at positions begin, begin + 1, ...
  int32_t adapter = -1;            // of RunOptions::adapters
};

struct TestStep {
  std::vector<TestSlice> slices;
  bool sample_all = true;  // logits of every token, else of the last of each slice
};

// Flat arrays of a step. Blocks of a sequence are scattered, as they are in service.
struct FlatStep {
  FlatStep(const TestStep& step, int64_t sequences, int64_t max_sequence = kTestSequence) {
    const int64_t blocks_per_sequence = max_sequence / kTestBlock;
    tables.reserve(step.slices.size());
    for (const TestSlice& slice : step.slices) {
      std::vector<int32_t> table;
      for (int64_t b = 0; b < blocks_per_sequence; ++b)
        table.push_back(static_cast<int32_t>((blocks_per_sequence - 1 - b) * sequences +
                                             slice.sequence));
      tables.push_back(std::move(table));
      const auto count = static_cast<int32_t>(slice.tokens.size());
      adapters.push_back(slice.adapter);
      slices.push_back({.token_begin = static_cast<int32_t>(tokens.size()),
                        .token_count = count,
                        .context = static_cast<int32_t>(slice.begin) + count,
                        .block_table = tables.back().data()});
      for (int32_t i = 0; i < count; ++i) {
        const auto position = static_cast<int32_t>(slice.begin) + i;
        if (step.sample_all || i + 1 == count) rows.push_back(static_cast<int32_t>(tokens.size()));
        tokens.push_back(slice.tokens[static_cast<size_t>(i)]);
        positions.push_back(position);
        slots.push_back(tables.back()[static_cast<size_t>(position / kTestBlock)] *
                            static_cast<int32_t>(kTestBlock) +
                        position % static_cast<int32_t>(kTestBlock));
      }
    }
  }
  [[nodiscard]] StepInputs inputs() const {
    return {.tokens = tokens, .positions = positions, .slots = slots, .sequences = slices,
            .sample_rows = rows, .adapters = adapters};
  }
  std::vector<std::vector<int32_t>> tables;
  std::vector<ops::SequenceSlice> slices;
  std::vector<int32_t> tokens, positions, slots, rows, adapters;
};

struct RunOptions {
  std::string directory;
  ops::Isa isa = ops::Isa::kRef;
  std::vector<double> weights = {1.0};
  int threads = 1;          // per rank
  int64_t sequences = 1;    // at once
  int64_t max_tokens = 512;
  int64_t max_sequence = kTestSequence;
  int64_t moe_ep = 1;
  KvDtype kv = KvDtype::kCheckpoint;
  std::vector<std::string> adapters;  // directories, by slot
  std::vector<LoadStats>* load_stats = nullptr;  // receives one per rank
  std::function<void(DecoderConfig&)> change;    // of what config.json says
  // After the steps sequence 0 goes on: this many tokens, each the best of the logits before it.
  int64_t generate = 0;
  std::vector<int32_t>* generated = nullptr;
};

// Logits of all steps, one after the other: [sum of rows, vocab].
inline std::vector<float> run_steps(const RunOptions& options, const std::vector<TestStep>& steps) {
  const int ranks = static_cast<int>(options.weights.size());
  const UniqueFd memory = comm::create_node_memory(ranks);
  comm::GroupOptions group_options;
  for (int r = 0; r < ranks; ++r) group_options.members.push_back({.rank = r, .host = "test"});
  std::vector<float> logits;
  std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
  if (options.load_stats != nullptr) options.load_stats->resize(static_cast<size_t>(ranks));
  const auto run_rank = [&](int rank) {
    try {
      comm::GroupOptions mine = group_options;
      mine.rank = rank;
      const auto group =
          ranks == 1 ? comm::single_group() : comm::form_group(mine, -1, memory.get());
      ThreadPool pool({.threads = options.threads, .spin_us = 0});
      const ModelOptions model_options{.directory = options.directory,
                                       .isa = options.isa,
                                       .max_step_tokens = options.max_tokens,
                                       .max_step_rows = options.max_tokens,
                                       .max_sequence = options.max_sequence,
                                       .block_size = kTestBlock,
                                       .kv = options.kv,
                                       .weights = options.weights,
                                       .moe_ep = options.moe_ep,
                                       .rank = rank,
                                       .max_adapters = std::ssize(options.adapters),
                                       .max_adapter_rank = 64};
      FamilyConfig found = read_config(options.directory);
      if (options.change) options.change(found.config);
      const auto model = std::make_unique<DecoderModel>(
          found.config, found.family->known_extras, model_options, *group, pool, nullptr);
      if (options.load_stats != nullptr)
        (*options.load_stats)[static_cast<size_t>(rank)] = model->load_stats();
      model->allocate_kv(options.max_sequence / kTestBlock * options.sequences);
      for (size_t slot = 0; slot < options.adapters.size(); ++slot)
        model->set_adapter(static_cast<int64_t>(slot), model->read_adapter(options.adapters[slot]));
      std::vector<TestStep> all = steps;
      int32_t next = 0;
      for (size_t i = 0; i < steps.size() + static_cast<size_t>(std::max<int64_t>(0, options.generate - 1)); ++i) {
        if (i >= steps.size()) {
          const TestSlice& before = all.back().slices.front();
          all.push_back({.slices = {{.begin = before.begin + static_cast<int64_t>(before.tokens.size()),
                                     .tokens = {next}}}});
        }
        const FlatStep flat(all[i], options.sequences, options.max_sequence);
        std::vector<float> out;
        if (rank == 0)
          out.resize(flat.rows.size() * static_cast<size_t>(model->info().vocab_size));
        model->forward(flat.inputs(), rank == 0 ? out.data() : nullptr);
        if (rank == 0) logits.insert(logits.end(), out.begin(), out.end());
        if (i + 1 < steps.size() || options.generate == 0) continue;
        if (rank == 0) {
          const auto row = out.end() - static_cast<long>(model->info().vocab_size);
          next = static_cast<int32_t>(std::max_element(row, out.end()) - row);
          if (options.generated != nullptr) options.generated->push_back(next);
        }
        group->broadcast(std::as_writable_bytes(std::span(&next, 1)), 0);
      }
    } catch (...) {
      errors[static_cast<size_t>(rank)] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int r = 1; r < ranks; ++r) others.emplace_back(run_rank, r);
  run_rank(0);
  for (std::thread& t : others) t.join();
  for (const std::exception_ptr& e : errors)
    if (e) std::rethrow_exception(e);
  return logits;
}

}  // namespace phalanx::models
