// Selection, namespace granet_cuda: adaptors from tensors to the launchers of cuda/select.h.
//
// The public operators (namespace granet) have checked every argument before these run. What is checked again here is
// what keeps a direct call from reading or writing out of bounds.
#include "cuda/select.h"

#include <algorithm>
#include <vector>

#include "torch/cuda/table.h"

namespace granet {
namespace {

using Tensors = std::vector<Tensor>;

FloatType float_type(const Tensor& tensor, const std::string& argument) {
  static_assert(static_cast<int>(FloatType::kFloat16) == static_cast<int>(Dtype::kFloat16) &&
                static_cast<int>(FloatType::kFloat64) == static_cast<int>(Dtype::kFloat64));
  return static_cast<FloatType>(floating_dtype(tensor.scalar_type(), argument));
}

// The lists of a call, on the device, and memory for its kernels. Momenta and gains may be none.
class Lists {
 public:
  Lists(const Tensors& numbers, const char* list, const Tensors& masks, const Tensors& momenta, const Tensors& gains,
        const OnDeviceOf& device) {
    STD_TORCH_CHECK(masks.size() == numbers.size(), "masks: expected one for each of the ", numbers.size(), " ", list);
    STD_TORCH_CHECK(momenta.empty() || momenta.size() == numbers.size(), "momenta: expected none or one for each of ",
                    "the ", numbers.size(), " ", list);
    STD_TORCH_CHECK(gains.empty() || gains.size() == numbers.size(), "scores: expected one for each of the ",
                    numbers.size(), " ", list);
    cuda::TableRows rows(/*lists=*/4, /*further=*/1, cuda::kSelectChunk);
    for (size_t i = 0; i < numbers.size(); ++i) {
      const int64_t numel = numbers[i].numel();
      check_dense_beside(numbers[i], numel, numbers[0], element(list, i));
      check_packed_beside(masks[i], numel, numbers[0], element("masks", i));
      const FloatType type = float_type(numbers[i], element(list, i));
      FloatType momentum = type, gain = type;
      if (!momenta.empty()) {
        check_dense_beside(momenta[i], numel, numbers[0], element("momenta", i));
        momentum = float_type(momenta[i], element("momenta", i));
      }
      if (!gains.empty()) {
        check_dense_beside(gains[i], numel, numbers[0], element("scores", i));
        gain = float_type(gains[i], element("scores", i));
      }
      rows.begin_row(numel);
      rows.add(numbers[i].mutable_data_ptr());
      rows.add(masks[i].mutable_data_ptr());
      rows.add(momenta.empty() ? nullptr : momenta[i].mutable_data_ptr());
      rows.add(gains.empty() ? nullptr : gains[i].const_data_ptr());
      rows.add(cuda::select_types(type, momentum, gain));
      if (numel == 0) continue;  // decides nothing, its format neither
      lists_.numbers.add(type);
      lists_.gains.add(gain);
      lists_.elements += numel;
      lists_.largest = std::max(lists_.largest, numel);
    }
    if (rows.chunks() == 0) return;
    table_ = device_table(rows, numbers[0], device.stream());
    lists_.table = table_.table;
    lists_.tensors = rows.rows();
  }

  bool are_empty() const { return lists_.elements == 0; }

  // `sample_from`: of how many elements a segment is sampled first.
  cuda::SelectLists ranked(bool each, int64_t sample_from) const {
    cuda::SelectLists lists = lists_;
    lists.each = each;
    lists.sample_from = sample_from;
    return lists;
  }

