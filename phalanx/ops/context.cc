#include <algorithm>
#include <new>
#include <string>

#include "phalanx/base/error.h"
#include "phalanx/ops/cpu/amx.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/integer_kernels.h"
#include "phalanx/ops/ops.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops {
namespace {

// Deals out aligned pieces of one allocation; without memory it only counts.
class Pieces {
 public:
  explicit Pieces(std::byte* memory) : memory_(memory) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return memory_ != nullptr ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  [[nodiscard]] int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

}  // namespace

const cpu::Kernels* cpu::kernels_of(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx2:
      return &cpu::avx2_kernels();
    case Isa::kAvx512:
      return &cpu::avx512_kernels();
    case Isa::kAvx512Bf16:
      return &cpu::avx512bf16_kernels();
    case Isa::kAmx:
      return &cpu::amx_kernels();
    default:
      break;
  }
#endif
  PHALANX_CHECK(isa == Isa::kRef);
  return nullptr;
}

const cpu::IntegerKernels* cpu::integer_kernels_of(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx2:
      return &cpu::avx2_integer_kernels();
    // Sums of integers are exact: every path of them gives the same bits.
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512vnni") ? &cpu::avx512_integer_kernels()
                                                  : &cpu::avx2_integer_kernels();
    case Isa::kAvx512Bf16:
      return __builtin_cpu_supports("avx512vbmi") ? &cpu::avx512bf16_integer_kernels()
                                                  : &cpu::avx512_integer_kernels();
    case Isa::kAmx:
      return &cpu::amx_integer_kernels();
    default:
      break;
  }
#endif
  PHALANX_CHECK(isa == Isa::kRef);
  return nullptr;
}

namespace {

void lay_out(const Context::Options& options, int threads, Pieces& pieces,
             Context::Scratch& scratch) {
  const int64_t head_dim = (options.max_head_dim + 15) / 16 * 16;
  const int64_t rows = scratch.query_rows;
  if (!scratch.kernels->pairs)
    scratch.widened = pieces.take<float>(options.max_tokens * options.max_k);
  for (ThreadScratch& t : scratch.threads) {
    t.sums = pieces.take<float>(kTokenBlock * cpu::kGroupPanels * tensor::kPanelRows);
    t.widened = pieces.take<float>(cpu::kGroupPanels * kWidenK * tensor::kPanelRows);
    t.queries = pieces.take<float>(rows * head_dim);
    t.keys = pieces.take<std::byte>(kAttentionChunk / 16 * panel_bytes(head_dim, DType::kF32));
    t.values = pieces.take<std::byte>(kAttentionChunk * head_dim * 4);
    t.key_scales = pieces.take<float>(kAttentionChunk);
    t.value_scales = pieces.take<float>(kAttentionChunk);
    t.scores = pieces.take<float>(rows * kAttentionChunk);
    t.chunk_out = pieces.take<float>(rows * head_dim);
    t.out = pieces.take<float>(rows * head_dim);
    t.chunk_max = pieces.take<float>(rows);
    t.chunk_sum = pieces.take<float>(rows);
    t.max = pieces.take<float>(rows);
    t.sum = pieces.take<float>(rows);
    t.begin = pieces.take<int32_t>(rows);
    t.end = pieces.take<int32_t>(rows);
    if (options.quantised) {
      t.expanded = pieces.take<std::byte>(cpu::kGroupPanels * kExpandK * tensor::kPanelRows * 2);
      t.totals = pieces.take<float>(kTokenBlock * cpu::kGroupPanels * tensor::kPanelRows);
    }
  }
  if (options.quantised) {
    const int64_t tokens = std::min(kTokenBlock, options.max_tokens);
    scratch.prepared_stride = (options.max_k + 63) / 64 * 64 * static_cast<int64_t>(sizeof(float));
    scratch.prepared = pieces.take<std::byte>(tokens * scratch.prepared_stride);
    scratch.token_scale = pieces.take<float>(tokens);
    scratch.token_sum = pieces.take<int32_t>(tokens);
    scratch.group_sums = pieces.take<float>(tokens * (options.max_k / cpu::kLeastGroup + 1));
    scratch.halves = pieces.take<float>(kHalvesTokens * 2 * options.max_rows);
  }
  if (threads > 1) {
    // Room for two sequences of one token each to be shared out whole.
    const int64_t chunks = (options.max_context + kAttentionChunk - 1) / kAttentionChunk;
    scratch.max_partials = 2 * options.max_heads * chunks;
    scratch.partials = pieces.take<float>(scratch.max_partials * (head_dim + 16));
  }
}

int64_t item_count(const Context::Options& options, int threads) {
  return (options.max_tokens + 4 * threads) * std::max<int64_t>(1, options.max_heads);
}

// Everything of a scratch but its memory.
void measure(const Context::Options& options, int threads, Context::Scratch& scratch) {
  scratch.kernels = cpu::kernels_of(options.isa);
  if (scratch.kernels == nullptr) return;
  scratch.integers = cpu::integer_kernels_of(options.isa);
  // In the class amx by pairs, as IntegerKernels::stream does it for few tokens.
  scratch.multiply_codes =
      cpu::kernels_of(options.isa == Isa::kAmx ? Isa::kAvx512Bf16 : options.isa)->multiply_bf16;
  scratch.max_tokens = options.max_tokens;
  scratch.max_k = options.max_k;
  scratch.max_head_dim = options.max_head_dim;
  scratch.query_rows = std::max(kQueryRows, options.max_heads);
  scratch.threads.resize(static_cast<size_t>(threads));
  Pieces counted(nullptr);
  lay_out(options, threads, counted, scratch);
  scratch.bytes = counted.used() + 128 +
                  item_count(options, threads) * static_cast<int64_t>(sizeof(AttentionItem));
}

}  // namespace

struct Context::State {
  State(const Options& o, ThreadPool& p) : options(o), pool(p) {}
  Options options;
  ThreadPool& pool;
  Scratch scratch;
};

int64_t Context::bytes_for(const Options& options, int threads) {
  Scratch scratch;
  measure(options, threads, scratch);
  return scratch.bytes;
}

Context::Context(const Options& options, ThreadPool& pool)
    : state_(std::make_unique<State>(options, pool)) {
  const std::vector<Isa> available = available_isas();
  if (std::find(available.begin(), available.end(), options.isa) == available.end())
    throw Error(Code::kInvalidArgument, "this machine or this build has no kernels for \"" +
                                            std::string(isa_name(options.isa)) + "\"");
  Scratch& scratch = state_->scratch;
  measure(options, pool.size(), scratch);
  if (scratch.kernels == nullptr) return;
  const int64_t items = item_count(options, pool.size());
  scratch.items.reserve(static_cast<size_t>(items));
  const int64_t bytes = scratch.bytes - items * static_cast<int64_t>(sizeof(AttentionItem));
  scratch.memory.reset(
      static_cast<std::byte*>(std::aligned_alloc(128, static_cast<size_t>(bytes))));
  if (scratch.memory == nullptr) throw std::bad_alloc();
  Pieces pieces(scratch.memory.get());
  lay_out(options, pool.size(), pieces, scratch);
}

Context::~Context() = default;
void Context::observe(const MatrixView& x) const {
  if (state_->options.observer != nullptr) (*state_->options.observer)(x);
}
Isa Context::isa() const { return state_->options.isa; }
ThreadPool& Context::pool() const { return state_->pool; }
Context::Scratch& Context::scratch() const { return state_->scratch; }
int64_t Context::scratch_bytes() const { return state_->scratch.bytes; }

}  // namespace phalanx::ops
