#include "apps/bench_tls.h"

#include <cstdlib>
#include <filesystem>

#include "apps/certs_issue.h"
#include "phalanx/base/error.h"

namespace phalanx::apps {

BenchCertificates::BenchCertificates(const cluster::RankTable& table) {
  folder_ = (std::filesystem::temp_directory_path() / "phalanx-bench-XXXXXX").string();
  if (::mkdtemp(folder_.data()) == nullptr)
    throw Error(Code::kPermissionDenied, "bench: cannot make a folder for certificates");
  issue_all({.folder = folder_, .days = 1}, table);
}

BenchCertificates::~BenchCertificates() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

InterNodeTls BenchCertificates::of(const cluster::RankTable& table, int own_server) const {
  Problems problems;
  Problems warnings;
  InterNodeTls tls = load_inter_node_tls({.table = table,
                                          .own_server = own_server,
                                          .written = true,
                                          .how_to_switch_off = "a layout without tls:",
                                          .data_plane = {},
                                          .table_path = {},
                                          .home = folder_,
                                          .certs = folder_},
                                         {}, problems, warnings);
  problems.throw_if_any("bench: certificates");
  return tls;
}

}  // namespace phalanx::apps
