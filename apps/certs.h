#pragma once

namespace phalanx::apps {

// phalanx certs init | renew | revoke | import | show | encrypt
int certs_main(int argc, char** argv);

}  // namespace phalanx::apps
