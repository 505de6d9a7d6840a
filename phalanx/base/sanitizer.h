#pragma once

namespace phalanx {

// Whether this build runs under ThreadSanitizer. Tests that repeat one thing in many sizes take
// fewer of them there: a race shows in the small ones, and the others run in the other builds.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
inline constexpr bool kThreadSanitizer = __has_feature(thread_sanitizer);
#else
inline constexpr bool kThreadSanitizer = false;
#endif

// Whether it runs under AddressSanitizer, whose allocator gives nothing back.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;
#elif defined(__has_feature)
inline constexpr bool kAddressSanitizer = __has_feature(address_sanitizer);
#else
inline constexpr bool kAddressSanitizer = false;
#endif

}  // namespace phalanx
