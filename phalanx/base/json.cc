#include "phalanx/base/json.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx {
namespace {

std::string line_and_column(std::string_view text, size_t byte) {
  size_t line = 1;
  size_t column = 1;
  for (size_t i = 0; i + 1 < byte && i < text.size(); ++i) {
    if (text[i] == '\n') {
      ++line;
      column = 1;
    } else {
      ++column;
    }
  }
  return fmt::format("line {}, column {}", line, column);
}

}  // namespace

nlohmann::json parse_json(std::string_view text, std::string_view where, int max_depth) {
  // Depth is checked before parsing, since the parser's own values would be destroyed recursively.
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      else if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > max_depth)
        throw Error(Code::kInvalidArgument,
                    fmt::format("{}: JSON nested deeper than {} levels at {}", where, max_depth,
                                line_and_column(text, i + 1)));
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: not valid JSON at {}: {}", where, line_and_column(text, e.byte),
                            e.what()));
  } catch (const nlohmann::json::out_of_range& e) {
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: a number is too large for JSON's doubles: {}", where, e.what()));
  }
}

std::string read_text_file(const std::string& path, int64_t max_bytes) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid())
    throw Error(Code::kNotFound, fmt::format("cannot open {}: {}", path, std::strerror(errno)));
  struct stat st {};
  if (::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode))
    throw Error(Code::kInvalidArgument, fmt::format("{}: not a regular file", path));
  if (st.st_size > max_bytes)
    throw Error(Code::kInvalidArgument, fmt::format("{}: found {} bytes, expected at most {}", path,
                                                    st.st_size, max_bytes));
  std::string text(static_cast<size_t>(st.st_size), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(fd.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw Error(Code::kUnavailable, fmt::format("cannot read {}: {}", path, std::strerror(errno)));
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  text.resize(done);
  return text;
}

nlohmann::json read_json_file(const std::string& path, int64_t max_bytes, int max_depth) {
  return parse_json(read_text_file(path, max_bytes), path, max_depth);
}

}  // namespace phalanx
