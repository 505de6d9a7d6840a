#include "phalanx/api/access.h"

#include <fmt/format.h>

#include <algorithm>
#include <random>

namespace phalanx::api {
namespace {

constexpr size_t kLongestId = 128;
constexpr size_t kLongestPathShown = 256;

bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= kLongestId &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return c > ' ' && c < 0x7f && c != '"' && c != '\\'; });
}

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
}

// 00-<32 hexadecimal digits>-<16>-<2>, not all zero (W3C Trace Context, 3.2).
bool is_traceparent(std::string_view t) {
  if (t.size() < 55 || t[2] != '-' || t[35] != '-' || t[52] != '-') return false;
  if (t.substr(0, 2) == "00" && t.size() != 55) return false;
  if (t.substr(0, 2) == "ff" || (t.size() > 55 && t[55] != '-')) return false;
  const auto zero = [](std::string_view part) {
    return part.find_first_not_of('0') == std::string_view::npos;
  };
  return is_hex(t.substr(0, 2)) && is_hex(t.substr(3, 32)) && is_hex(t.substr(36, 16)) &&
         is_hex(t.substr(53, 2)) && !zero(t.substr(3, 32)) && !zero(t.substr(36, 16)) && is_name(t);
}

// What a client sent, made harmless for a log line.
std::string visible(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, kLongestPathShown)) {
    if (c > ' ' && c < 0x7f && c != '"' && c != '\\')
      out += c;
    else
      out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  if (text.size() > kLongestPathShown) out += "...";
  return out;
}

}  // namespace

std::string to_line(const AccessRecord& r) {
  return fmt::format("access {} {} \"{} {}\" {} {} bytes, first {:.3f} ms, all {:.3f} ms, {}id {}{}{}",
                     r.peer, r.user.empty() ? "-" : r.user, visible(r.method), visible(r.path),
                     r.status, r.bytes, r.first_byte_seconds * 1e3, r.seconds * 1e3,
                     r.stream ? "stream, " : "", r.request_id, r.trace.empty() ? "" : " trace ",
                     r.trace);
}

std::string_view own_request_id(const HttpRequest& request) {
  const std::string_view id = request.header("x-request-id");
  return is_name(id) ? id : std::string_view();
}

std::string trace_of(const HttpRequest& request) {
  const std::string_view parent = request.header("traceparent");
  if (is_traceparent(parent)) return std::string(parent);
  const std::string_view b3 = request.header("b3");
  if (is_name(b3)) return fmt::format("b3={}", b3);
  const std::string_view trace = request.header("x-b3-traceid");
  const std::string_view span = request.header("x-b3-spanid");
  const std::string_view sampled = request.header("x-b3-sampled");
  if (!is_name(trace) || !is_name(span)) return {};
  return fmt::format("b3={}-{}{}{}", trace, span, is_name(sampled) ? "-" : "",
                     is_name(sampled) ? sampled : std::string_view());
}

std::string make_uuid() {
  thread_local std::mt19937_64 random(std::random_device{}());
  const uint64_t a = random();
  const uint64_t b = random();
  return fmt::format("{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}", a >> 32, (a >> 16) & 0xffff, a & 0xfff,
                     0x8000 | ((b >> 48) & 0x3fff), b & 0xffffffffffff);
}

}  // namespace phalanx::api
