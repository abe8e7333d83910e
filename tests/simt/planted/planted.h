// Kernels with a fault each, to see that it is found; `mended` leaves the fault out, and then nothing may be found.
#pragma once

#include "cuda/launch.h"

namespace granet::cuda::planted {

constexpr int kThreads = 64;

using Launcher = cudaError_t (*)(bool mended);

// In races.cu, for ThreadSanitizer.
cudaError_t unguarded_sum(bool mended);
cudaError_t missing_barrier(bool mended);
cudaError_t reused_too_early(bool mended);
cudaError_t missing_fence(bool mended);
cudaError_t plain_counter(bool mended);
cudaError_t warp_without_barrier(bool mended);

// In bounds.cu, for AddressSanitizer and UndefinedBehaviorSanitizer.
cudaError_t behind_the_end(bool mended);
cudaError_t before_the_start(bool mended);
cudaError_t behind_shared_memory(bool mended);
cudaError_t unaligned_vector(bool mended);

// In barriers.cu, for simt itself.
cudaError_t divergent_barrier(bool mended);
cudaError_t ended_before_barrier(bool mended);
cudaError_t two_barriers(bool mended);
cudaError_t divergent_shuffle(bool mended);
cudaError_t shuffle_outside_mask(bool mended);
cudaError_t uninitialised_shared_memory(bool mended);
cudaError_t too_much_shared_memory(bool mended);

}  // namespace granet::cuda::planted
