#include "apps/certs_issue.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <set>

#include "apps/certs_files.h"
#include "apps/certs_layout.h"
#include "phalanx/base/json.h"
#include "phalanx/net/address.h"
#include "phalanx/net/authority.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kDay = 86400;
constexpr int64_t kClockSlack = 3600;    // machines' clocks differ
constexpr int64_t kAuthorityDays = 3650;
constexpr int64_t kLargest = 10 << 20;

struct Folder {
  std::string root;
  int days = 0;
  int64_t now = std::time(nullptr);

  [[nodiscard]] std::string authority(const std::string& name) const {
    return fmt::format("{}/{}/{}", root, kAuthorityFolder, name);
  }
  [[nodiscard]] std::string node(const std::string& address, std::string_view file) const {
    return fmt::format("{}/{}/{}", root, address, file);
  }
  [[nodiscard]] int64_t until() const { return now + days * kDay; }

  [[nodiscard]] std::vector<std::string> nodes() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(root)) {
      const std::string name = entry.path().filename();
      if (fs::exists(node(name, kPlanes[0].certificate))) found.push_back(name);
    }
    std::sort(found.begin(), found.end());
    return found;
  }
};

net::Authority open_authority(const Folder& folder) {
  const std::string certificate = folder.authority("ca.pem");
  if (!fs::exists(certificate))
    throw Error(Code::kNotFound,
                fmt::format("{}: no authority here. Fix: name the folder that 'phalanx certs init "
                            "--out' wrote",
                            certificate));
  Problems problems;
  Problems warnings;
  const net::Secret password = net::read_password(
      folder.authority("password.txt"),
      {folder.authority("ksfa"), ""}, problems, warnings);
  problems.throw_if_any("cannot open the authority's key");
  const net::Secret key = read_or_throw(folder.authority("ca.key.pem"));
  return {net::Certificate::parse(read_text_file(certificate, kLargest), certificate)[0],
          net::PrivateKey::parse(key.view(), password.view(), folder.authority("ca.key.pem"))};
}

net::Authority make_authority(const Folder& folder) {
  net::Authority authority = net::Authority::create(
      fmt::format("Phalanx authority {}", net::time_text(folder.now).substr(0, 10)),
      net::PrivateKey::make(net::PrivateKey::Kind::kEcP256), folder.now - kClockSlack,
      folder.now + kAuthorityDays * kDay);
  const net::Secret store = net::make_key_store();
  const net::Secret password = net::random_password();
  write_security_file(folder.authority("ksfa"), store.view());
  write_security_file(folder.authority("password.txt"),
                      net::encrypt_password(password.view(), store.view(), "key store"));
  write_security_file(folder.authority("ca.key.pem"), authority.key().pem(password.view()).view());
  write_security_file(folder.authority("crl.pem"),
                      authority.revocation_list({}, 1, folder.now - kClockSlack, folder.until()));
  write_security_file(folder.authority("ca.pem"), authority.certificate().pem());
  return authority;
}

// A key and a certificate for one plane of one node.
void issue(const Folder& folder, const net::Authority& authority, const std::string& node,
           const PlaneLayout& plane, net::CertificateOrder order, std::string_view store) {
  order.not_before = folder.now - kClockSlack;
  order.not_after = std::min(folder.until(), authority.certificate().info().not_after);
  const net::PrivateKey key = net::PrivateKey::make(net::PrivateKey::Kind::kEcP256);
  const net::Secret password = net::random_password();
  write_security_file(folder.node(node, plane.authority), authority.certificate().pem());
  write_security_file(folder.node(node, plane.password),
                      net::encrypt_password(password.view(), store, "key store"));
  write_security_file(folder.node(node, plane.key), key.pem(password.view()).view());
  write_security_file(folder.node(node, plane.certificate), authority.issue(order, key).pem());
}

void issue_client(const Folder& folder, const net::Authority& authority) {
  const net::PrivateKey key = net::PrivateKey::make(net::PrivateKey::Kind::kEcP256);
  const net::CertificateOrder order{.common_name = "client",
                                    .unit = "client",
                                    .role = "client",
                                    .for_server = false,
                                    .for_client = true,
                                    .not_before = folder.now - kClockSlack,
                                    .not_after = folder.until()};
  const std::string client(kClientFolder);
  write_security_file(folder.node(client, "ca.pem"), authority.certificate().pem());
  write_security_file(folder.node(client, "client.key.pem"), key.pem("").view());
  write_security_file(folder.node(client, "client.pem"), authority.issue(order, key).pem());
}

void spread_list(const Folder& folder) {
  const std::string list = read_text_file(folder.authority("crl.pem"), kLargest);
  for (const std::string& node : folder.nodes())
    for (const PlaneLayout& plane : kPlanes) write_security_file(folder.node(node, plane.revocations), list);
}

