#include "phalanx/comm/tcp/hello.h"

namespace phalanx::comm {

Verdict judge(const Hello& hello, const Hello& expected) {
  unsigned different = 0;
  for (size_t i = 0; i < hello.token.size(); ++i)
    different |= std::to_integer<unsigned>(hello.token[i] ^ expected.token[i]);
  if (different != 0 || hello.magic != Hello::kMagic) return Verdict::kStranger;
  if (hello.version != expected.version) return Verdict::kVersion;
  if (hello.generation != expected.generation) return Verdict::kGeneration;
  // The higher rank connects to the lower.
  if (hello.receiver != expected.receiver || hello.size != expected.size ||
      hello.sender <= hello.receiver || hello.sender >= hello.size)
    return Verdict::kRank;
  return Verdict::kWelcome;
}

}  // namespace phalanx::comm
