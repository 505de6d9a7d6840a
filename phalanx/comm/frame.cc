#include "phalanx/comm/frame.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace phalanx::comm {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

namespace {
constexpr uint32_t kBodyMagic = 0x45594250;  // "PBYE"

struct FarewellBody {
  uint32_t magic = kBodyMagic;
  int32_t code = 0;  // 0: clean
  int32_t culprit = -1;
  uint32_t text_bytes = 0;
  char text[kFarewellBytes - sizeof(FrameHeader) - 16] = {};
};
static_assert(sizeof(FarewellBody) + sizeof(FrameHeader) == kFarewellBytes);
}  // namespace

const char* operation_name(Operation operation) {
  switch (operation) {
    case Operation::kAllGather: return "all_gather";
    case Operation::kGather: return "gather";
    case Operation::kBroadcast: return "broadcast";
    case Operation::kAllReduce: return "all_reduce";
    case Operation::kBarrier: return "barrier";
    case Operation::kFarewell: return "farewell";
  }
  return "unknown operation";
}

FarewellFrame encode_farewell(int sender, uint64_t generation, const Fault* fault) {
  FrameHeader header;
  header.operation = Operation::kFarewell;
  header.sender = static_cast<uint16_t>(sender);
  header.generation = generation;
  header.length = sizeof(FarewellBody);
  FarewellBody body;
  if (fault != nullptr) {
    body.code = static_cast<int32_t>(fault->code);
    body.culprit = fault->culprit;
    body.text_bytes = static_cast<uint32_t>(std::min(fault->text.size(), sizeof body.text));
    std::memcpy(body.text, fault->text.data(), body.text_bytes);
  }
  FarewellFrame frame;
  std::memcpy(frame.data(), &header, sizeof header);
  std::memcpy(frame.data() + sizeof header, &body, sizeof body);
  return frame;
}

std::optional<Farewell> decode_farewell(std::span<const std::byte> bytes, uint64_t generation) {
  if (bytes.size() != kFarewellBytes) return std::nullopt;
  FrameHeader header;
  FarewellBody body;
  std::memcpy(&header, bytes.data(), sizeof header);
  std::memcpy(&body, bytes.data() + sizeof header, sizeof body);
  FrameHeader expected;
  expected.operation = Operation::kFarewell;
  expected.sender = header.sender;
  expected.generation = generation;
  expected.length = sizeof body;
  if (header != expected || body.magic != kBodyMagic) return std::nullopt;
  Farewell farewell;
  farewell.clean = body.code == 0;
  if (!farewell.clean) {
    farewell.fault.code = body.code > 0 && body.code <= 15 ? static_cast<Code>(body.code)
                                                           : Code::kUnknown;
    farewell.fault.culprit = body.culprit;
    farewell.fault.text.assign(body.text, std::min<size_t>(body.text_bytes, sizeof body.text));
    for (char& c : farewell.fault.text)
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return farewell;
}

}  // namespace phalanx::comm
