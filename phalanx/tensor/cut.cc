#include "phalanx/tensor/cut.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "phalanx/base/check.h"

namespace phalanx::tensor {

std::vector<Range> cut(int64_t total, int64_t unit, std::span<const double> weights,
                       bool remainder_to_high) {
  PHALANX_CHECK(total >= 0 && unit > 0 && !weights.empty());
  const int64_t units = (total + unit - 1) / unit;
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  const int n = static_cast<int>(weights.size());
  std::vector<int64_t> share(n);
  std::vector<double> rest(n);
  int64_t given = 0;
  for (int r = 0; r < n; ++r) {
    const double exact = static_cast<double>(units) * weights[r] / sum;
    share[r] = static_cast<int64_t>(std::floor(exact + 1e-9));
    rest[r] = exact - static_cast<double>(share[r]);
    given += share[r];
  }
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (remainder_to_high) std::reverse(order.begin(), order.end());
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return rest[a] > rest[b] + 1e-9; });
  for (int i = 0; given < units; i = (i + 1) % n, ++given) ++share[order[i]];
  std::vector<Range> ranges(n);
  int64_t begin = 0;
  for (int r = 0; r < n; ++r) {
    const int64_t end = begin + share[r];
    ranges[r] = {std::min(total, begin * unit), std::min(total, end * unit)};
    begin = end;
  }
  return ranges;
}

Range kv_heads_of(Range query_heads, int64_t group) {
  if (query_heads.size() == 0) return {query_heads.begin / group, query_heads.begin / group};
  return {query_heads.begin / group, (query_heads.end - 1) / group + 1};
}

}  // namespace phalanx::tensor
