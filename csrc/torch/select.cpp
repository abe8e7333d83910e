// Selection, namespace granet_cpp: adaptors from tensors to the kernels of cpu/select.h.
//
// The public operators (namespace granet) have checked every argument before these run. What is checked again here is
// what keeps a direct call from reading or writing out of bounds.
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/bits.h"
#include "cpu/select.h"
#include "torch/parallel.h"

namespace granet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

std::string name(const char* list, size_t i) { return list + ("[" + std::to_string(i)) + "]"; }

FloatType float_type(const Tensor& tensor, const std::string& argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::Double:
      return FloatType::kFloat64;
    default:
      STD_TORCH_CHECK(false, argument, ": expected a float32, bfloat16, float16 or float64 tensor");
  }
}

void check_dense(const Tensor& tensor, int64_t numel, const std::string& argument) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == numel && (numel == 0 || last == numel - 1), argument,
                  ": expected a dense tensor on the CPU with ", numel, " elements");
}

void check_packed_mask(const Tensor& mask, int64_t numel, const std::string& argument) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == packed_bytes(numel),
                  argument, ": expected a contiguous uint8 tensor on the CPU with ", packed_bytes(numel), " elements");
}

std::vector<cpu::Numbers> numbers(const Tensors& tensors, const char* list) {
  std::vector<cpu::Numbers> result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_dense(tensors[i], tensors[i].numel(), name(list, i));
    result.push_back({tensors[i].const_data_ptr(), float_type(tensors[i], name(list, i)), tensors[i].numel()});
  }
  return result;
}

void check_lengths(const Tensors& weights, const Tensors& masks) {
  STD_TORCH_CHECK(masks.size() == weights.size(), "masks: expected one for each of the ", weights.size(),
                  " weights, got ", masks.size());
}

std::vector<cpu::MaskedWeight> masked_weights(const Tensors& weights, const Tensors& masks, const Tensors& momenta) {
  check_lengths(weights, masks);
  STD_TORCH_CHECK(momenta.empty() || momenta.size() == weights.size(), "momenta: expected none or one for each of the ",
                  weights.size(), " weights, got ", momenta.size());
  std::vector<cpu::MaskedWeight> result;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t numel = weights[i].numel();
    check_dense(weights[i], numel, name("weights", i));
    check_packed_mask(masks[i], numel, name("masks", i));
    cpu::MaskedWeight weight = {weights[i].mutable_data_ptr(),
                                float_type(weights[i], name("weights", i)),
                                numel,
                                static_cast<uint8_t*>(masks[i].mutable_data_ptr()),
                                nullptr,
                                FloatType::kFloat32};
    if (!momenta.empty()) {
      check_dense(momenta[i], numel, name("momenta", i));
      weight.momentum = momenta[i].mutable_data_ptr();
      weight.momentum_type = float_type(momenta[i], name("momenta", i));
    }
    result.push_back(weight);
  }
  return result;
}

std::span<const int64_t> counts(const Tensor& k, size_t tensors) {
  STD_TORCH_CHECK(k.is_cpu() && k.scalar_type() == ScalarType::Long && k.is_contiguous() &&
                      (k.numel() == 1 || k.numel() == static_cast<int64_t>(tensors)),
                  "k: expected a contiguous int64 tensor on the CPU with 1 or ", tensors, " elements");
  return {static_cast<const int64_t*>(k.const_data_ptr()), static_cast<size_t>(k.numel())};
}

TorchThreads threads_for(const std::vector<Tensor>& tensors) {
  double elements = 0;
  for (const Tensor& tensor : tensors) elements += static_cast<double>(tensor.numel());
  return TorchThreads(elements * 0.5);
}

void prune_(Tensors weights, Tensors masks, Tensor k, Tensors momenta) {
  cpu::prune(masked_weights(weights, masks, momenta), counts(k, weights.size()), threads_for(weights));
}

// Packed masks for such tensors, not initialised, and where they lie.
std::pair<Tensors, std::vector<uint8_t*>> new_masks(const Tensors& like) {
  Tensors masks;
  std::vector<uint8_t*> bits;
  for (const Tensor& tensor : like) {
    masks.push_back(torch::stable::new_empty(tensor, {packed_bytes(tensor.numel())}, ScalarType::Byte));
    bits.push_back(static_cast<uint8_t*>(masks.back().mutable_data_ptr()));
  }
  return {std::move(masks), std::move(bits)};
}

Tensors pruned_masks(Tensors weights, Tensors masks, Tensor k) {
  check_lengths(weights, masks);
  const std::vector<cpu::Numbers> ranked = numbers(weights, "weights");
  std::vector<const uint8_t*> among;
  for (size_t i = 0; i < masks.size(); ++i) {
    check_packed_mask(masks[i], weights[i].numel(), name("masks", i));
    among.push_back(static_cast<const uint8_t*>(masks[i].const_data_ptr()));
  }
  const auto [pruned, bits] = new_masks(weights);
  cpu::pruned_masks(ranked, among, counts(k, weights.size()), bits, threads_for(weights));
  return pruned;
}

std::vector<cpu::Numbers> scores_of(const Tensors& weights, const Tensors& scores) {
  STD_TORCH_CHECK(scores.size() == weights.size(), "scores: expected one for each of the ", weights.size(),
                  " weights, got ", scores.size());
  for (size_t i = 0; i < scores.size(); ++i) check_dense(scores[i], weights[i].numel(), name("scores", i));
  return numbers(scores, "scores");
}

void drop_regrow_(Tensors weights, Tensors masks, Tensors scores, double drop_fraction, Tensors momenta) {
  cpu::drop_regrow(masked_weights(weights, masks, momenta), scores_of(weights, scores), drop_fraction,
                   threads_for(weights));
}

Tensors prune_drop_regrow_(Tensors weights, Tensors masks, Tensors scores, Tensor k, double drop_fraction,
                           Tensors momenta) {
  const std::vector<cpu::MaskedWeight> masked = masked_weights(weights, masks, momenta);
  const auto [pruned, bits] = new_masks(weights);
  cpu::prune_drop_regrow(masked, scores_of(weights, scores), counts(k, weights.size()), drop_fraction, bits,
                         threads_for(weights));
  return pruned;
}

Tensors topk_mask(Tensors scores, Tensor k) {
  const std::vector<cpu::Numbers> ranked = numbers(scores, "scores");
  const auto [masks, bits] = new_masks(scores);
  cpu::topk_mask(ranked, counts(k, scores.size()), bits, threads_for(scores));
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def("prune_(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor k, Tensor(c!)[] momenta) -> ()");
  m.def("pruned_masks(Tensor[] weights, Tensor[] masks, Tensor k) -> Tensor[]");
  m.def(
      "drop_regrow_(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor[] scores, float drop_fraction, "
      "Tensor(c!)[] momenta) -> ()");
  m.def(
      "prune_drop_regrow_(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor[] scores, Tensor k, float drop_fraction, "
      "Tensor(c!)[] momenta) -> Tensor[]");
  m.def("topk_mask(Tensor[] scores, Tensor k) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("prune_", TORCH_BOX(&prune_));
  m.impl("pruned_masks", TORCH_BOX(&pruned_masks));
  m.impl("drop_regrow_", TORCH_BOX(&drop_regrow_));
  m.impl("prune_drop_regrow_", TORCH_BOX(&prune_drop_regrow_));
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
}

}  // namespace granet
