#include "phalanx/layers/cut_columns.h"

#include "phalanx/base/check.h"

namespace phalanx::layers {

CutColumns::CutColumns(std::span<const Range> ranges, int64_t width, DType dtype, int rank)
    : dtype_(dtype) {
  for (const Range& range : ranges) {
    PHALANX_CHECK(range.begin * width == total_);
    row_bytes_.push_back(range.size() * width *
                         static_cast<int64_t>(tensor::dtype_bytes(dtype)));
    total_ = range.end * width;
  }
  const Range& mine = ranges[static_cast<size_t>(rank)];
  own_ = {mine.begin * width, mine.end * width};
}

void CutColumns::all_gather(comm::Group& group, const MatrixView& whole) const {
  PHALANX_CHECK(whole.cols == total_ && whole.stride == total_ && whole.dtype == dtype_);
  group.all_gather(static_cast<std::byte*>(whole.data), whole.rows, row_bytes_);
}

void CutColumns::gather_to_first(comm::Group& group, const MatrixView& matrix) const {
  PHALANX_CHECK(matrix.cols == (group.rank() == 0 ? total_ : own_.size()) &&
                matrix.stride == matrix.cols && matrix.dtype == dtype_);
  group.gather(static_cast<std::byte*>(matrix.data), matrix.rows, row_bytes_, 0);
}

}  // namespace phalanx::layers
