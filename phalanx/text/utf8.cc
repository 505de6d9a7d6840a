#include "phalanx/text/utf8.h"

namespace phalanx::text {
namespace {

struct Lead {
  int length;         // bytes of the character, 0: cannot begin one
  unsigned char low;  // bounds of the second byte
  unsigned char high;
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

std::string take_characters(std::string& pending, bool at_end) {
  std::string out;
  size_t at = 0;
  while (at < pending.size()) {
    const Lead lead = lead_of(static_cast<unsigned char>(pending[at]));
    int good = lead.length == 0 ? 0 : 1;
    while (good > 0 && good < lead.length && at + good < pending.size()) {
      const auto next = static_cast<unsigned char>(pending[at + good]);
      const unsigned char low = good == 1 ? lead.low : 0x80;
      const unsigned char high = good == 1 ? lead.high : 0xBF;
      if (next < low || next > high) break;
      ++good;
    }
    if (good > 0 && good == lead.length) {
      out.append(pending, at, good);
      at += good;
      continue;
    }
    if (good > 0 && at + good == pending.size() && !at_end) break;
    out += kReplacement;
    at += good == 0 ? 1 : good;
  }
  pending.erase(0, at);
  return out;
}

}  // namespace phalanx::text
