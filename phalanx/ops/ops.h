#pragma once

// Pure functions on matrices, the whole arithmetic of a decoder layer on one rank. Shapes in
// comments; T = tokens of this step. "act" is the activation dtype of the model: bf16 for bf16
// checkpoints, f32 otherwise. Each function checks shapes, then dispatches to ops/cpu (by
// Context::isa) or ops/ref. No allocation: scratch comes from the Context.
//
// One order: every output element is computed by the same operations whatever the number of tokens,
// threads, ranks, and wherever its row lies: one accumulator, K ascending (bf16dp: pairs; amx: tiles
// of 32 for bf16 weights). Rounding to act happens only where a comment says so.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "phalanx/base/thread_pool.h"
#include "phalanx/ops/isa.h"
#include "phalanx/quant/format.h"
#include "phalanx/tensor/cut.h"
#include "phalanx/tensor/dtype.h"
#include "phalanx/tensor/tensor_view.h"

namespace phalanx::ops {

using tensor::DType;
using tensor::MatrixView;

// Per rank. Used from one thread.
class Context {
 public:
  struct Options {
    Isa isa = Isa::kRef;
    int64_t max_tokens = 0;  // largest T of a step
    int64_t max_k = 0;       // largest input width of a linear layer
    int64_t max_rows = 0;    // largest local output width of a linear layer
    int64_t max_heads = 0;   // local query heads
    int64_t max_head_dim = 0;
    int64_t max_context = 0;  // longest sequence
    // Called with the input of every linear and gated_linear, in the order of the calls. For
    // calibration; lent.
    const std::function<void(const MatrixView& x)>* observer = nullptr;
    bool quantised = false;  // some linear layer has a storage other than kFloat
  };
  Context(const Options& options, ThreadPool& pool);
  ~Context();
  [[nodiscard]] Isa isa() const;
  [[nodiscard]] ThreadPool& pool() const;
  void observe(const MatrixView& x) const;
  struct Scratch;
  [[nodiscard]] Scratch& scratch() const;
  [[nodiscard]] int64_t scratch_bytes() const;
  // scratch_bytes() of a context yet to be made on a pool of `threads`.
  [[nodiscard]] static int64_t bytes_for(const Options& options, int threads);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// --- Linear layers ---------------------------------------------------------------------------

// Output rows of a weight [n, k], packed in panels of 16 rows for one path. The memory is lent
// (the rank's arena). Rows are padded to whole panels, k to an even number, with zeros.
struct PackedLinear {
  const std::byte* data = nullptr;
  int64_t rows = 0;  // output rows without padding
  int64_t k = 0;
  DType dtype = DType::kBF16;  // of the stored weights: bf16, f16, f32
  Isa isa = Isa::kRef;

