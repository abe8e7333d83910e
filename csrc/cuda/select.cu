#include "cuda/select.h"

#include <algorithm>

#include "cuda/select_prepare.cuh"
#include "cuda/select_run.cuh"

namespace granet::cuda {
namespace {

// Numbers of the device memory that a call works with.
struct Workspace {
  Segment* segments;  // of the first ranking
  Segment* more;      // of the second
  int64_t* wanted;
  unsigned long long* histograms;
  int64_t* tied;
  uint8_t* chosen;
  uint8_t* undecided;
  uint8_t* kept;
  size_t bytes;
};

int64_t segments_of(const SelectLists& lists) { return lists.each ? lists.tensors : 1; }

Workspace workspace_at(void* memory, const SelectLists& lists) {
  const auto segments = static_cast<size_t>(segments_of(lists));
  const auto chunks = static_cast<size_t>(lists.table.chunks);
  auto* begin = static_cast<char*>(memory);
  size_t used = 0;
  const auto take = [&]<typename T>(T*& pointer, size_t count) {
    pointer = reinterpret_cast<T*>(begin + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
  };
  Workspace result{};
  take(result.segments, segments);
  take(result.more, segments);
  take(result.wanted, segments);
  take(result.histograms, segments * SelectTraits::kBins);
  take(result.tied, chunks);
  take(result.chosen, chunks * kChunkGroups);
  take(result.undecided, chunks * kChunkGroups);
  take(result.kept, chunks * kChunkGroups);
  result.bytes = used;
  return result;
}

// Bits at the end of every widened number that are zero.
int unit_of(const Formats& formats) {
  if (formats.seen[static_cast<int>(FloatType::kFloat64)] || formats.seen[static_cast<int>(FloatType::kFloat32)]) {
    return 0;
  }
  const bool has_fp16 = formats.seen[static_cast<int>(FloatType::kFloat16)];
  return Float32::kMantissa - (has_fp16 ? Float16::kMantissa : BFloat16::kMantissa);
}

// A call's parts that all its kernels share.
class Call {
 public:
  Call(const SelectLists& lists, void* memory, cudaStream_t stream)
      : lists_(lists), space_(workspace_at(memory, lists)), stream_(stream) {}

  Selection ranking(Among among, Rank rank, bool by_gain) const {
    const Formats& formats = by_gain ? lists_.gains : lists_.numbers;
    const int unit = unit_of(formats);
    const bool is_wide = formats.seen[static_cast<int>(FloatType::kFloat64)];
    Selection selection{};
    selection.table = lists_.table;
    selection.segments = by_gain ? space_.more : space_.segments;
    selection.histograms = space_.histograms;
    selection.tied = space_.tied;
    selection.chosen = space_.chosen;
    selection.undecided = space_.undecided;
    selection.kept = space_.kept;
    selection.among = among;
    selection.each = lists_.each;
    selection.by_gain = by_gain;
    selection.unit = unit;
    selection.bits = is_wide ? key_bits<uint64_t>(rank, unit) : key_bits<uint32_t>(rank, unit);
    selection.sample_from = lists_.sample_from;
    return selection;
  }

  cudaError_t prepare(const Selection& selection, const Wanted& wanted) const {
    const int64_t* k = wanted.counts;
    if (!wanted.on_device) {
      const cudaError_t error = write_counts(k, segments_of(lists_));
      if (error != cudaSuccess) return error;
      k = space_.wanted;
    }
    return prepare(selection, k, nullptr, 0);
  }

  // Of two rankings, the second one's of what the first one leaves; counts are to follow.
  cudaError_t prepare(const Selection& kept, const Selection& regrown) const {
    return prepare(kept, nullptr, regrown.segments, regrown.bits);
  }

  cudaError_t count(const Fraction& fraction) const {
    return launch_resident(count_kernel, SelectTraits::kThreads, lists_.table.chunks, stream_, lists_.table,
                           space_.segments, space_.more, fraction);
  }

  cudaError_t run(const Selection& selection, Rank rank, Effect effect) const {
    const bool samples = (lists_.each ? lists_.largest : lists_.elements) >= lists_.sample_from;
    const auto passes = static_cast<int>(ceil_div(selection.bits, SelectTraits::kDigitBits));
    const Steps steps = {samples, passes + (samples ? 1 : 0), effect};  // one more, for a guess that is wrong
    const Formats& formats = selection.by_gain ? lists_.gains : lists_.numbers;
    return formats.seen[static_cast<int>(FloatType::kFloat64)]
               ? run_selection<uint64_t>(selection, rank, steps, stream_)
               : run_selection<uint32_t>(selection, rank, steps, stream_);
  }

 private:
  cudaError_t prepare(const Selection& selection, const int64_t* k, Segment* regrown, int regrown_bits) const {
    const int64_t segments = segments_of(lists_);
    return launch_resident(prepare_kernel, SelectTraits::kThreads, segments, stream_, selection, k, segments,
                           lists_.elements, regrown, regrown_bits);
  }

  cudaError_t write_counts(const int64_t* counts, int64_t count) const {
    for (int64_t first = 0; first < count; first += Counts::kMost) {
      Counts part{};
      const int64_t size = std::min<int64_t>(count - first, Counts::kMost);
      std::copy_n(counts + first, size, part.of);
      const Grid grid = {.blocks = 1, .threads = SelectTraits::kThreads, .stream = stream_};
      const cudaError_t error = launch(write_counts_kernel, grid, part, static_cast<int>(size), space_.wanted + first);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  const SelectLists& lists_;
  Workspace space_;
  cudaStream_t stream_;
};

}  // namespace

size_t select_workspace_bytes(const SelectLists& lists) { return workspace_at(nullptr, lists).bytes; }

cudaError_t launch_prune(const SelectLists& lists, const Wanted& k, void* workspace, cudaStream_t stream) {
  const Call call(lists, workspace, stream);
  const Selection selection = call.ranking(Among::kActive, Rank::kMagnitude, false);
  const cudaError_t error = call.prepare(selection, k);
  return error != cudaSuccess ? error : call.run(selection, Rank::kMagnitude, Effect::kWeights);
}

cudaError_t launch_topk_mask(const SelectLists& lists, const Wanted& k, void* workspace, cudaStream_t stream) {
  const Call call(lists, workspace, stream);
  const Selection selection = call.ranking(Among::kAll, Rank::kSigned, false);
  const cudaError_t error = call.prepare(selection, k);
  return error != cudaSuccess ? error : call.run(selection, Rank::kSigned, Effect::kMask);
}

cudaError_t launch_drop_regrow(const SelectLists& lists, const Fraction& fraction, void* workspace,
                               cudaStream_t stream) {
  const Call call(lists, workspace, stream);
  const Selection kept = call.ranking(Among::kActive, Rank::kMagnitude, false);
  const Selection regrown = call.ranking(Among::kInactive, Rank::kGain, true);
  cudaError_t error = call.prepare(kept, regrown);
  if (error == cudaSuccess) error = call.count(fraction);
  if (error == cudaSuccess) error = call.run(kept, Rank::kMagnitude, Effect::kKeep);
  if (error == cudaSuccess) error = call.run(regrown, Rank::kGain, Effect::kWeights);
  return error;
}

}  // namespace granet::cuda
