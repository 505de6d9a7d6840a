#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/frame.h"

namespace phalanx::comm {

// The first bytes on a connection, from the side that connects. Little-endian, no padding.
struct Hello {
  uint64_t magic = kMagic;
  uint32_t version = kWireVersion;
  uint32_t sender = 0;    // rank
  uint32_t receiver = 0;  // rank
  uint32_t size = 0;      // of the group
  uint64_t generation = 0;
  Token token{};

  static constexpr uint64_t kMagic = 0x315854414E4C4850;  // "PHLNATX1"
};
static_assert(sizeof(Hello) == 64);

enum class Verdict : uint32_t {
  kWelcome = 0,
  kStranger = 1,  // wrong magic or token: closed without a word
  kVersion = 2,
  kGeneration = 3,
  kRank = 4,      // not a peer that connects to this rank, or the size of the group differs
  kIdentity = 5,  // under TLS: the certificate is that of another node
};

// The answer to a hello whose token was right.
struct HelloReply {
  uint64_t magic = Hello::kMagic;
  uint32_t version = kWireVersion;
  Verdict verdict = Verdict::kWelcome;
  uint64_t generation = 0;
  uint32_t rank = 0;
  uint32_t size = 0;
};
static_assert(sizeof(HelloReply) == 32);

// What rank `receiver` says to `hello`. The token is compared in constant time, and first.
[[nodiscard]] Verdict judge(const Hello& hello, const Hello& expected);

}  // namespace phalanx::comm
