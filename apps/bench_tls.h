#pragma once

#include <string>

#include "apps/config_inter_node.h"

namespace phalanx::apps {

// Certificates for the nodes of a bench, in a folder of their own that goes with this object.
class BenchCertificates {
 public:
  explicit BenchCertificates(const cluster::RankTable& table);
  ~BenchCertificates();
  BenchCertificates(const BenchCertificates&) = delete;
  BenchCertificates& operator=(const BenchCertificates&) = delete;

  // TLS on the control and the data ports of this node, as `serve --certs` has it.
  [[nodiscard]] InterNodeTls of(const cluster::RankTable& table, int own_server) const;

 private:
  std::string folder_;
};

}  // namespace phalanx::apps
