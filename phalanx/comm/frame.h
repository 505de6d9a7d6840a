#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "phalanx/comm/fault.h"

namespace phalanx::comm {

// Version of everything that ranks exchange directly: hello, frames, shared memory. docs/wire.md.
inline constexpr uint32_t kWireVersion = 1;

enum class Operation : uint8_t {
  kAllGather = 1,
  kGather = 2,
  kBroadcast = 3,
  kAllReduce = 4,
  kBarrier = 5,
  kFarewell = 255,  // the last frame of a link
};

[[nodiscard]] const char* operation_name(Operation operation);

// Precedes every message on a link. Little-endian, no padding. The receiver knows the whole header
// in advance and compares it; no length from the wire is ever used.
struct FrameHeader {
  uint32_t magic = 0x44584850;  // "PHXD"
  uint8_t version = kWireVersion;
  Operation operation = Operation::kBarrier;
  uint16_t sender = 0;      // rank
  uint64_t generation = 0;
  uint64_t sequence = 0;    // collectives since the group was formed
  uint64_t length = 0;      // payload bytes that follow

  bool operator==(const FrameHeader&) const = default;
};
static_assert(sizeof(FrameHeader) == 32);

// A farewell frame: a header and a body of fixed size. An empty optional is a clean leave.
inline constexpr size_t kFarewellBytes = 512;
using FarewellFrame = std::array<std::byte, kFarewellBytes>;

[[nodiscard]] FarewellFrame encode_farewell(int sender, uint64_t generation, const Fault* fault);

struct Farewell {
  bool clean = false;
  Fault fault;  // if not clean
};
// Empty unless `bytes` is a farewell frame of this generation.
[[nodiscard]] std::optional<Farewell> decode_farewell(std::span<const std::byte> bytes,
                                                      uint64_t generation);

}  // namespace phalanx::comm
