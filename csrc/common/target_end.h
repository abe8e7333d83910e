// Included last in a file that begins with target_avx2.h or target_avx512.h: Clang wants their pragma closed.
#if defined(__clang__)
#pragma clang attribute pop
#endif
