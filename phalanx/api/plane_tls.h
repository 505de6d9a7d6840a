#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/net/tls_context.h"

namespace phalanx::api {

// The certificates of some planes, kept as their files are: a renewed certificate, key or
// authority serves new connections within seconds and without a restart. What would not pass the
// checks of a start is not taken: the old one stays, and a warning says why. A certificate that ends
// within 30 days is warned of once a day.
class PlaneTls {
 public:
  struct Plane {
    net::TlsFiles files;
    net::TlsNeeds needs;
    std::string address;  // what it listens on; a certificate that names hosts only is a warning
    bool mutual = true;   // clients must show a certificate
  };
  struct Options {
    double look_seconds = 2;
    int64_t warn_days = 30;
  };
  // One plane's, read and checked; null if a problem was added.
  [[nodiscard]] static std::shared_ptr<const net::TlsContext> load(const Plane& plane,
                                                                   Problems& problems,
                                                                   Problems& warnings);
  // Loads all; throws Error(kInvalidArgument) with every problem. `warnings` receives the rest.
  PlaneTls(std::vector<Plane> planes, Problems& warnings, Options options);
  ~PlaneTls();

  // For new connections of the plane, by its place in the list given. From any thread.
  [[nodiscard]] std::shared_ptr<const net::TlsContext> current(size_t plane) const;
  struct Expiry {
    std::string plane;
    int64_t not_after = 0;  // seconds since 1970
  };
  [[nodiscard]] std::vector<Expiry> expiries() const;

 private:
  struct Kept {
    Plane plane;
    std::string stamp;  // of the files' times, sizes and inodes
    std::shared_ptr<const net::TlsContext> context;
    int64_t warned_day = -1;
  };
  void watch(const std::stop_token& stop);
  void warn_of_expiry(Kept& kept);
  static std::string name_of(const Kept& kept);

  const Options options_;
  mutable std::mutex mutex_;
  std::condition_variable_any wake_;
  std::vector<Kept> planes_;  // contexts guarded by mutex_
  std::jthread watcher_;
};

// "ends in 12 days, on 2027-01-02 ..."; empty while more than `warn_days` are left.
[[nodiscard]] std::string expiry_warning(const net::CertificateInfo& info, int64_t now,
                                         int64_t warn_days);

}  // namespace phalanx::api
