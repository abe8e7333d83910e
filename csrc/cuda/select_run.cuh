// The launches of a ranking, for one kind of key; compiled by select_32.cu and select_64.cu.
#pragma once

#include "cuda/device.h"
#include "cuda/select_apply.cuh"
#include "cuda/select_pass.cuh"

namespace granet::cuda {

struct Steps {
  bool samples;  // whether any segment is large enough
  int passes;    // after which every verdict is final
  Effect effect;
};

template <typename Key, Rank rank>
cudaError_t run_ranking(const Selection& selection, const Steps& steps, cudaStream_t stream) {
  const auto run = [&](auto kernel, const auto&... more) {
    return launch_resident(kernel, SelectTraits::kThreads, selection.table.chunks, stream, selection, more...);
  };
  cudaError_t error = cudaSuccess;
  if (steps.samples) error = run(sample_kernel<Key, rank>);
  for (int pass = 0; pass < steps.passes && error == cudaSuccess; ++pass)
    error = run(pass_kernel<Key, rank>, pass % 2 != 0);
  if (error == cudaSuccess) error = run(tie_kernel<Key, rank>);
  if (error == cudaSuccess) error = run(apply_kernel<Key, rank>, steps.effect);
  return error;
}

template <typename Key>
cudaError_t run_selection(const Selection& selection, Rank rank, const Steps& steps, cudaStream_t stream) {
  switch (rank) {
    case Rank::kMagnitude:
      return run_ranking<Key, Rank::kMagnitude>(selection, steps, stream);
    case Rank::kGain:
      return run_ranking<Key, Rank::kGain>(selection, steps, stream);
    case Rank::kSigned:
      return run_ranking<Key, Rank::kSigned>(selection, steps, stream);
  }
  return cudaErrorInvalidValue;
}

extern template cudaError_t run_selection<uint32_t>(const Selection&, Rank, const Steps&, cudaStream_t);
extern template cudaError_t run_selection<uint64_t>(const Selection&, Rank, const Steps&, cudaStream_t);

}  // namespace granet::cuda
