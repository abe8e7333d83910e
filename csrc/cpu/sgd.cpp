#include "cpu/sgd.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/bits.h"
#include "common/isa.h"

namespace granet::cpu {

namespace portable {
SgdKernel sgd_kernel(Dtype param, Dtype momentum);
}
namespace avx2 {
SgdKernel sgd_kernel(Dtype param, Dtype momentum);
}
namespace avx512 {
SgdKernel sgd_kernel(Dtype param, Dtype momentum);
}

namespace {

// 65 536 weights: some 30 microseconds, and the list of groups takes half of the first-level cache. With a quarter of
// it two threads took 1.02 times as long at 50 to 95 % sparsity. Threads meet between cache lines if the tensors begin
// at one.
constexpr int64_t kChunkGroups = 8192;
constexpr int64_t kWordGroups = 8;  // mask bytes that are looked at together

// Percent of a chunk's groups that have an active weight, up to which a list of them is made and what they need is
// fetched ahead; above, every group is computed, for the memory of the rest is fetched anyway. In a loop over one
// tensor of 25 million weights the two took the same time at 96 % random sparsity, 28 %.
constexpr int64_t kListed = 25;

// The list jumps over so many words at a time, about a page, so that the hardware sees no stream to run ahead of: in
// the order of memory it fetches the lines that are passed over as well.
constexpr int64_t kStride = 17;

// One word in so many tells well enough how many groups have an active weight.
constexpr int64_t kSampled = 5;

// Whether the lines of every group are fetched ahead: the processor's own prefetchers stop at the end of each page. On
// a Zen 4 one thread takes 1.16 of the time of torch's fused step with it and 1.03 without. On a Zen 5 it takes 0.97
// with it; without was not measured there. Others are left to their prefetchers.
bool fetches_ahead() {
  constexpr int kZen5 = 26;
  static const bool is_faster = amd_family() >= kZen5;
  return is_faster;
}

SgdKernel sgd_kernel(Dtype param, Dtype momentum) {
  return GRANET_FOR_ISA(portable::sgd_kernel, avx2::sgd_kernel, avx512::sgd_kernel)(param, momentum);
}

// Row b: the places of the ones of b, in order.
constexpr auto kOnes = [] {
  std::array<std::array<uint8_t, 8>, 256> rows{};
  for (size_t bits = 0; bits < rows.size(); ++bits) {
    size_t count = 0;
    for (uint8_t i = 0; i < 8; ++i) {
      if (is_active(static_cast<uint8_t>(bits), i)) rows[bits][count++] = i;
    }
  }
  return rows;
}();

// About how many percent of the mask bytes in [0, groups) are not zero.
int64_t percent_nonzero(const uint8_t* mask, int64_t groups) {
  static_assert(kChunkGroups / kWordGroups / kSampled <= 2550, "the ones that are added up fit a byte");
  const int64_t words = groups / kWordGroups;
  if (words == 0) return 0;
  uint64_t counts = 0;
  for (int64_t w = 0; w < words; w += kSampled) counts += nonzero_bytes(load_word(mask + w * kWordGroups));
  return 100 * sum_of_bytes(counts) / (ceil_div(words, kSampled) * kWordGroups);
}

// The groups of a chunk that have an active weight, in the order in which they are visited.
class GroupList {
 public:
  // Of the groups [0, groups): word by word, from each to the one kStride words on, and again from the next.
  GroupList(const uint8_t* mask, int64_t groups) {
    const int64_t words = groups / kWordGroups;
    for (int64_t first = 0; first < kStride; ++first) {
      for (int64_t w = first; w < words; w += kStride) append(w * kWordGroups, load_word(mask + w * kWordGroups));
    }
    const int64_t whole = words * kWordGroups;
    if (whole < groups) {
      uint64_t word = 0;
      std::memcpy(&word, mask + whole, static_cast<size_t>(groups - whole));
      append(whole, word);
    }
  }

  const uint16_t* data() const { return groups_.data(); }
  int64_t size() const { return size_; }

 private:
  void append(int64_t first, uint64_t word) {  // no branch: which bytes are zero cannot be foreseen
    const uint8_t nonzero = gather_bits(nonzero_bytes(word));
    for (int64_t i = 0; i < kWordGroups; ++i) groups_[size_ + i] = static_cast<uint16_t>(first + kOnes[nonzero][i]);
    size_ += std::popcount(nonzero);
  }

