// Selection by keys of 32 bits: fp32, bf16, fp16.
#include "cuda/select_run.cuh"

namespace granet::cuda {

template cudaError_t run_selection<uint32_t>(const Selection&, Rank, const Steps&, cudaStream_t);

}  // namespace granet::cuda
