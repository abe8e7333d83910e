// Whether the tensors of an optimizer step are as they usually are, in one pass over what describes them.
//
// The public operator (namespace granet) checks its arguments in Python, and says what is wrong with them; but of 216
// tensors that takes 0.5 ms, 1 ms with cold caches, and a step over ResNet-50's weights 10 ms.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace granet {

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes();
  return a.dim() == b.dim() && std::equal(sizes.begin(), sizes.end(), b.sizes().begin());
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto strides = a.strides();
  return a.dim() == b.dim() && std::equal(strides.begin(), strides.end(), b.strides().begin());
}

// Contiguous or channels_last: each element in a place of its own, without gaps.
inline bool has_usual_layout(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  if (tensor.dim() != 4) return false;
  const auto n = tensor.sizes();
  const auto s = tensor.strides();
  return s[1] == 1 && s[3] == n[1] && s[2] == n[1] * n[3] && s[0] == n[1] * n[3] * n[2];
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// In which averages are kept: fp32 where a weight has 16 bits.
inline ScalarType average_dtype(ScalarType param) {
  return param == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_usual_decay(double decay) { return decay >= 0 && decay <= 1; }

class Spans {  // of memory, each in a place of its own?
 public:
  void add(const Tensor& tensor) {
    const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    if (bytes > 0) spans_.emplace_back(start, start + bytes);
  }
  bool are_apart() {
    std::sort(spans_.begin(), spans_.end());
    return std::adjacent_find(spans_.begin(), spans_.end(),
                              [](const auto& a, const auto& b) { return b.first < a.second; }) == spans_.end();
  }

 private:
  std::vector<std::pair<uintptr_t, uintptr_t>> spans_;
};

// True only if masked_sgd_ may take them: of equal shapes, dtypes and layouts, on one device, with packed masks, in
// memory of their own. False says nothing. Without momenta or averages, an empty list.
inline bool is_usual_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                          const std::vector<Tensor>& momenta, const std::vector<Tensor>& masks,
                          const std::vector<Tensor>& averages) {
  const size_t count = params.size();
  if (count == 0 || grads.size() != count || masks.size() != count) return false;
  if (!momenta.empty() && momenta.size() != count) return false;
  if (!averages.empty() && averages.size() != count) return false;
  const ScalarType dtype = params[0].scalar_type();
  const ScalarType momentum_dtype = momenta.empty() ? dtype : momenta[0].scalar_type();
  if (!is_floating(dtype) || !is_floating(momentum_dtype)) return false;
  const auto device = params[0].device();
  Spans spans;
  const auto is_like = [&](const Tensor& tensor, const Tensor& param, ScalarType expected) {
    spans.add(tensor);
    return tensor.scalar_type() == expected && tensor.device() == device && same_sizes(tensor, param) &&
           same_strides(tensor, param);
  };
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    const Tensor& mask = masks[i];
    if (!is_like(param, param, dtype) || !has_usual_layout(param) || !is_like(grads[i], param, dtype)) return false;
    if (!momenta.empty() && !is_like(momenta[i], param, momentum_dtype)) return false;
    if (!averages.empty() && !is_like(averages[i], param, average_dtype(dtype))) return false;
    if (mask.scalar_type() != ScalarType::Byte || !(mask.device() == device) || mask.dim() != 1 ||
        mask.numel() != packed_bytes(param.numel()) || !mask.is_contiguous()) {
      return false;
    }
    spans.add(mask);
  }
  return spans.are_apart();
}

}  // namespace granet
