#include "phalanx/comm/algorithms.h"

#include <algorithm>

namespace phalanx::comm {

namespace {

constexpr int kFlatRanks = 4;
constexpr int64_t kChainBytes = 1 << 20;  // from here, with 3 ranks or more
constexpr int64_t kChainPiece = 256 << 10;

void broadcast_flat(Exchange& exchange, std::span<const int> ranks, int position,
                    const Region& whole) {
  if (position == 0) {
    for (size_t i = 1; i < ranks.size(); ++i) exchange.send(ranks[i], {&whole, 1});
  } else {
    exchange.recv(ranks[0], {&whole, 1});
  }
  exchange.run();
}

// Position p receives from p without its highest bit and feeds p + 2^k for all larger powers.
void broadcast_tree(Exchange& exchange, std::span<const int> ranks, int position,
                    const Region& whole) {
  const int count = static_cast<int>(ranks.size());
  int bit = 1;
  if (position > 0) {
    while (bit * 2 <= position) bit *= 2;
    exchange.recv(ranks[position - bit], {&whole, 1});
    exchange.run();
    bit *= 2;
  }
  for (; position + bit < count; bit *= 2) exchange.send(ranks[position + bit], {&whole, 1});
  exchange.run();
}

void broadcast_chain(Exchange& exchange, std::span<const int> ranks, int position,
                     std::span<std::byte> bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  const int64_t pieces = (size + kChainPiece - 1) / kChainPiece;
  const auto piece = [&](int64_t index) {
    const int64_t at = index * kChainPiece;
    return Region::plain(bytes.data() + at, std::min(kChainPiece, size - at));
  };
  const bool first = position == 0;
  const bool last = position + 1 == static_cast<int>(ranks.size());
  // While piece i comes in, piece i - 1 goes out; the root has all of them from the start.
  for (int64_t i = 0; i <= pieces; ++i) {
    if (!first && i < pieces) {
      const Region in = piece(i);
      exchange.recv(ranks[position - 1], {&in, 1});
    }
    if (!last && i > 0) {
      const Region out = piece(i - 1);
      exchange.send(ranks[position + 1], {&out, 1});
    }
    exchange.run();
  }
}

}  // namespace

void all_gather_one_hop(Exchange& exchange, std::span<const int> ranks, int position,
                        std::span<const Region> blocks) {
  const int count = static_cast<int>(ranks.size());
  for (int step = 1; step < count; ++step) {
    const int to = (position + step) % count;
    const int from = (position + count - step) % count;
    exchange.send(ranks[to], {&blocks[position], 1});
    exchange.recv(ranks[from], {&blocks[from], 1});
  }
  exchange.run();
}

void all_gather_ring(Exchange& exchange, std::span<const int> ranks, int position,
                     std::span<const Region> blocks) {
  const int count = static_cast<int>(ranks.size());
  const int right = (position + 1) % count;
  const int left = (position + count - 1) % count;
  for (int step = 0; step + 1 < count; ++step) {
    const int out = (position + count - step) % count;
    const int in = (position + 2 * count - step - 1) % count;
    exchange.send(ranks[right], {&blocks[out], 1});
    exchange.recv(ranks[left], {&blocks[in], 1});
    exchange.run();
  }
}

void broadcast(Exchange& exchange, std::span<const int> ranks, int position,
               std::span<std::byte> bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  const int count = static_cast<int>(ranks.size());
  const Region whole = Region::plain(bytes.data(), size);
  if (count > 2 && size >= kChainBytes) {
    broadcast_chain(exchange, ranks, position, bytes);
  } else if (count <= kFlatRanks) {
    broadcast_flat(exchange, ranks, position, whole);
  } else {
    broadcast_tree(exchange, ranks, position, whole);
  }
}

void barrier(Exchange& exchange, std::span<const int> ranks, int position) {
  const int count = static_cast<int>(ranks.size());
  for (int distance = 1; distance < count; distance *= 2) {
    exchange.send_signal(ranks[(position + distance) % count]);
    exchange.recv_signal(ranks[(position + count - distance) % count]);
    exchange.run();
  }
}

}  // namespace phalanx::comm
