// CUDA's vector types, with its alignments.
#pragma once

#define GRANET_SIMT_VECTOR2(type, name, bytes)  \
  struct alignas(bytes) name##2 { type x, y; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define GRANET_SIMT_VECTOR4(type, name, bytes)        \
  struct alignas(bytes) name##4 { type x, y, z, w; }; \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
GRANET_SIMT_VECTOR2(unsigned char, uchar, 2)
GRANET_SIMT_VECTOR4(unsigned char, uchar, 4)
GRANET_SIMT_VECTOR2(unsigned short, ushort, 4)
GRANET_SIMT_VECTOR4(unsigned short, ushort, 8)
GRANET_SIMT_VECTOR2(int, int, 8)
GRANET_SIMT_VECTOR4(int, int, 16)
GRANET_SIMT_VECTOR2(unsigned, uint, 8)
GRANET_SIMT_VECTOR4(unsigned, uint, 16)
GRANET_SIMT_VECTOR2(float, float, 8)
GRANET_SIMT_VECTOR4(float, float, 16)
GRANET_SIMT_VECTOR2(double, double, 16)
GRANET_SIMT_VECTOR2(long long, longlong, 16)
GRANET_SIMT_VECTOR2(unsigned long long, ulonglong, 16)
#undef GRANET_SIMT_VECTOR2
#undef GRANET_SIMT_VECTOR4