  std::array<uint16_t, kChunkGroups + kWordGroups> groups_;
  int64_t size_ = 0;
};

struct Task {
  const SgdTensor* tensor;
  int64_t first;  // group
};

std::vector<Task> cut(const std::vector<SgdTensor>& tensors) {
  std::vector<Task> tasks;
  for (const SgdTensor& tensor : tensors) {
    for (int64_t first = 0; first < mask_bytes(tensor.numel); first += kChunkGroups) tasks.push_back({&tensor, first});
  }
  return tasks;
}

class Update {
 public:
  Update(Dtype param, Dtype momentum, const SgdOptions& options)
      : kernel_(sgd_kernel(param, momentum)),
        options_(options),
        param_bytes_(kWeightsPerByte * item_size(param)),
        momentum_bytes_(kWeightsPerByte * item_size(momentum)) {}

  void operator()(const Task& task) const {
    const SgdTensor& tensor = *task.tensor;
    const int64_t whole = tensor.numel / kWeightsPerByte;
    const int64_t count = std::min(kChunkGroups, whole - task.first);
    if (count > 0) {
      whole_groups(tensor, task.first, count);
    }
    if (count < kChunkGroups && tensor.numel % kWeightsPerByte != 0) rest(tensor, whole);
  }

 private:
  void whole_groups(const SgdTensor& tensor, int64_t first, int64_t count) const {
    if (percent_nonzero(tensor.mask + first, count) > kListed) {
      return kernel_(chunk(tensor, first, nullptr, count), options_);
    }
    const GroupList groups(tensor.mask + first, count);
    kernel_(chunk(tensor, first, groups.data(), groups.size()), options_);
  }

  SgdChunk chunk(const SgdTensor& tensor, int64_t first, const uint16_t* groups, int64_t count) const {
    return {.param = at(tensor.param, first * param_bytes_),
            .grad = static_cast<const std::byte*>(tensor.grad) + first * param_bytes_,
            .momentum = at(options_.momentum != 0 ? tensor.momentum : tensor.param, first * momentum_bytes_),
            .mask = tensor.mask + first,
            .groups = groups,
            .group_count = count,
            .fetches_ahead = fetches_ahead()};
  }

  // The last group of a tensor, of fewer than eight weights, in a copy that is filled up.
  void rest(const SgdTensor& tensor, int64_t group) const {
    constexpr uint16_t kFirst = 0;
    if (tensor.mask[group] == 0) return;
    const int64_t count = tensor.numel - group * kWeightsPerByte;
    const auto param_bytes = static_cast<size_t>(param_bytes_ / kWeightsPerByte * count);
    const auto momentum_bytes = static_cast<size_t>(momentum_bytes_ / kWeightsPerByte * count);
    const SgdChunk last = chunk(tensor, group, &kFirst, 1);
    std::array<std::byte, kWeightsPerByte * sizeof(double)> param{}, grad{}, momentum{};
    std::memcpy(param.data(), last.param, param_bytes);
    std::memcpy(grad.data(), last.grad, param_bytes);
    std::memcpy(momentum.data(), last.momentum, momentum_bytes);
    SgdChunk copy = last;
    copy.param = param.data();
    copy.grad = grad.data();
    copy.momentum = momentum.data();
    kernel_(copy, options_);
    std::memcpy(last.param, param.data(), param_bytes);
    if (options_.momentum != 0) std::memcpy(last.momentum, momentum.data(), momentum_bytes);
  }

  static std::byte* at(void* address, int64_t offset) { return static_cast<std::byte*>(address) + offset; }

  SgdKernel kernel_;
  SgdOptions options_;
  int64_t param_bytes_, momentum_bytes_;  // of a group
};

}  // namespace

void masked_sgd(const std::vector<SgdTensor>& tensors, Dtype param, Dtype momentum, const SgdOptions& options,
                const Parallel& parallel) {
  const std::vector<Task> tasks = cut(tensors);
  const Update update(param, options.momentum != 0 ? momentum : param, options);
  parallel.for_each(static_cast<int64_t>(tasks.size()), [&](int64_t i) { update(tasks[static_cast<size_t>(i)]); });
}

}  // namespace granet::cpu
