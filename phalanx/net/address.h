#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace phalanx::net {

// A numeric IPv4 or IPv6 address, without port, brackets or zone.
class Address {
 public:
  // Value: nothing if `text` is not a numeric address ("1.2.3", "host", "-.-.-.-", "").
  [[nodiscard]] static std::optional<Address> parse(std::string_view text);

  [[nodiscard]] bool is_v6() const { return v6_; }
  [[nodiscard]] bool is_all_zero() const;
  [[nodiscard]] bool is_loopback() const;  // 127.0.0.0/8, ::1
  [[nodiscard]] std::string text() const;  // canonical: equal addresses give equal texts
  friend bool operator==(const Address&, const Address&) = default;

 private:
  bool v6_ = false;
  uint8_t bytes_[16] = {};  // the first 4 for IPv4
};

// True for two spellings of one address; other texts are compared as they are.
[[nodiscard]] bool same_address(std::string_view a, std::string_view b);

// "1.2.3.4:80", "[::1]:80".
[[nodiscard]] std::string endpoint(std::string_view address, uint16_t port);

// Whether this machine can bind it (all of 127.0.0.0/8 included). False for what is not an address.
[[nodiscard]] bool is_local(std::string_view address);

struct OwnAddress {
  std::string address;
  std::string interface;
};
// Addresses of the interfaces that are up, IPv4 first.
[[nodiscard]] std::vector<OwnAddress> own_addresses();
// "127.0.0.1 (lo), 10.0.0.5 (eth0)", for messages.
[[nodiscard]] std::string own_addresses_text();

// Numeric address of a host name: IPv4 if it has one, else IPv6. Numeric input comes back in
// canonical form. Throws Error(kNotFound) with the resolver's reason. May block on DNS.
[[nodiscard]] std::string resolve(const std::string& host);

// Why a listener cannot be opened there now ("Address already in use (by phalanx, pid 12)"), empty
// when it can. The answer may be out of date at once: use it for early checks and messages.
[[nodiscard]] std::string port_problem(std::string_view address, uint16_t port);
// First port of [begin, end] without a port_problem.
[[nodiscard]] std::optional<uint16_t> first_free_port(std::string_view address, uint16_t begin,
                                                      uint16_t end);

}  // namespace phalanx::net
