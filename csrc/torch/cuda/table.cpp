#include "torch/cuda/table.h"

#include <list>
#include <mutex>
#include <vector>

namespace granet {
namespace {

constexpr size_t kKept = 64;  // tables; a training step uses one to three, and as many again where gradients move

struct Kept {
  // A table is written on the stream of its first use; another stream would not wait for that.
  cudaStream_t stream;
  int32_t device;
  int64_t chunk;
  int32_t width;
  std::vector<int64_t> words;
  Tensor memory;

  bool is_of(const cuda::TableRows& rows, int32_t wanted_device, cudaStream_t wanted_stream) const {
    return stream == wanted_stream && device == wanted_device && chunk == rows.chunk() && width == rows.width() &&
           words == rows.words();
  }
};

std::mutex kept_mutex;
// Never destroyed: when the process ends, the device may be gone before.
std::list<Kept>& kept = *new std::list<Kept>;  // the latest used first

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

Tensor written(const cuda::TableRows& rows, const Tensor& like, cudaStream_t stream) {
  const auto words = static_cast<int64_t>(ceil_div(static_cast<int64_t>(rows.device_bytes()), 8));
  Tensor memory = torch::stable::new_empty(like, {words}, ScalarType::Long);
  check_cuda(cuda::launch_write_table(rows, memory.mutable_data_ptr(), stream), "writing a table of tensors");
  return memory;
}

}  // namespace

DeviceTable device_table(const cuda::TableRows& rows, const Tensor& like, cudaStream_t stream) {
  if (is_capturing(stream)) {
    Tensor memory = written(rows, like, stream);
    return {memory, rows.table(memory.mutable_data_ptr())};
  }
  const int32_t device = like.get_device_index();
  const std::lock_guard lock(kept_mutex);
  auto found = kept.begin();
  while (found != kept.end() && !found->is_of(rows, device, stream)) ++found;
  if (found != kept.end()) {
    kept.splice(kept.begin(), kept, found);
  } else {
    kept.push_front({stream, device, rows.chunk(), rows.width(), rows.words(), written(rows, like, stream)});
    if (kept.size() > kKept) kept.pop_back();
  }
  return {kept.front().memory, rows.table(kept.front().memory.mutable_data_ptr())};
}

}  // namespace granet
