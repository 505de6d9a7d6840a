#pragma once

#include <string>
#include <vector>

namespace phalanx::apps {

// Files of the user's own PKI for one plane of one node.
struct ImportOptions {
  std::string home;   // install directory of the node, or its folder
  std::string plane;  // name of a PlaneLayout
  std::vector<std::string> authorities;
  std::string certificate, key;  // both or neither
  std::string revocations;
};

// Checks by the import tool's rules (startup-security.md §5.1), asks for the key's password where it
// is encrypted, and copies to the plane's default paths with mode 0400. Prints warnings. Throws
// Error with all problems; nothing is copied then.
void import_files(const ImportOptions& options);

}  // namespace phalanx::apps
