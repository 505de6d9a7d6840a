#pragma once

namespace phalanx::detail {
[[noreturn]] void check_failed(const char* condition, const char* file, int line);
}

// For our own bugs only, out of reach of any input: prints the place and aborts.
#define PHALANX_CHECK(condition)                                            \
  do {                                                                      \
    if (!(condition)) [[unlikely]]                                          \
      ::phalanx::detail::check_failed(#condition, __FILE__, __LINE__);      \
  } while (false)
