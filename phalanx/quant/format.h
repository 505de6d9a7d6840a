#pragma once

// How one linear weight is stored in a checkpoint, and what its bytes mean. Pure: no files, no
// kernels, no JSON. weights/quant_formats finds the format of each linear layer, layers/weight_plan
// reads the parts, ops packs the rows that assemble() returns.
//
// A weight is [n, k]: n output rows. Every part can be cut by output rows, so that each rank reads
// and keeps only its own.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/tensor/cut.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::quant {

using tensor::DType;
using tensor::Range;

// What the kernels multiply.
//   kInt8      int8 activations (per token, or static) times int8 weights, summed exactly in int32
//   others     float activations times a code's value, which bf16 and f16 hold exactly, summed in
//              the float class of the path, per group of k; then scaled in f32
enum class Storage : uint8_t { kFloat, kInt8, kCodes4, kCodes8, kCodesFp8 };

// How the checkpoint spells it.
enum class Scheme : uint8_t {
  kFloat,
  kMsW8A8,         // msModelSlim: weight i8, input_scale, input_offset, quant_bias, deq_scale
  kMsW8A8Dynamic,  // msModelSlim: weight i8, weight_scale, weight_offset; activation per token
  kMsW8A16,        // the same tensors, float activations
  kCtInt8,         // compressed-tensors int-quantized, int8 activations, static or per token
  kCtWeightInt8,   // compressed-tensors int-quantized, float activations
  kCtPacked,       // compressed-tensors pack-quantized, 4 or 8 bits
  kFp8,            // weight f8_e4m3, weight_scale_inv per block
  kAwq,            // AWQ, "gemm" layout
  kGptq,           // GPTQ
};

struct LinearFormat {
  Scheme scheme = Scheme::kFloat;
  Storage storage = Storage::kFloat;
  int bits = 8;
  int64_t group = 0;       // k per scale; 0: all of k
  int64_t block_rows = 1;  // rows per scale (FP8 blocks)
  bool static_input = false;
  bool zeros = false;      // zero points (or weight_offset) are stored
  bool input_zeros = false;
  bool scalar_scale = false;  // one weight_scale for all rows
  bool order = false;         // g_idx
  bool zeros_minus_one = false;  // GPTQ's first version stores zero points less one
  bool bias = false;       // a tensor `bias` belongs to the layer
  DType scale_dtype = DType::kF32;  // as stored
  std::string name;        // for reports: "W8A8_DYNAMIC", "int4 g128 (pack-quantized)"

  friend bool operator==(const LinearFormat&, const LinearFormat&) = default;
  // Whether the bias is part of the stored sums, so that no bias is added.
  [[nodiscard]] bool folds_bias() const { return scheme == Scheme::kMsW8A8; }
  // Whether the packed rows of two layers may lie in one matrix.
  [[nodiscard]] bool packs_with(const LinearFormat& other, int64_t k) const;
  [[nodiscard]] int64_t group_of(int64_t k) const { return group == 0 ? k : group; }
  [[nodiscard]] int64_t groups(int64_t k) const {
    return k == 0 ? 0 : (k + group_of(k) - 1) / group_of(k);
  }
};

// The formats of a checkpoint, by layer name ("model.layers.0.mlp.up_proj"). Layers not named are
// float.
struct Formats {
  std::map<std::string, LinearFormat, std::less<>> linears;
  std::string source;      // "msModelSlim", "compressed-tensors", ...
  bool kv_int8 = false;     // scales of an int8 KV cache are stored, per channel of k_proj and v_proj
  bool kv_offsets = false;  // and offsets
  // Norms with a bias that the linear layers behind them take back (anti-outlier).
  std::set<std::string, std::less<>> norm_biases;
  [[nodiscard]] const LinearFormat* find(std::string_view layer) const;
  // "W8A8_DYNAMIC (168 layers), W8A8 (24)", or "float".
  [[nodiscard]] std::string summary() const;
};

// One tensor of a layer, and how a range of output rows is found in it.
struct PartSpec {
  enum class Role : uint8_t {
    kCodes, kScale, kZero, kQuantBias, kDeqScale, kInputScale, kInputZero, kOrder
  };
  enum class Axis : uint8_t { kRows, kColumns, kWhole };
  Role role = Role::kCodes;
  std::string suffix;              // ".weight"
  std::vector<DType> dtypes;       // any of them
  std::vector<int64_t> shape;
  std::vector<int64_t> other_shape;  // also accepted; empty: none
  Axis axis = Axis::kRows;
  int64_t rows_per_unit = 1;       // output rows per index of that axis

  [[nodiscard]] Range units(Range rows) const {
    if (axis == Axis::kWhole) return {0, 1};
    return {rows.begin / rows_per_unit, (rows.end + rows_per_unit - 1) / rows_per_unit};
  }
};

// All tensors of a layer [n, k] but its bias.
[[nodiscard]] std::vector<PartSpec> parts(const LinearFormat& format, int64_t n, int64_t k);

// A part as read: its units() of some rows, without gaps; kColumns: [first dimension][units].
struct PartBytes {
  PartSpec::Role role = PartSpec::Role::kCodes;
  DType dtype = DType::kI8;
  std::span<const std::byte> bytes;
};

// Some rows of a weight in the one form that the kernels know.
// Value of element (r, i): scale[r][g] * (value_of(code) - zero[r][g]), g = i / group.
// kInt8: codes are two's complement, one group; y = (sum + add - zero * sum(x)) * s_x * scale.
struct Rows {
  Storage storage = Storage::kCodes8;
  int64_t rows = 0;
  int64_t k = 0;
  int64_t group = 0;
  std::vector<uint8_t> codes;   // [rows][k], in the order of `order` where there is one
  std::vector<float> scale;     // [rows][groups]
  std::vector<float> zero;      // [rows][groups]; empty: zeros
  std::vector<int32_t> add;     // kInt8: [rows]
};

// order: from read_order, or empty. All of `parts` that belong to the rows must be there. Adds to
// `problems` what is not finite or impossible, as "where: ...".
[[nodiscard]] Rows assemble(const LinearFormat& format, int64_t k, Range rows,
                            std::span<const PartBytes> parts, std::span<const int32_t> order,
                            const std::string& where, Problems& problems);

// From g_idx [k]: the k of each place, sorted by group; empty where that is 0, 1, 2, ...
[[nodiscard]] std::vector<int32_t> read_order(const LinearFormat& format, int64_t k,
                                              std::span<const std::byte> g_idx,
                                              const std::string& where, Problems& problems);

// scale and offset of static activations: x_q = clamp(round(x / scale) + offset, -128, 127).
struct InputScale {
  float scale = 1;
  float offset = 0;
};
[[nodiscard]] InputScale read_input(std::span<const PartBytes> parts, const std::string& where,
                                    Problems& problems);

// The value of a code, exact in bf16 and in f16:
//   kCodes4    0 ... 15            code - 8
//   kCodes8    sign and 7 bits j   +-(j + 0.5): the int8 q is q + 0.5 = value, so that no bit pattern
//                                  is left over and the sign is a bit of its own
//   kCodesFp8  e4m3
[[nodiscard]] float value_of(Storage storage, uint8_t code);
[[nodiscard]] uint8_t code_of_int8(int8_t q);
inline constexpr float kCodes8Zero = 0.5F;  // what belongs to the zero point of a kCodes8 weight

// More rows below.
void append(Rows& rows, Rows more);

// The weight in f32, [rows][k] in the order of the checkpoint: the formula, for tests and for layers
// that need a float matrix.
void dequantize(const Rows& rows, std::span<const int32_t> order, float* out);

}  // namespace phalanx::quant
