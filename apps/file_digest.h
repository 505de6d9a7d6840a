#pragma once

#include <string>

namespace phalanx::apps {

// First 16 hex digits of the SHA-256 of a file's bytes; "absent" when there is none.
[[nodiscard]] std::string file_digest(const std::string& path);

// Of the index and of the headers (not the data) of all weight files of a checkpoint directory.
[[nodiscard]] std::string weights_digest(const std::string& directory);

}  // namespace phalanx::apps
