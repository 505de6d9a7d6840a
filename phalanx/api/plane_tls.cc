#include "phalanx/api/plane_tls.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>

#include <chrono>
#include <ctime>
#include <utility>

#include "phalanx/base/log.h"
#include "phalanx/net/address.h"

namespace phalanx::api {
namespace {

constexpr int64_t kDay = 86400;

std::vector<std::string> named(const net::CertificateInfo& info) {
  std::vector<std::string> names = info.addresses;
  names.insert(names.end(), info.host_names.begin(), info.host_names.end());
  return names;
}

std::string stamp_of(const net::TlsFiles& files) {
  std::string stamp;
  const auto add = [&stamp](const std::string& path) {
    struct stat st {};
    if (path.empty() || ::stat(path.c_str(), &st) != 0)
      stamp += "-;";
    else
      stamp += fmt::format("{}.{}.{}.{};", st.st_mtim.tv_sec, st.st_mtim.tv_nsec, st.st_size, st.st_ino);
  };
  add(files.certificate);
  add(files.key);
  add(files.key_password);
  for (const auto& path : files.authorities) add(path);
  return stamp;
}

// Clients ask for the address, or for a host name that we cannot know.
void check_name(const net::CertificateInfo& info, const PlaneTls::Plane& plane, Problems& problems,
                Problems& warnings) {
  const auto address = net::Address::parse(plane.address);
  if (!address || address->is_all_zero() || info.names(plane.address)) return;
  Problem problem{
      .what = "certificate does not name the address of its plane",
      .where = plane.files.certificate,
      .found = fmt::format("subject alternative names {}",
                           info.addresses.empty() && info.host_names.empty()
                               ? "none"
                               : fmt::format("{}", fmt::join(named(info), ", "))),
      .expected = fmt::format("{} (the {} plane)", plane.address, plane.files.plane),
      .fix = "issue one with that address: phalanx certs init"};
  (info.host_names.empty() ? problems : warnings).add(std::move(problem));
}

}  // namespace

std::string expiry_warning(const net::CertificateInfo& info, int64_t now, int64_t warn_days) {
  const int64_t left = info.not_after - now;
  if (left > warn_days * kDay) return {};
  if (left < 0)
    return fmt::format("certificate {} ended on {}", info.subject, net::time_text(info.not_after));
  return fmt::format("certificate {} ends in {} day{}, on {}", info.subject, left / kDay,
                     left / kDay == 1 ? "" : "s", net::time_text(info.not_after));
}

std::shared_ptr<const net::TlsContext> PlaneTls::load(const Plane& plane, Problems& problems,
                                                      Problems& warnings) {
  auto material = net::TlsMaterial::load(plane.files, plane.needs, problems, warnings);
  if (!material) return nullptr;
  const size_t before = problems.list().size();
  check_name(material->own(), plane, problems, warnings);
  if (problems.list().size() > before) return nullptr;
  return std::make_shared<const net::TlsContext>(
      std::move(material),
      net::TlsContext::Options{.side = net::TlsContext::Side::kServer, .mutual = plane.mutual});
}

PlaneTls::PlaneTls(std::vector<Plane> planes, Problems& warnings, Options options)
    : options_(options) {
  Problems problems;
  for (Plane& plane : planes) {
    Kept kept{.plane = std::move(plane)};
    kept.stamp = stamp_of(kept.plane.files);
    kept.context = load(kept.plane, problems, warnings);
    planes_.push_back(std::move(kept));
  }
  problems.throw_if_any("these certificates cannot be used");
  watcher_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
}

PlaneTls::~PlaneTls() {
  watcher_.request_stop();
  wake_.notify_all();
}

std::shared_ptr<const net::TlsContext> PlaneTls::current(size_t plane) const {
  const std::lock_guard lock(mutex_);
  return planes_.at(plane).context;
}

std::vector<PlaneTls::Expiry> PlaneTls::expiries() const {
  const std::lock_guard lock(mutex_);
  std::vector<Expiry> list;
  for (const Kept& kept : planes_)
    list.push_back({kept.plane.files.plane, kept.context->material().own().not_after});
  return list;
}

void PlaneTls::warn_of_expiry(Kept& kept) {
  const int64_t now = std::time(nullptr);
  if (kept.warned_day == now / kDay) return;
  const std::string text =
      expiry_warning(kept.context->material().own(), now, options_.warn_days);
  if (text.empty()) return;
  kept.warned_day = now / kDay;
  log_warn("{}: {}; renew {} (new connections use it without a restart)", name_of(kept), text,
           kept.plane.files.certificate);
}

std::string PlaneTls::name_of(const Kept& kept) {
  const std::string& name = kept.plane.files.plane;
  return name == "between nodes" ? name : name + " plane";
}

// Only this thread writes planes_ after construction.
void PlaneTls::watch(const std::stop_token& stop) {
  while (!stop.stop_requested()) {
    for (Kept& kept : planes_) {
      warn_of_expiry(kept);
      std::string stamp = stamp_of(kept.plane.files);
      if (stamp == kept.stamp) continue;
      kept.stamp = std::move(stamp);
      Problems problems;
      Problems warnings;
      auto context = load(kept.plane, problems, warnings);
      if (!context) {
        log_warn("{}: its certificate files changed, but cannot be used; the old ones stay in use:\n{}",
                 name_of(kept), problems.to_string());
        continue;
      }
      const auto& info = context->material().own();
      log_info("{}: new connections use the certificate {} (serial {}), which ends on {}",
               name_of(kept), info.subject, info.serial, net::time_text(info.not_after));
      const std::lock_guard lock(mutex_);
      kept.context = std::move(context);
      kept.warned_day = -1;
    }
    std::unique_lock lock(mutex_);
    wake_.wait_for(lock, stop, std::chrono::duration<double>(options_.look_seconds), [] { return false; });
  }
}

}  // namespace phalanx::api