void renew_list(const Folder& folder, const net::Authority& authority,
                const std::vector<net::Revocation>& more) {
  const std::string path = folder.authority("crl.pem");
  net::RevocationList list =
      net::read_revocation_list(read_text_file(path, kLargest), path);
  for (const net::Revocation& one : more)
    if (std::none_of(list.revoked.begin(), list.revoked.end(),
                     [&](const net::Revocation& old) { return old.serial == one.serial; }))
      list.revoked.push_back(one);
  write_security_file(path, authority.revocation_list(list.revoked, list.number + 1,
                                                      folder.now - kClockSlack, folder.until()));
  spread_list(folder);
}

std::vector<std::string> addresses_of(const cluster::Server& server) {
  std::vector<std::string> all;
  const auto add = [&](const std::string& address) {
    if (!address.empty() && std::find(all.begin(), all.end(), address) == all.end())
      all.push_back(address);
  };
  add(server.address());
  add(server.server_id);
  for (const cluster::Device& device : server.devices) add(device.device_ip);
  return all;
}

void require_nodes(const Folder& folder, const std::vector<std::string>& nodes) {
  const std::vector<std::string> known = folder.nodes();
  for (const std::string& node : nodes)
    if (std::find(known.begin(), known.end(), node) == known.end())
      throw Error(Code::kNotFound, fmt::format("{} has no node {}, found {}", folder.root, node,
                                               fmt::join(known, ", ")));
}

}  // namespace

void issue_all(const IssueOptions& options, const cluster::RankTable& table) {
  const Folder folder{options.folder, options.days};
  const net::Authority authority =
      fs::exists(folder.authority("ca.pem")) ? open_authority(folder) : make_authority(folder);
  std::set<std::string> done;
  const std::string& master = table.servers[static_cast<size_t>(table.master())].address();
  for (const cluster::Server& server : table.servers) {
    const std::string node = server.address();
    if (!done.insert(node).second) continue;
    const net::Secret store = key_store_of(folder.node(node, "."));
    for (const PlaneLayout& plane : kPlanes) {
      const bool inter_node = plane.name == "inter-node";
      net::CertificateOrder order{.common_name = node,
                                  .unit = std::string(plane.name),
                                  .role = std::string(plane.name),
                                  .addresses = addresses_of(server),
                                  .for_server = true,
                                  .for_client = plane.client};
      if (inter_node) {
        order.role += net::same_address(node, master) ? ":master" : ":slave";
      } else {
        for (const char* own : {"localhost", "127.0.0.1", "::1"})
          if (std::find(order.addresses.begin(), order.addresses.end(), own) ==
              order.addresses.end())
            order.addresses.emplace_back(own);
      }
      issue(folder, authority, node, plane, order, store.view());
    }
  }
  issue_client(folder, authority);
  spread_list(folder);
}

void renew_all(const IssueOptions& options, const std::vector<std::string>& nodes) {
  const Folder folder{options.folder, options.days};
  const net::Authority authority = open_authority(folder);
  require_nodes(folder, nodes);
  for (const std::string& node : nodes.empty() ? folder.nodes() : nodes) {
    const net::Secret store = key_store_of(folder.node(node, "."));
    for (const PlaneLayout& plane : kPlanes) {
      const std::string path = folder.node(node, plane.certificate);
      const net::CertificateInfo old =
          net::Certificate::parse(read_text_file(path, kLargest), path)[0].info();
      net::CertificateOrder order{.common_name = node,
                                  .unit = std::string(plane.name),
                                  .role = old.role(),
                                  .addresses = old.addresses,
                                  .for_server = old.for_server,
                                  .for_client = old.for_client};
      order.addresses.insert(order.addresses.end(), old.host_names.begin(), old.host_names.end());
      issue(folder, authority, node, plane, order, store.view());
    }
  }
  if (nodes.empty()) issue_client(folder, authority);
  renew_list(folder, authority, {});
}

void revoke(const IssueOptions& options, const std::vector<std::string>& nodes,
            const std::vector<std::string>& files) {
  const Folder folder{options.folder, options.days};
  const net::Authority authority = open_authority(folder);
  require_nodes(folder, nodes);
  std::vector<std::string> paths = files;
  for (const std::string& node : nodes)
    for (const PlaneLayout& plane : kPlanes) paths.push_back(folder.node(node, plane.certificate));
  std::vector<net::Revocation> revoked;
  for (const std::string& path : paths) {
    const net::CertificateInfo info =
        net::Certificate::parse(read_text_file(path, kLargest), path)[0].info();
    if (info.issuer != authority.certificate().info().subject)
      throw Error(Code::kInvalidArgument,
                  fmt::format("{}: found issuer {}, expected {}: another authority's certificate "
                              "cannot be revoked here",
                              path, info.issuer, authority.certificate().info().subject));
    revoked.push_back({info.serial, folder.now});
  }
  renew_list(folder, authority, revoked);
}

}  // namespace phalanx::apps
