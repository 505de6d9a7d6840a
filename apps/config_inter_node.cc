#include "apps/config_inter_node.h"

#include <fmt/format.h>

#include <filesystem>

#include "phalanx/cluster/credentials.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;
constexpr size_t kLongestPath = 4096;

std::string join(const std::string& home, const std::string& path) {
  return path.empty() ? path : (fs::path(home) / path).string();  // an absolute path stays
}

bool is_loopback(const std::string& text) {
  const auto address = net::Address::parse(text);
  return address && address->is_loopback();
}

net::TlsFiles files_of(const InterNodeKeys& keys, const std::string& home) {
  net::TlsFiles files{.plane = "between nodes",
                      .certificate = join(home, keys.certificate),
                      .key = join(home, keys.key),
                      .key_password = join(home, keys.key_password),
                      .key_store = {join(home, keys.key_store), join(home, keys.key_store_copy)}};
  for (const std::string& name : keys.authority_files)
    files.authorities.push_back(join(home, keys.authority_path) + name);
  // As documented: an empty path or list means no revocation list.
  if (!keys.crl_path.empty())
    for (const std::string& name : keys.crl_files)
      files.crls.push_back(join(home, keys.crl_path) + name);
  return files;
}

}  // namespace

void read_inter_node_keys(ConfigSection& section, InterNodeKeys& keys) {
  for (const auto& [key, target] :
       std::initializer_list<std::pair<std::string_view, std::string*>>{
           {"interNodeTlsCaPath", &keys.authority_path},
           {"interNodeTlsCert", &keys.certificate},
           {"interNodeTlsPk", &keys.key},
           {"interNodeTlsPkPwd", &keys.key_password},
           {"interNodeTlsCrlPath", &keys.crl_path},
           {"interNodeKmcKsfMaster", &keys.key_store},
           {"interNodeKmcKsfStandby", &keys.key_store_copy}}) {
    if (section.string(key, Need::kOptional, *target) && target->size() > kLongestPath)
      section.problem(key, "path too long", fmt::format("{} bytes", target->size()),
                      fmt::format("at most {} bytes", kLongestPath), "use a shorter path");
  }
  section.strings("interNodeTlsCaFiles", Need::kOptional, 1, 3, keys.authority_files);
  section.strings("interNodeTlsCrlFiles", Need::kOptional, 0, 3, keys.crl_files);
}

std::string security_home(const std::string& home, const std::string& certs,
                          const std::string& own_address) {
  if (certs.empty()) return home;
  const fs::path own = fs::path(certs) / own_address;
  return fs::is_directory(own) ? own.string() : certs;
}

InterNodeTls load_inter_node_tls(const InterNodeRequest& request, const InterNodeKeys& keys,
                                 Problems& problems, Problems& warnings) {
  const std::string& mode = request.data_plane;
  const bool ucx = mode == "ucx" || mode == "clear,ucx" || mode == "ucx,clear";
  if (!mode.empty() && mode != "tls" && mode != "clear" && !ucx) {
    problems.add({.what = "unknown data plane",
                  .where = "environment variable PHALANX_DATA_PLANE",
                  .found = mode,
                  .expected = "tls, clear, ucx, or clear,ucx",
                  .fix = "unset it, or export PHALANX_DATA_PLANE=tls"});
    return {};
  }
  bool loopback = true;
  std::string remote;
  for (const cluster::Server& server : request.table.servers) {
    if (is_loopback(server.address())) continue;
    loopback = false;
    remote += (remote.empty() ? "" : ", ") + server.address();
  }
  const bool several = request.table.servers.size() > 1;
  const bool on = several && request.written.value_or(!loopback);
  comm::Transport transport = comm::Transport::kTcp;
  if (ucx && several) {
    transport = comm::Transport::kUcx;
    if (const std::string why = comm::ucx_problem(); !why.empty())
      problems.add({.what = "there are no links over UCX here",
                    .where = "environment variable PHALANX_DATA_PLANE",
                    .found = mode,
                    .expected = "tls or clear",
                    .fix = why});
    else if (on && mode == "ucx")
      problems.add({.what = "UCX carries tensors in clear, and TLS between nodes is on",
                    .where = "environment variable PHALANX_DATA_PLANE",
                    .found = mode,
                    .expected = "tls, or clear,ucx, which admits clear text by name",
                    .fix = "unset it, or, in a closed network, export PHALANX_DATA_PLANE=clear,ucx"});
    else
      warnings.add({.what = "tensors travel over UCX: in clear, and whoever reaches its ports can read "
                            "and write the memory of ranks. For closed networks only",
                    .where = "environment variable PHALANX_DATA_PLANE",
                    .found = mode,
                    .fix = "unset it where others share the network"});
  }
  if (!on) {
    if (several && !loopback)
      warnings.add({.what = "TLS between nodes is off: prompts and tensors cross the network in "
                            "clear, and any machine that reaches the ports may try to join",
                    .where = request.how_to_switch_off,
                    .fix = "phalanx certs init, and leave the setting out"});
    if (mode == "tls" && several)
      problems.add({.what = "the data plane cannot run under TLS while TLS between nodes is off",
                    .where = "environment variable PHALANX_DATA_PLANE",
                    .found = "tls",
                    .expected = "clear, or TLS between nodes",
                    .fix = "unset it, or switch TLS between nodes on"});
    return {.transport = transport};
  }
  const std::string own = request.table.servers[static_cast<size_t>(request.own_server)].address();
  const std::string home = security_home(request.home, request.certs, own);
  const net::TlsFiles files = files_of(keys, home);
  net::TlsNeeds needs = cluster::node_needs(request.table, request.own_server);
  const std::string table = request.table_path.empty() ? "ranktable.json" : request.table_path;
  needs.fix = fmt::format("phalanx certs init --rank-table '{}' --out certs, then start with --certs "
                          "certs (or copy certs/{}/. into {})",
                          table, own, request.home);
  if (!fs::exists(files.certificate)) {
    problems.add(
        {.what = "TLS between nodes is on, and this node has no certificate",
         .where = files.certificate,
         .found = request.written ? "no such file"
                                  : fmt::format("no such file; TLS is on because of addresses that "
                                                "are not loopback: {}",
                                                remote),
         .expected = "the certificate of " + own,
         .fix = fmt::format("{}; or, in a network that is trusted, {}", needs.fix,
                            request.how_to_switch_off)});
    return {};
  }
  InterNodeTls tls{net::TlsMaterial::load(files, needs, problems, warnings), mode != "clear",
                   transport};
  if (tls.material != nullptr && mode == "clear")
    warnings.add({.what = "tensors cross the network in clear",
                  .where = "environment variable PHALANX_DATA_PLANE",
                  .found = "clear",
                  .fix = "unset it"});
  return tls;
}

}  // namespace phalanx::apps
