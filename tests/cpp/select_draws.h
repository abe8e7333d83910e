// Tensors that selection gets wrong most easily: ties, zeros, subnormal numbers, NaN, in every format.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "select_oracle.h"

namespace granet::oracle {

using Generator = std::mt19937_64;
using Draw = std::function<double(size_t, Generator&)>;  // of element i

// Rounded towards zero to 16 bits from fp32, which is as good a number as any.
inline Tensor tensor(FloatType type, size_t numel, const Draw& draw, Generator& generator) {
  Tensor result = {type, Bytes(numel * Tensor{type, {}}.item_size())};
  for (size_t i = 0; i < numel; ++i) {
    const double number = draw(i, generator);
    const auto single = static_cast<float>(number);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    const auto bfloat = static_cast<uint16_t>(bits >> 16);
    // Of fp16 every pattern of bits is a number of some sort: sign and exponent from here, the rest is mixed.
    const auto half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (bits >> 13 & 0x7fff));
    uint8_t* to = result.bytes.data() + i * result.item_size();
    if (type == FloatType::kFloat64) std::memcpy(to, &number, sizeof number);
    if (type == FloatType::kFloat32) std::memcpy(to, &single, sizeof single);
    if (type == FloatType::kBFloat16) std::memcpy(to, &bfloat, sizeof bfloat);
    if (type == FloatType::kFloat16) std::memcpy(to, &half, sizeof half);
  }
  return result;
}

inline double normal(Generator& generator) { return std::normal_distribution<double>()(generator); }

inline const std::vector<std::pair<std::string, Draw>> kDraws = {
    {"normal", [](size_t, Generator& g) { return normal(g); }},
    {"equal", [](size_t, Generator&) { return -0.25; }},
    {"two numbers", [](size_t, Generator& g) { return g() % 5 == 0 ? 0.5 : -0.25; }},
    {"mostly zeros", [](size_t, Generator& g) { return g() % 10 == 0  ? normal(g)
                                                       : g() % 2 == 0 ? 0.0
                                                                      : -0.0; }},
    {"subnormal", [](size_t, Generator& g) { return normal(g) * 1e-41; }},
    {"one exponent", [](size_t, Generator& g) { return 1 + static_cast<double>(g() % 4096) / 4096; }},
    {"close", [](size_t, Generator& g) { return 1 + static_cast<double>(g() % 64) / (1 << 23); }},
    {"sorted", [](size_t i, Generator&) { return static_cast<double>(i) * 1e-3; }},
    {"falling", [](size_t i, Generator&) { return -1.0 / static_cast<double>(i + 1); }},
    {"special",
     [](size_t, Generator& g) {
       const double special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0, -0.0};
       const size_t pick = g() % 12;
       return pick < 6 ? special[pick] : normal(g);
     }},
};

inline const std::vector<std::vector<FloatType>> kTypes = {
    {FloatType::kFloat32},
    {FloatType::kBFloat16},
    {FloatType::kFloat16},
    {FloatType::kFloat64},
    {FloatType::kFloat16, FloatType::kFloat32, FloatType::kBFloat16},
    {FloatType::kFloat64, FloatType::kFloat16, FloatType::kFloat32, FloatType::kBFloat16},
};

inline std::vector<Tensor> tensors(const std::vector<size_t>& sizes, size_t types, const Draw& draw,
                                   Generator& generator) {
  std::vector<Tensor> result;
  for (size_t t = 0; t < sizes.size(); ++t) {
    result.push_back(tensor(kTypes[types][t % kTypes[types].size()], sizes[t], draw, generator));
  }
  return result;
}

}  // namespace granet::oracle
