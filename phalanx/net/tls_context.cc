#include "phalanx/net/tls_context.h"

#include <openssl/x509_vfy.h>

#include "phalanx/base/check.h"
#include "phalanx/net/openssl_handles.h"

namespace phalanx::net {

struct TlsContext::State {
  std::shared_ptr<const TlsMaterial> material;
  Options options;

  // Empty: accepted. `error` is what decides the alert that the peer gets.
  std::string judge(X509_STORE_CTX* store, int& error) const;
  static int verify(X509_STORE_CTX* store, void* argument);
};

namespace {

constexpr size_t kMaxPeerChain = 32 << 10;  // bytes of certificates taken from a peer

// Sheet: startup-security.md §4.1.
constexpr const char* kCipherSuites =
    "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:"
    "TLS_AES_128_CCM_SHA256";

void free_text(void*, void* text, CRYPTO_EX_DATA*, int, long, void*) {
  delete static_cast<std::string*>(text);
}

int refusal_index() {
  static const int index = SSL_get_ex_new_index(0, nullptr, nullptr, nullptr, free_text);
  return index;
}

// Keeps the State alive as long as the SSL_CTX, which connections hold on to.
void free_state(void*, void* state, CRYPTO_EX_DATA*, int, long, void*) {
  delete static_cast<std::shared_ptr<void>*>(state);
}

int state_index() {
  static const int index = SSL_CTX_get_ex_new_index(0, nullptr, nullptr, nullptr, free_state);
  return index;
}

}  // namespace

std::string TlsContext::State::judge(X509_STORE_CTX* store, int& error) const {
  error = X509_V_ERR_APPLICATION_VERIFICATION;
  X509* const leaf = X509_STORE_CTX_get0_cert(store);
  if (leaf == nullptr) return "peer sent no certificate";
  std::vector<Certificate> chain{Certificate(leaf)};
  STACK_OF(X509)* sent = X509_STORE_CTX_get0_untrusted(store);
  for (int i = 0; i < sk_X509_num(sent); ++i)
    if (X509_cmp(sk_X509_value(sent, i), leaf) != 0) chain.emplace_back(sk_X509_value(sent, i));
  const Usage usage = options.side == Side::kServer ? Usage::kClient : Usage::kServer;
  if (const auto found = material->verifier().problem(chain, usage, "certificate of the peer")) {
    error = X509_V_ERR_CERT_UNTRUSTED;
    return to_string(*found);
  }
  return options.identity ? options.identity(chain[0].info()) : std::string();
}

int TlsContext::State::verify(X509_STORE_CTX* store, void* argument) {
  const auto* state = static_cast<const State*>(argument);
  int error = X509_V_ERR_APPLICATION_VERIFICATION;
  std::string sentence;
  try {
    sentence = state->judge(store, error);
    if (sentence.empty()) {
      X509_STORE_CTX_set_error(store, X509_V_OK);
      return 1;
    }
    if (state->options.refused) state->options.refused(sentence);
  } catch (const std::exception& failure) {
    sentence = failure.what();
  }
  X509_STORE_CTX_set_error(store, error);
  auto* ssl = static_cast<SSL*>(
      X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
  if (ssl != nullptr) {
    delete static_cast<std::string*>(SSL_get_ex_data(ssl, refusal_index()));
    SSL_set_ex_data(ssl, refusal_index(), new std::string(sentence));
  }
  return 0;
}

TlsContext::TlsContext(std::shared_ptr<const TlsMaterial> material, Options options)
    : state_(std::make_shared<State>(State{std::move(material), std::move(options)})),
      context_(SSL_CTX_new(state_->options.side == Side::kServer ? TLS_server_method()
                                                                 : TLS_client_method()),
               SSL_CTX_free) {
  SSL_CTX* const context = context_.get();
  PHALANX_CHECK(context != nullptr);
  const TlsMaterial& own = *state_->material;
  PHALANX_CHECK(SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1);
  PHALANX_CHECK(SSL_CTX_set_ciphersuites(context, kCipherSuites) == 1);
  SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION |
                                   SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
  SSL_CTX_set_num_tickets(context, 0);
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_max_cert_list(context, kMaxPeerChain);
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                                SSL_MODE_RELEASE_BUFFERS);
  if (!own.chain().empty()) {
    // The material was checked: key and certificate fit.
    SSL_CTX_set_security_level(context, 2);
    PHALANX_CHECK(SSL_CTX_use_certificate(context, own.chain()[0].native()) == 1);
    for (size_t i = 1; i < own.chain().size(); ++i)
      PHALANX_CHECK(SSL_CTX_add1_chain_cert(context, own.chain()[i].native()) == 1);
    PHALANX_CHECK(SSL_CTX_use_PrivateKey(context, own.native_key()) == 1);
  }
  const bool judged = state_->options.side == Side::kClient || state_->options.mutual;
  SSL_CTX_set_verify(
      context, judged ? SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT : SSL_VERIFY_NONE,
      nullptr);
  if (judged) {
    SSL_CTX_set_cert_verify_callback(context, &State::verify, state_.get());
    if (state_->options.side == Side::kServer)
      for (const Certificate& authority : own.verifier().options().authorities)
        SSL_CTX_add_client_CA(context, authority.native());
  }
  SSL_CTX_set_ex_data(context, state_index(), new std::shared_ptr<void>(state_));
  ERR_clear_error();
}

const TlsMaterial& TlsContext::material() const { return *state_->material; }

TlsContext::Side TlsContext::side() const { return state_->options.side; }

std::string refusal(const ssl_st* connection) {
  const auto* text = static_cast<const std::string*>(SSL_get_ex_data(connection, refusal_index()));
  return text != nullptr ? *text : std::string();
}

std::optional<Certificate> peer_certificate(const ssl_st* connection) {
  X509* const x509 = SSL_get0_peer_certificate(connection);
  if (x509 == nullptr) return std::nullopt;
  return Certificate(x509);
}

}  // namespace phalanx::net
