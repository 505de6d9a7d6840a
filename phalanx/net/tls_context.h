#pragma once

#include <functional>
#include <memory>
#include <string>

#include "phalanx/net/tls_material.h"

struct ssl_ctx_st;  // OpenSSL's SSL_CTX
struct ssl_st;      // OpenSSL's SSL

namespace phalanx::net {

// TLS 1.3 of one plane, for any number of connections. Peers are judged by the material's verifier
// (authorities, dates, usage, strength, revocation lists as they are on disk at that moment) and
// then by `identity`. No tickets, no resumption, no early data, no client renegotiation.
// Thread-safe once made. Connections made from native() may outlive this object.
class TlsContext {
 public:
  enum class Side { kServer, kClient };
  struct Options {
    Side side = Side::kServer;
    // A server asks for a certificate and insists on it; false: one-way TLS. A client always
    // judges the server's.
    bool mutual = true;
    // Asked about a peer whose certificate is good: a sentence refuses it, an empty text accepts.
    // From any thread.
    std::function<std::string(const CertificateInfo& peer)> identity;
    // Told why each refused peer was refused. From any thread, during the handshake.
    std::function<void(const std::string& sentence)> refused;
  };
  TlsContext(std::shared_ptr<const TlsMaterial> material, Options options);

  // Owned by this object: take a reference of your own (SSL_CTX_up_ref) to keep it.
  [[nodiscard]] ssl_ctx_st* native() const { return context_.get(); }
  [[nodiscard]] const TlsMaterial& material() const;
  [[nodiscard]] Side side() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::shared_ptr<ssl_ctx_st> context_;
};

// Why this side refused the peer of a connection whose handshake failed; empty if it did not.
[[nodiscard]] std::string refusal(const ssl_st* connection);
// The peer's certificate after a handshake; nothing if it sent none.
[[nodiscard]] std::optional<Certificate> peer_certificate(const ssl_st* connection);

}  // namespace phalanx::net
