#pragma once

#include <functional>
#include <string>
#include <vector>

namespace phalanx::apps {

// Ranks of one bench: "1x2" is one node with one rank of two threads; "2x1" two ranks of one thread
// joined by shared memory; "1x1+1x1" two nodes joined by TCP over loopback; "veth:1x1+1x1" the same
// over a veth pair between network namespaces; with "tls:" before either, under TLS 1.3;
// with "ucx:", tensors over UCX.
struct BenchLayout {
  struct Node {
    int ranks = 1;
    int threads = 1;  // of each rank
  };
  std::string name;
  bool tls = false;
  bool ucx = false;
  bool veth = false;
  std::vector<Node> nodes;

  [[nodiscard]] int ranks() const;
  [[nodiscard]] int threads() const;  // of all ranks
  // Of all ranks on nodes before this one.
  [[nodiscard]] int threads_before(int node) const;
  [[nodiscard]] std::string address(int node) const;
};

// Throws Error(kInvalidArgument) naming the text.
[[nodiscard]] BenchLayout parse_layout(const std::string& text);

// Runs body(node, fd) in one process per node (forked: call it before there are threads) and
// returns what node 0 wrote to its descriptor. Throws Error when a node fails.
[[nodiscard]] std::string run_nodes(const BenchLayout& layout,
                                    const std::function<int(int node, int fd)>& body);

}  // namespace phalanx::apps
