#include "apps/certs.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <optional>

#include "apps/certs_files.h"
#include "apps/certs_import.h"
#include "apps/certs_issue.h"
#include "apps/certs_config.h"
#include "apps/certs_layout.h"
#include "apps/certs_show.h"
#include "phalanx/cluster/rank_table.h"

namespace phalanx::apps {
namespace {

void init(const IssueOptions& options, const std::string& table_file,
          const std::string& config_file) {
  const cluster::RankTable table = cluster::load_rank_table(table_file);
  std::optional<SecureConfig> config;
  if (!config_file.empty()) config = SecureConfig::read(config_file);
  issue_all(options, table);
  if (config) {
    config->write();
    fmt::print("{}   now says \"httpsEnabled\": true and \"interNodeTLSEnabled\": true\n", config_file);
  }
  fmt::print("{0}/{1}   the authority: keep it off the nodes\n{0}/{2}      certificate and key for "
             "clients of the HTTPS ports\n",
             options.folder, kAuthorityFolder, kClientFolder);
  for (const cluster::Server& server : table.servers)
    fmt::print("{0}/{1}   for node {1}: copy its contents into the install directory there, or start "
               "with --certs {0}\n",
               options.folder, server.address());
}

void encrypt(const std::string& out, const std::string& home) {
  const net::Secret store = key_store_of(home);
  const net::Secret password = ask_password("Password to encrypt: ", true);
  if (const std::string weak = net::password_weakness(password.view()); !weak.empty())
    throw Error(Code::kInvalidArgument, "this password is too weak: " + weak);
  write_security_file(out, net::encrypt_password(password.view(), store.view(), home));
  fmt::print("{}\n", out);
}

}  // namespace

int certs_main(int argc, char** argv) {
  CLI::App app{"Certificates of an instance, without any other program", "phalanx certs"};
  app.require_subcommand(1);
  IssueOptions issue;
  std::string table_file;
  std::vector<std::string> nodes, files, shown;
  const auto days = [&](CLI::App* command) {
    command->add_option("--days", issue.days, "how long new certificates and lists are good")
        ->check(CLI::Range(1, 3650));
  };

  CLI::App* init_command = app.add_subcommand(
      "init", "an authority, and keys and certificates for every node of a rank table");
  init_command->add_option("--rank-table", table_file, "ranktable.json")->required();
  init_command->add_option("--out", issue.folder, "folder to fill; an authority there is used again")
      ->required();
  std::string config_file;
  init_command->add_option("--config", config_file,
                           "config.json in which HTTPS and TLS between nodes are switched on");
  days(init_command);

  CLI::App* renew_command = app.add_subcommand("renew", "new keys and certificates for nodes");
  renew_command->add_option("--certs", issue.folder, "folder that init filled")->required();
  renew_command->add_option("--node", nodes, "only these, by address");
  days(renew_command);

  CLI::App* revoke_command =
      app.add_subcommand("revoke", "put certificates on the revocation list of all nodes");
  revoke_command->add_option("--certs", issue.folder, "folder that init filled")->required();
  revoke_command->add_option("--node", nodes, "all certificates of this node, by address");
  revoke_command->add_option("--file", files, "certificates in PEM files");
  bool refresh = false;
  revoke_command->add_flag("--refresh", refresh, "revoke nothing, give the list new dates");
  days(revoke_command);

  ImportOptions import;
  CLI::App* import_command =
      app.add_subcommand("import", "check and install files of your own authority");
  import_command->add_option("--home", import.home, "install directory of the node")->required();
  std::vector<std::string> planes;
  for (const PlaneLayout& plane : kPlanes) planes.emplace_back(plane.name);
  import_command->add_option("--plane", import.plane, "which connections they are for")
      ->required()
      ->check(CLI::IsMember(planes));
  import_command->add_option("--ca", import.authorities, "certificates of authorities")
      ->expected(1, 5);
  import_command->add_option("--cert", import.certificate, "certificate of the node");
  import_command->add_option("--key", import.key, "its private key, may be encrypted");
  import_command->add_option("--crl", import.revocations, "revocation list");

  CLI::App* show_command = app.add_subcommand("show", "who, until when, which file, verdict");
  show_command->add_option("paths", shown, "files or folders")->required();

  std::string out;
  std::string home = ".";
  CLI::App* encrypt_command =
      app.add_subcommand("encrypt", "write a password file for a private key");
  encrypt_command->add_option("--out", out, "password file to write")->required();
  encrypt_command->add_option("--home", home,
                              "install directory, whose key store is used or made");
  CLI11_PARSE(app, argc, argv);

  if (init_command->parsed()) {
    init(issue, table_file, config_file);
  } else if (renew_command->parsed()) {
    renew_all(issue, nodes);
  } else if (revoke_command->parsed()) {
    if (nodes.empty() && files.empty() && !refresh)
      throw Error(Code::kInvalidArgument,
                  "nothing to revoke. Fix: name --node, --file, or --refresh");
    revoke(issue, nodes, files);
  } else if (import_command->parsed()) {
    import_files(import);
  } else if (show_command->parsed()) {
    return show_certificates(shown) ? 0 : 1;
  } else {
    encrypt(out, home);
  }
  return 0;
}

}  // namespace phalanx::apps
