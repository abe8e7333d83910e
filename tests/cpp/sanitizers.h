// What a test is compiled with: sanitizers take five to twenty times as long, and need fewer cases.
#pragma once

#ifdef __has_feature  // Clang's; GCC defines macros of its own
#define GRANET_HAS_FEATURE(name) __has_feature(name)
#else
#define GRANET_HAS_FEATURE(name) 0
#endif

namespace granet {

// ThreadSanitizer finds something only where several threads run.
#if defined(__SANITIZE_THREAD__) || GRANET_HAS_FEATURE(thread_sanitizer)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

#if defined(__SANITIZE_ADDRESS__) || GRANET_HAS_FEATURE(address_sanitizer)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif

#undef GRANET_HAS_FEATURE

inline constexpr bool kAnySanitizer = kThreadSanitizer || kAddressSanitizer;

}  // namespace granet
