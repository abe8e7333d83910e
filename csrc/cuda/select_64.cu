// Selection by keys of 64 bits: fp64, and what is ranked together with it.
#include "cuda/select_run.cuh"

namespace granet::cuda {

template cudaError_t run_selection<uint64_t>(const Selection&, Rank, const Steps&, cudaStream_t);

}  // namespace granet::cuda
