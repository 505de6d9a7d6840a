#include "phalanx/engine/step_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"

namespace phalanx::engine {

static_assert(std::endian::native == std::endian::little, "plans are little-endian as written");

void StepPlanWriter::begin(StepKind kind, uint64_t generation, uint64_t step, uint32_t flags) {
  header_ = StepPlanHeader{};
  header_.kind = kind;
  header_.generation = generation;
  header_.step = step;
  header_.flags = flags;
  tokens_.clear();
  positions_.clear();
  slots_.clear();
  rows_.clear();
  blocks_.clear();
  sequences_.clear();
  order_.clear();
}

void StepPlanWriter::add(std::span<const int32_t> tokens, int32_t context,
                         std::span<const int32_t> block_table, int32_t block_size, uint32_t tag,
                         int32_t adapter) {
  const auto count = static_cast<int32_t>(tokens.size());
  const int32_t used_blocks = (context + block_size - 1) / block_size;
  PHALANX_CHECK(count > 0 && count <= context);
  PHALANX_CHECK(static_cast<size_t>(used_blocks) <= block_table.size());
  sequences_.push_back({.token_begin = static_cast<int32_t>(tokens_.size()),
                        .token_count = count,
                        .context = context,
                        .block_begin = static_cast<int32_t>(blocks_.size()),
                        .block_count = used_blocks,
                        .tag = tag,
                        .adapter = adapter});
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  for (int32_t p = context - count; p < context; ++p) {
    positions_.push_back(p);
    slots_.push_back(block_table[static_cast<size_t>(p / block_size)] * block_size +
                     p % block_size);
  }
  blocks_.insert(blocks_.end(), block_table.begin(), block_table.begin() + used_blocks);
}

void StepPlanWriter::add_sequence(std::span<const int32_t> tokens, int32_t context,
                                  std::span<const int32_t> block_table, int32_t block_size,
                                  bool sample, uint32_t tag, int32_t adapter) {
  add(tokens, context, block_table, block_size, tag, adapter);
  if (sample) rows_.push_back(static_cast<int32_t>(tokens_.size()) - 1);
}

void StepPlanWriter::add_scored_sequence(std::span<const int32_t> tokens, int32_t context,
                                         std::span<const int32_t> block_table, int32_t block_size,
                                         uint32_t tag, int32_t adapter) {
  const auto first = static_cast<int32_t>(tokens_.size());
  add(tokens, context, block_table, block_size, tag, adapter);
  for (auto row = first; row < static_cast<int32_t>(tokens_.size()); ++row) rows_.push_back(row);
}

void StepPlanWriter::set_order(AdapterAct act, uint32_t slot, std::string_view path) {
  PHALANX_CHECK(header_.kind == StepKind::kAdapter && path.size() <= kMostAdapterPath &&
                path.empty() == (act != AdapterAct::kRead));
  const AdapterOrder order{
      .act = act, .slot = slot, .path_bytes = static_cast<uint32_t>(path.size())};
  order_.assign(sizeof(order) + (path.size() + 3) / 4 * 4, std::byte{0});
  std::memcpy(order_.data(), &order, sizeof(order));
  std::memcpy(order_.data() + sizeof(order), path.data(), path.size());
}

std::span<const std::byte> StepPlanWriter::finish() {
  const auto bytes_of = [](const auto& v) { return v.size() * sizeof(v[0]); };
  header_.num_tokens = static_cast<uint32_t>(tokens_.size());
  header_.num_sequences = static_cast<uint32_t>(sequences_.size());
  header_.num_rows = static_cast<uint32_t>(rows_.size());
  header_.num_blocks = static_cast<uint32_t>(blocks_.size());
  const size_t bytes = sizeof(header_) + bytes_of(tokens_) + bytes_of(positions_) +
                       bytes_of(slots_) + bytes_of(sequences_) + bytes_of(rows_) +
                       bytes_of(blocks_) + order_.size();
  header_.bytes = static_cast<uint32_t>(bytes);
  buffer_.resize(bytes);
  std::byte* at = buffer_.data();
  const auto put = [&at](const void* data, size_t size) {
    if (size > 0) std::memcpy(at, data, size);
    at += size;
  };
  put(&header_, sizeof(header_));
  put(tokens_.data(), bytes_of(tokens_));
  put(positions_.data(), bytes_of(positions_));
  put(slots_.data(), bytes_of(slots_));
  put(sequences_.data(), bytes_of(sequences_));
  put(rows_.data(), bytes_of(rows_));
  put(blocks_.data(), bytes_of(blocks_));
  put(order_.data(), order_.size());
  return buffer_;
}

int64_t StepLimits::max_sequences() const { return std::min(max_tokens, blocks); }

int64_t StepLimits::max_block_ids() const {
  const int64_t longest = std::min((max_sequence + block_size - 1) / block_size, blocks);
  return max_sequences() * longest;
}

int64_t StepLimits::max_plan_bytes() const {
  const int64_t compute = static_cast<int64_t>(sizeof(StepPlanHeader)) + 3 * 4 * max_tokens +
                          static_cast<int64_t>(sizeof(PlannedSequence)) * max_sequences() +
                          4 * max_rows + 4 * max_block_ids();
  const auto order = static_cast<int64_t>(sizeof(StepPlanHeader) + sizeof(AdapterOrder));
  return max_adapters > 0 ? std::max(compute, order + kMostAdapterPath) : compute;
}

namespace {

// Of a field that is not what it must be.
[[noreturn]] void refuse(std::string_view field, int64_t found, std::string_view expected) {
  throw Error(Code::kDataLoss,
              fmt::format("step plan: {} is {}, expected {}", field, found, expected));
}

void expect_range(std::string_view field, int64_t found, int64_t low, int64_t high) {
  if (found < low || found > high) refuse(field, found, fmt::format("{} to {}", low, high));
}

void expect_equal(std::string_view field, int64_t found, int64_t expected) {
  if (found != expected) refuse(field, found, fmt::format("{}", expected));
}

template <typename T>
std::span<const T> take(const std::byte*& at, uint32_t count) {
  const auto* first = reinterpret_cast<const T*>(at);
  at += sizeof(T) * count;
  return {first, count};
}

}  // namespace

void StepPlanView::decode(std::span<const std::byte> buffer, const StepLimits& limits) {
  try {
    decode_body(buffer, limits);
  } catch (...) {
    header_ = {};
    inputs_ = {};
    sequences_ = {};
    slices_.clear();
    adapters_.clear();
    order_ = {};
    order_path_ = {};
    throw;
  }
}

void StepPlanView::decode_body(std::span<const std::byte> buffer, const StepLimits& limits) {
  if (reinterpret_cast<uintptr_t>(buffer.data()) % alignof(int32_t) != 0) {
    throw Error(Code::kDataLoss, "step plan: the buffer is not aligned to 4 bytes");
  }
  if (buffer.size() < sizeof(StepPlanHeader)) {
    refuse("length of the buffer", static_cast<int64_t>(buffer.size()),
           fmt::format("at least {}", sizeof(StepPlanHeader)));
  }
  StepPlanHeader header;
  std::memcpy(&header, buffer.data(), sizeof(header));
  expect_equal("magic", header.magic, kStepPlanMagic);
  expect_equal("version", header.version, kStepPlanVersion);
  expect_range("kind", static_cast<int64_t>(header.kind), 1, limits.max_adapters > 0 ? 4 : 3);
  const bool compute = header.kind == StepKind::kCompute;
  expect_range("flags", header.flags, 0, compute ? kTraceStep : 0);
  expect_range("num_tokens", header.num_tokens, compute ? 1 : 0, compute ? limits.max_tokens : 0);
  expect_range("num_sequences", header.num_sequences, compute ? 1 : 0,
               std::min<int64_t>(header.num_tokens, limits.max_sequences()));
  expect_range("num_rows", header.num_rows, 0,
               std::min<int64_t>(limits.max_rows, header.num_tokens));
  expect_range("num_blocks", header.num_blocks, header.num_sequences,
               compute ? limits.max_block_ids() : 0);
  const int64_t bytes = static_cast<int64_t>(sizeof(header)) + 3 * 4 * int64_t{header.num_tokens} +
                        static_cast<int64_t>(sizeof(PlannedSequence)) * header.num_sequences +
                        4 * int64_t{header.num_rows} + 4 * int64_t{header.num_blocks};
  if (header.kind == StepKind::kAdapter) {
    expect_equal("bytes", header.bytes, static_cast<int64_t>(buffer.size()));
    decode_order(buffer.subspan(sizeof(header)), limits);
    header_ = header;
    inputs_ = {};
    sequences_ = {};
    return;
  }
  expect_equal("bytes", header.bytes, bytes);
  expect_equal("length of the buffer", static_cast<int64_t>(buffer.size()), bytes);

  const std::byte* at = buffer.data() + sizeof(header);
  const auto tokens = take<int32_t>(at, header.num_tokens);
  const auto positions = take<int32_t>(at, header.num_tokens);
  const auto slots = take<int32_t>(at, header.num_tokens);
  const auto sequences = take<PlannedSequence>(at, header.num_sequences);
  const auto rows = take<int32_t>(at, header.num_rows);
  const auto blocks = take<int32_t>(at, header.num_blocks);

  for (const int32_t block : blocks) expect_range("block id", block, 0, limits.blocks - 1);
  for (const int32_t token : tokens) expect_range("token id", token, 0, limits.vocab_size - 1);

  slices_.clear();
  adapters_.clear();
  bool adapted = false;
  int64_t next_token = 0;
  int64_t next_block = 0;
  for (const PlannedSequence& s : sequences) {
    expect_equal("token_begin", s.token_begin, next_token);
    expect_range("token_count", s.token_count, 1, header.num_tokens - next_token);
    expect_range("context", s.context, s.token_count, limits.max_sequence);
    expect_equal("block_begin", s.block_begin, next_block);
    expect_equal("block_count", s.block_count,
                 (s.context + limits.block_size - 1) / limits.block_size);
    expect_range("block_count", s.block_count, 1, header.num_blocks - next_block);
    for (int64_t i = 0; i < s.token_count; ++i) {
      const auto t = static_cast<size_t>(next_token + i);
      const int64_t position = s.context - s.token_count + i;
      expect_equal("position", positions[t], position);
      const int64_t block = blocks[static_cast<size_t>(next_block + position / limits.block_size)];
      expect_equal("slot", slots[t], block * limits.block_size + position % limits.block_size);
    }
    expect_range("adapter", s.adapter, -1, limits.max_adapters - 1);
    adapters_.push_back(s.adapter);
    adapted |= s.adapter >= 0;
    slices_.push_back({.token_begin = s.token_begin,
                       .token_count = s.token_count,
                       .context = s.context,
                       .block_table = blocks.data() + next_block});
    next_token += s.token_count;
    next_block += s.block_count;
  }
  expect_equal("num_tokens", header.num_tokens, next_token);
  expect_equal("num_blocks", header.num_blocks, next_block);
  int64_t lowest = 0;
  for (const int32_t row : rows) {
    expect_range("sample row", row, lowest, int64_t{header.num_tokens} - 1);
    lowest = int64_t{row} + 1;
  }
  header_ = header;
  sequences_ = sequences;
  inputs_ = {.tokens = tokens,
             .positions = positions,
             .slots = slots,
             .sequences = slices_,
             .sample_rows = rows,
             .adapters = adapted ? std::span<const int32_t>(adapters_) : std::span<const int32_t>()};
}

void StepPlanView::decode_order(std::span<const std::byte> body, const StepLimits& limits) {
  if (body.size() < sizeof(AdapterOrder))
    refuse("length of the order", static_cast<int64_t>(body.size()),
           fmt::format("at least {}", sizeof(AdapterOrder)));
  AdapterOrder order;
  std::memcpy(&order, body.data(), sizeof(order));
  expect_range("act", static_cast<int64_t>(order.act), 1, 3);
  expect_range("slot", order.slot, 0, limits.max_adapters - 1);
  expect_equal("reserved", order.reserved, 0);
  const bool read = order.act == AdapterAct::kRead;
  expect_range("path_bytes", order.path_bytes, read ? 1 : 0, read ? kMostAdapterPath : 0);
  expect_equal("length of the order", static_cast<int64_t>(body.size()),
               static_cast<int64_t>(sizeof(order)) + (int64_t{order.path_bytes} + 3) / 4 * 4);
  order_ = order;
  order_path_ = {reinterpret_cast<const char*>(body.data()) + sizeof(order), order.path_bytes};
}

}  // namespace phalanx::engine