 private:
  DeviceTable table_;
  cuda::SelectLists lists_{};
};

Tensor workspace(const cuda::SelectLists& lists, const Tensor& like) {
  const auto bytes = static_cast<int64_t>(cuda::select_workspace_bytes(lists));
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

cuda::Wanted wanted(const Tensor& k, const Tensor& first, size_t tensors) {
  STD_TORCH_CHECK(k.scalar_type() == ScalarType::Long && k.is_contiguous() &&
                      (k.numel() == 1 || k.numel() == static_cast<int64_t>(tensors)),
                  "k: expected a contiguous int64 tensor with 1 or ", tensors, " elements");
  const bool on_device = !k.is_cpu() || is_on_device(k);
  if (on_device) check_beside(k, first, "k");
  return {static_cast<const int64_t*>(k.const_data_ptr()), on_device};
}

void prune_(Tensors weights, Tensors masks, Tensor k, Tensors momenta, int64_t sample_from) {
  STD_TORCH_CHECK(!weights.empty(), "weights: expected at least one tensor, got none");
  const OnDeviceOf device(weights[0]);
  const Lists lists(weights, "weights", masks, momenta, {}, device);
  const cuda::Wanted counts = wanted(k, weights[0], weights.size());
  if (lists.are_empty()) return;
  const cuda::SelectLists ranked = lists.ranked(k.numel() == static_cast<int64_t>(weights.size()), sample_from);
  const Tensor memory = workspace(ranked, weights[0]);
  check_cuda(cuda::launch_prune(ranked, counts, memory.mutable_data_ptr(), device.stream()), "prune_");
}

void drop_regrow_(Tensors weights, Tensors masks, Tensors scores, Tensor drop_fraction, Tensors momenta,
                  int64_t sample_from) {
  STD_TORCH_CHECK(!weights.empty(), "weights: expected at least one tensor, got none");
  STD_TORCH_CHECK(scores.size() == weights.size(), "scores: expected one for each of the ", weights.size(), " weights");
  STD_TORCH_CHECK(drop_fraction.scalar_type() == ScalarType::Double && drop_fraction.numel() == 1,
                  "drop_fraction: expected a float64 tensor of one element");
  const OnDeviceOf device(weights[0]);
  const Lists lists(weights, "weights", masks, momenta, scores, device);
  if (lists.are_empty()) return;
  const auto* number = static_cast<const double*>(drop_fraction.const_data_ptr());
  cuda::Fraction fraction;
  if (is_on_device(drop_fraction)) {
    check_beside(drop_fraction, weights[0], "drop_fraction");
    fraction.address = number;
  } else {
    STD_TORCH_CHECK(drop_fraction.is_cpu(), "drop_fraction: expected a tensor on the device of the first, or the CPU");
    fraction.number = *number;
  }
  const cuda::SelectLists ranked = lists.ranked(/*each=*/true, sample_from);
  const Tensor memory = workspace(ranked, weights[0]);
  check_cuda(cuda::launch_drop_regrow(ranked, fraction, memory.mutable_data_ptr(), device.stream()), "drop_regrow_");
}

Tensors topk_mask(Tensors scores, Tensor k, int64_t sample_from) {
  STD_TORCH_CHECK(!scores.empty(), "scores: expected at least one tensor, got none");
  const OnDeviceOf device(scores[0]);
  Tensors masks;
  for (const Tensor& score : scores) {
    masks.push_back(torch::stable::new_empty(score, {packed_bytes(score.numel())}, ScalarType::Byte));
  }
  const Lists lists(scores, "scores", masks, {}, {}, device);
  const cuda::Wanted counts = wanted(k, scores[0], scores.size());
  if (lists.are_empty()) return masks;
  const cuda::SelectLists ranked = lists.ranked(k.numel() == static_cast<int64_t>(scores.size()), sample_from);
  const Tensor memory = workspace(ranked, scores[0]);
  check_cuda(cuda::launch_topk_mask(ranked, counts, memory.mutable_data_ptr(), device.stream()), "topk_mask");
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cuda, m) {
  m.def("prune_(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor k, Tensor(c!)[] momenta, int sample_from) -> ()");
  m.def(
      "drop_regrow_(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor[] scores, Tensor drop_fraction, "
      "Tensor(c!)[] momenta, int sample_from) -> ()");
  m.def("topk_mask(Tensor[] scores, Tensor k, int sample_from) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cuda, GRANET_CUDA_KEY, m) {
  m.impl("prune_", TORCH_BOX(&prune_));
  m.impl("drop_regrow_", TORCH_BOX(&drop_regrow_));
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
}

}  // namespace granet