  // Quantised weights (ops/quantised.h). dtype is then that of the checkpoint's float tensors, so
  // that x has the same type as before a float weight: bf16, or f32.
  quant::Storage storage = quant::Storage::kFloat;
  int64_t group = 0;               // k per scale
  bool zeros = false;              // zero points are stored
  const float* input = nullptr;    // kInt8: scale and offset of static activations; else per token
  const int32_t* order = nullptr;  // [k]: column of x that belongs to each place, or 0, 1, 2, ...
  const float* own_bias = nullptr; // f32 [rows]: the bias that belongs to the format; instead of `bias`
  // Rows of several formats, one after the other; nothing of the above but rows and k counts then.
  std::vector<PackedLinear> parts;
};

// Bytes that pack needs for [rows, k] of `dtype`, a multiple of 64; the address must be 64-aligned.
[[nodiscard]] int64_t packed_bytes(int64_t rows, int64_t k, DType dtype, Isa isa);
// Packs rows [row_begin, row_begin + source.rows) of a linear of `rows` rows. Called piece by
// piece while reading; row_begin a multiple of 16 (the last piece may be short; its padding is
// zeroed). source: [n, k] of `dtype`, same k.
void pack_rows(const MatrixView& source, int64_t row_begin, int64_t rows, std::byte* packed,
               Isa isa);
// One row back as it was stored (bit-exact). out: k elements of w.dtype. For tied embeddings.
void unpack_row(const PackedLinear& w, int64_t row, void* out);

// out[T, rows] = x[T, k] * W^T (+ bias f32[rows]), whatever the storage of w. x: act (bf16 when weights are bf16, else f32).
// out: act or f32; rounded to out.dtype once, after the bias. Any strides.
void linear(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
            const MatrixView& out);

// Gate and up projections interleaved by panels: 16 gate rows, 16 up rows, ... (w.rows = 2 * n,
// where n is padded to whole panels for both: see pack_gated_rows).
// out[T, n] = round_act(silu(gate) * up), gate and up in f32, silu(x) = x / (1 + exp(-x)).
struct PackedGated {
  PackedLinear panels;  // rows = 2 * padded n
  int64_t rows = 0;     // n
  const float* own_gate_bias = nullptr;  // as PackedLinear::own_bias
  const float* own_up_bias = nullptr;
  // Gate and up of different formats: two layers instead of panels.
  std::vector<PackedLinear> halves;
};
[[nodiscard]] int64_t packed_gated_bytes(int64_t rows, int64_t k, DType dtype, Isa isa);
// As pack_rows, for the gate (which = 0) or up (which = 1) half.
void pack_gated_rows(const MatrixView& source, int64_t row_begin, int64_t rows, int which,
                     std::byte* packed, Isa isa);
void gated_linear(Context& ctx, const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out);

// --- Rows ------------------------------------------------------------------------------------

// out[T, h] = round_act(x * rsqrt(mean(x^2) + eps) * weight (+ bias)). x: f32 [T, h]; weight, bias
// f32[h]; bias nullptr: none.
// The sum of squares is taken over the whole row in fixed lanes (16 lanes, lane tree 8-4-2-1).
void rms_norm(Context& ctx, const MatrixView& x, const float* weight, float eps,
              const MatrixView& out, const float* bias = nullptr);
// residual[T, h] (f32) += delta[T, h] (act); out = rms_norm(residual).
void add_rms_norm(Context& ctx, const MatrixView& residual, const MatrixView& delta,
                  const float* weight, float eps, const MatrixView& out,
                  const float* bias = nullptr);
// residual += delta.
void add(Context& ctx, const MatrixView& residual, const MatrixView& delta);

// --- Attention -------------------------------------------------------------------------------

// cos and sin for positions [0, positions), f32, made once at load with our own sin/cos (double
// precision, portable): cos[p][i] = cos(f32(p * inv_freq[i])) * scale, i < rotary_dim / 2.
struct RopeTable {
  int64_t rotary_dim = 0;
  int64_t positions = 0;
  std::vector<float> cos;  // [positions][rotary_dim / 2]
  std::vector<float> sin;
};
[[nodiscard]] RopeTable make_rope_table(std::span<const float> inv_freq, int64_t positions,
                                        float scale);
// One position more, whose frequencies may differ.
void append_position(RopeTable& table, std::span<const float> inv_freq, float scale);

// K and V of one layer on this rank: [block][kv_head], then block_size positions of head_dim as
// kv_layout.h lays them out; dtype bf16, f32 or i8.
//
// i8 holds a value x as x / scale (+ offset), rounded to the nearest even integer and clamped to
// [-128, 127] (NaN: 0). Two kinds of scales, of which exactly one is given:
//   fixed    k_scale, v_scale f32 [kv_heads][head_dim], finite and > 0; k_offset, v_offset the same
//            or nullptr. Attention multiplies q by k_scale once and its output by v_scale; an
//            offset of keys shifts all scores of a row alike, so only rope_and_store needs it.
//   dynamic  k_row_scale, v_row_scale f32 [block][kv_head][block_size], one per token and head,
//            largest magnitude / 127, written by rope_and_store.
//
// Where v is k (and v_row_scale is k_row_scale) each row is stored once, rotated, as key and as value
// (MLA); there are no fixed scales then.
struct KvLayer {
  std::byte* k = nullptr;
  std::byte* v = nullptr;
  DType dtype = DType::kBF16;
  int64_t blocks = 0;
  int64_t block_size = 0;
  int64_t kv_heads = 0;  // stored on this rank
  int64_t head_dim = 0;

  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  const float* k_offset = nullptr;
  const float* v_offset = nullptr;
  float* k_row_scale = nullptr;
  float* v_row_scale = nullptr;

  [[nodiscard]] bool shared() const { return v == k; }
};

// qkv: f32 or act [T, (q_heads + 2 * kv_heads) * head_dim] as linear wrote it: q heads, k heads,
// v heads (no v heads where kv is shared). Rotates q and k (half-split pairs i, i + rotary_dim/2) in f32, writes q back rounded to
// qkv.dtype, and stores k and v, rounded once to kv.dtype, in slot[t] = block * block_size +
// offset.
void rope_and_store(Context& ctx, const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv);

// One sequence of a step: tokens [token_begin, token_begin + token_count) of the step are its
// positions [context - token_count, context). block_table: ceil(context / block_size) block ids.
struct SequenceSlice {
  int32_t token_begin = 0;
  int32_t token_count = 0;
  int32_t context = 0;
  const int32_t* block_table = nullptr;
};

struct AttentionShape {
  int64_t q_heads = 0;        // local
  int64_t q_head_begin = 0;   // global number of the first local query head
  int64_t group = 1;          // query heads per KV head
  int64_t kv_head_begin = 0;  // global number of the first KV head stored here
  int64_t head_dim = 0;
  float scale = 0;     // 1 / sqrt(head_dim) usually
  int64_t window = 0;  // sliding window in positions, 0 = none
};

// Causal. q: the first q_heads * head_dim columns of qkv (row stride of qkv), rounded as stored.
// out: act [T, q_heads * head_dim], any stride. Scores and sums in f32, in chunks of 256 absolute
// positions: each chunk gives (max, sum, output), merged in ascending order (prefill and decode
// alike). K and V are read only as stored. In the class bf16dp, with bf16 q and bf16 or i8 KV, both
// products are sums of pairs: over channels, and over positions 2i, 2i + 1, whose weights (not
// their sum) are rounded to bf16.
inline constexpr int64_t kAttentionChunk = 256;
void attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out);

}  // namespace phalanx::ops
