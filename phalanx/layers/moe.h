#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "phalanx/layers/cut_columns.h"
#include "phalanx/layers/linear.h"
#include "phalanx/layers/memory.h"
#include "phalanx/layers/weight_plan.h"
#include "phalanx/ops/moe.h"

namespace phalanx::layers {

// Which part of the experts each rank computes. With moe_ep = 1 every rank holds its rows of all of
// them. With more, ranks form moe_ep runs of moe_tp neighbours each; a run holds whole experts, and
// its ranks their rows of these. The bits are the same for every layout: each output element of an
// expert is the same sum over the same K, and the outputs of a token's experts are added in fp32 in
// ascending order of experts, the shared one last.
struct ExpertLayout {
  int moe_tp = 0;                 // ranks of a run; 0: all, which is moe_ep = 1
  std::vector<Range> experts;     // of each rank
  std::vector<Range> inner;       // rows of gate and up, of each rank
  std::vector<Range> outer;       // rows of down, of each rank
  std::vector<Range> shared;      // of the shared expert's gate and up
  std::vector<Range> hidden;      // of its down, and of the sums

  [[nodiscard]] bool expert_parallel() const { return moe_tp > 0; }
};

// A router and its experts, routed and shared.
class Moe {
 public:
  struct Shape {
    std::string name;  // "model.layers.3.mlp"
    std::string gate = "gate_proj";
    std::string up = "up_proj";
    std::string down = "down_proj";
    std::string shared = "shared_experts";
    std::string correction;  // name of the bias below `name`; empty: none
    int64_t hidden = 0;
    int64_t experts = 0;
    int64_t per_token = 0;
    int64_t intermediate = 0;
    int64_t shared_intermediate = 0;  // 0: no shared expert
    bool shared_gate = false;
    bool shared_bias = false;
    ops::RoutingRule rule;
  };
  // Tokens that are routed at once; a step of more is done piece by piece.
  static constexpr int64_t kPiece = 1024;
  static constexpr int64_t kExpertParallelPiece = 256;
  // Rows whose experts are computed together: at least those of any one expert.
  [[nodiscard]] static int64_t rows_at_once(int64_t piece, int64_t per_token) {
    return std::min(piece * per_token, std::max<int64_t>(piece, 512));
  }

  // The activations of one piece; lent to forward.
  struct Scratch {
    Scratch(Carver& carver, const Shape& shape, const ExpertLayout& layout, int64_t max_tokens,
            DType act, int rank);
    [[nodiscard]] static int64_t table_bytes(const Shape& shape, int64_t max_tokens);
    int64_t piece = 0;
    MatrixView wide;        // f32 [piece, hidden], where act is not f32
    MatrixView logits;      // f32 [piece, experts]
    MatrixView taken;       // act [rows_at_once, hidden], of some experts
    MatrixView inner;       // act [piece * per_token, intermediate]
    MatrixView shared;      // act [piece, shared_intermediate]
    MatrixView shared_gate; // f32 [piece, 1]
    MatrixView outer;       // f32 [rows_at_once, own rows of down], of some experts
    MatrixView sums;        // f32 [piece, own rows of hidden]
    MatrixView exchange;    // bytes of all ranks; expert parallel only
    ops::ExpertRows rows;
    std::vector<int32_t> all_tokens;  // 0, 1, 2, ...
    std::vector<float> ones;
    std::vector<ops::ExpertGated> gated;    // room reserved
    std::vector<ops::ExpertLinear> linear;
  };

  Moe(WeightPlan& plan, const Shape& shape, const ExpertLayout& layout, DType act, int rank);

  // x: act [T, hidden]. out: act [T, hidden] without gaps, whole on return on every rank.
  void forward(ops::Context& ctx, comm::Group& group, const MatrixView& x, Scratch& scratch,
               const MatrixView& out) const;

 private:
  struct Expert {
    ops::PackedGated gate_up;
    ops::PackedLinear down;
  };
  void route(ops::Context& ctx, const MatrixView& x, Scratch& scratch) const;
  void run_piece(ops::Context& ctx, comm::Group& group, const MatrixView& x, Scratch& scratch,
                 const MatrixView& out) const;
  // Own rows of the activations of own experts, then whole among those who share them.
  MatrixView run_inner(ops::Context& ctx, comm::Group& group, const MatrixView& x,
                       Scratch& scratch) const;
  // The down layers of experts [begin, end) and their rows, counted from the first's.
  void list_down(int64_t begin, int64_t end, Scratch& scratch) const;
  void add_cut(ops::Context& ctx, const MatrixView& inner, Scratch& scratch,
               const MatrixView& sums) const;
  void add_exchanged(ops::Context& ctx, comm::Group& group, const MatrixView& inner,
                     Scratch& scratch, const MatrixView& sums) const;
  void add_shared(ops::Context& ctx, comm::Group& group, const MatrixView& x, Scratch& scratch,
                  const MatrixView& sums) const;
  // The end of those of the experts [begin, end) that are computed together.
  [[nodiscard]] static int64_t together(const ops::ExpertRows& rows, int64_t begin, int64_t end,
                                        int64_t most);
  [[nodiscard]] const Range& experts_of(size_t rank) const { return layout_.experts[rank]; }

  Shape shape_;
  ExpertLayout layout_;
  DType act_;
  size_t rank_;
  ops::PackedLinear router_;
  const float* correction_ = nullptr;
  std::vector<Expert> experts_;  // own
  ops::PackedGated shared_gate_up_;
  const float* shared_gate_bias_ = nullptr;
  const float* shared_up_bias_ = nullptr;
  ops::PackedLinear shared_down_;
  const float* shared_down_bias_ = nullptr;
  ops::PackedLinear shared_gate_;
  CutColumns inner_columns_;
  CutColumns shared_columns_;
  CutColumns hidden_columns_;
};

}  // namespace phalanx::layers
