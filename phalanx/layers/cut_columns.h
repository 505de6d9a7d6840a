#pragma once

#include <span>
#include <vector>

#include "phalanx/comm/group.h"
#include "phalanx/tensor/cut.h"
#include "phalanx/tensor/tensor_view.h"

namespace phalanx::layers {

using tensor::DType;
using tensor::MatrixView;
using tensor::Range;

// The columns of a whole matrix [T, sum of all], cut over the ranks: each writes its own, then a
// gather makes the matrix whole. This is the only place where a linear layer meets other ranks.
class CutColumns {
 public:
  // ranges: one per rank, adjacent, in things of `width` columns each.
  CutColumns(std::span<const Range> ranges, int64_t width, DType dtype, int rank);

  [[nodiscard]] int64_t total() const { return total_; }
  [[nodiscard]] int64_t own_count() const { return own_.size(); }
  [[nodiscard]] MatrixView own(const MatrixView& whole) const {
    return whole.columns(own_.begin, own_.size());
  }
  // whole: [T, total()] without gaps.
  void all_gather(comm::Group& group, const MatrixView& whole) const;
  // As Group::gather to rank 0: there the whole matrix, elsewhere own columns only, without gaps.
  void gather_to_first(comm::Group& group, const MatrixView& matrix) const;

 private:
  Range own_;  // columns
  int64_t total_ = 0;
  DType dtype_;
  std::vector<int64_t> row_bytes_;  // of each rank
};

}  // namespace phalanx::layers
