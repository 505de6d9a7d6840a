#include "apps/certs_show.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <filesystem>

#include "phalanx/base/json.h"
#include "phalanx/net/authority.h"
#include "phalanx/net/peer_verifier.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kDay = 86400;
constexpr int64_t kWarnDays = 30;
constexpr int64_t kLargest = 10 << 20;

struct Row {
  std::string who, until, file, verdict;
};

struct Found {
  std::vector<std::pair<std::string, net::Certificate>> certificates;
  std::vector<std::pair<std::string, net::RevocationList>> lists;
  std::vector<std::string> list_files;
  std::vector<Row> broken;
};

void read(const fs::path& path, Found& found) {
  if (path.extension() != ".pem" && path.extension() != ".crt") return;
  try {
    const std::string pem = read_text_file(path, kLargest);
    if (pem.find("BEGIN CERTIFICATE") != std::string::npos)
      for (const net::Certificate& one : net::Certificate::parse(pem, path))
        found.certificates.emplace_back(path, one);
    if (pem.find("BEGIN X509 CRL") != std::string::npos) {
      found.lists.emplace_back(path, net::read_revocation_list(pem, path));
      found.list_files.push_back(path);
    }
  } catch (const Error& error) {
    found.broken.push_back({"-", "-", path, error.what()});
  }
}

std::string verdict(const net::CertificateInfo& info, const Found& found) {
  const int64_t now = std::time(nullptr);
  for (const auto& [path, list] : found.lists)
    if (list.issuer == info.issuer)
      for (const net::Revocation& one : list.revoked)
        if (one.serial == info.serial) return "revoked on " + net::time_text(one.when);
  if (const auto problem = net::plain_problem(info, "")) return problem->what;
  if (info.not_after - now < kWarnDays * kDay)
    return fmt::format("good, but only for {} more days: phalanx certs renew",
                       (info.not_after - now) / kDay);
  return "good";
}

}  // namespace

bool show_certificates(const std::vector<std::string>& paths) {
  Found found;
  for (const std::string& path : paths) {
    if (!fs::exists(path)) throw Error(Code::kNotFound, path + ": no such file or folder");
    if (!fs::is_directory(path)) {
      read(path, found);
      continue;
    }
    std::vector<fs::path> files;
    for (const auto& entry : fs::recursive_directory_iterator(path))
      if (entry.is_regular_file()) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    for (const fs::path& file : files) read(file, found);
  }
  std::vector<Row> rows;
  bool good = found.broken.empty();
  for (const auto& [path, certificate] : found.certificates) {
    const net::CertificateInfo& info = certificate.info();
    std::string who = info.subject;
    if (!info.role().empty()) who += fmt::format(" ({})", info.role());
    rows.push_back({who, net::time_text(info.not_after), path, verdict(info, found)});
    good = good && rows.back().verdict.starts_with("good");
  }
  for (const auto& [path, list] : found.lists) {
    const bool expired = list.next_update != 0 && list.next_update < std::time(nullptr);
    rows.push_back({fmt::format("revocation list of {}, {} entries", list.issuer, list.revoked.size()),
                    net::time_text(list.next_update), path,
                    expired ? "revocation list has expired" : "good"});
    good = good && !expired;
  }
  rows.insert(rows.end(), found.broken.begin(), found.broken.end());
  size_t who = 3, file = 4;
  for (const Row& row : rows) {
    who = std::max(who, row.who.size());
    file = std::max(file, row.file.size());
  }
  fmt::print("{:<{}}  {:<23}  {:<{}}  {}\n", "who", who, "until", "file", file, "verdict");
  for (const Row& row : rows)
    fmt::print("{:<{}}  {:<23}  {:<{}}  {}\n", row.who, who, row.until, row.file, file, row.verdict);
  return good;
}

}  // namespace phalanx::apps
