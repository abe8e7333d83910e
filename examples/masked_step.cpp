// One step of masked SGD on two tensors, from C++ alone: pack the masks, write a table of the tensors, launch.
//
//   cmake -S . -B build/cuda -DGRANET_CUDA=ON && cmake --build build/cuda && build/cuda/masked_step
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/bits.h"
#include "cuda/mask.h"
#include "cuda/sgd.h"

namespace {

using namespace granet;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Memory of the device.
template <typename T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) { check(cudaMalloc(&data_, size * sizeof(T))); }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  T* data() const { return data_; }
  std::vector<T> copy() const {
    std::vector<T> values(size_);
    check(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// A tensor of ones whose every third weight is active, with a gradient of ones and no momentum yet.
struct Parameter {
  explicit Parameter(size_t numel)
      : weight(std::vector<float>(numel, 1)),
        grad(std::vector<float>(numel, 1)),
        momentum(std::vector<float>(numel, 0)),
        mask(static_cast<size_t>(packed_bytes(static_cast<int64_t>(numel)))),
        size(static_cast<int64_t>(numel)) {
    std::vector<uint8_t> active(numel);
    for (size_t i = 0; i < numel; i += 3) active[i] = 1;
    const Array<uint8_t> unpacked(active);
    check(cuda::launch_pack_mask(unpacked.data(), size, mask.data(), nullptr));
    check(cudaDeviceSynchronize());  // before `unpacked` goes
  }

  Array<float> weight, grad, momentum;
  Array<uint8_t> mask;
  int64_t size;
};

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no GPU, so nothing to do");
    return 0;
  }
  const Parameter first(5000), second(12);
  cuda::TableRows rows(/*lists=*/4, /*further=*/0, cuda::kSgdChunk);
  for (const Parameter* parameter : {&first, &second}) {
    rows.begin_row(parameter->size);
    rows.add(parameter->weight.data());
    rows.add(parameter->grad.data());
    rows.add(parameter->mask.data());
    rows.add(parameter->momentum.data());
  }
  const Array<unsigned char> memory(rows.device_bytes());
  check(cuda::launch_write_table(rows, memory.data(), nullptr));
  const cuda::SgdOptions options = {.lr = {.number = 0.5}, .momentum = 0.9};
  check(cuda::launch_masked_sgd(rows.table(memory.data()), Dtype::kFloat32, Dtype::kFloat32, options, nullptr));
  check(cudaDeviceSynchronize());

  int wrong = 0;
  for (const Parameter* parameter : {&first, &second}) {
    const std::vector<float> weight = parameter->weight.copy();
    for (size_t i = 0; i < weight.size(); ++i) wrong += weight[i] != (i % 3 == 0 ? 0.5F : 1.0F);
    std::printf("%zu weights: %g %g %g %g ...\n", weight.size(), weight[0], weight[1], weight[2], weight[3]);
  }
  std::printf("%d are not as they should be\n", wrong);
  return wrong == 0 ? 0 : 1;
}
