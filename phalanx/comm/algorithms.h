#pragma once

#include <span>
#include <vector>

#include "phalanx/comm/exchange.h"
#include "phalanx/comm/region.h"

namespace phalanx::comm {

// Collectives over links, written once for any kind of link. All take place among `ranks`, of which
// this rank is ranks[position]; every one of them is linked to every other. Exchange::begin() has
// named the operation. blocks[i] belongs to ranks[i] and may lie anywhere.

// Every rank's block to every rank, in one hop.
void all_gather_one_hop(Exchange& exchange, std::span<const int> ranks, int position,
                        std::span<const Region> blocks);
// The same in ranks.size() - 1 steps to the right neighbour: one stream in and one out at a time.
void all_gather_ring(Exchange& exchange, std::span<const int> ranks, int position,
                     std::span<const Region> blocks);

// From ranks[0]. Few or small: from the root to all (<= 4 ranks) or along a binomial tree. Large: a
// chain in pieces, where every rank sends each byte once.
void broadcast(Exchange& exchange, std::span<const int> ranks, int position,
               std::span<std::byte> bytes);

// Returns when all have called it: log2 steps.
void barrier(Exchange& exchange, std::span<const int> ranks, int position);

}  // namespace phalanx::comm
