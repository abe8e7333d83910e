// The Python module granet_simt: kernels of csrc/cuda on NumPy arrays, run on the host, without torch.
#include <optional>
#include <stdexcept>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/mask.h"
#include "cuda/sgd.h"
#include "engine.h"

namespace granet {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void check_packed(const Bytes& packed, int64_t numel) {
  if (packed.size() < packed_bytes(numel)) {
    throw py::value_error("packed: expected " + std::to_string(packed_bytes(numel)) + " bytes, got " +
                          std::to_string(packed.size()));
  }
}

// Runs launch(table) on a table of one tensor.
template <typename Launch, typename... Addresses>
void with_table(int64_t chunk, int64_t numel, const Launch& launch, Addresses... addresses) {
  cuda::TableRows rows(sizeof...(addresses), /*further=*/0, chunk);
  rows.begin_row(numel);
  (rows.add(addresses), ...);
  std::vector<int32_t> memory(rows.device_bytes() / sizeof(int32_t));
  check(cuda::launch_write_table(rows, memory.data(), nullptr));
  check(launch(rows.table(memory.data())));
}

Bytes pack_mask(const Bytes& mask) {
  Bytes packed(packed_bytes(mask.size()));
  check(cuda::launch_pack_mask(mask.data(), mask.size(), packed.mutable_data(), nullptr));
  return packed;
}

Bytes unpack_mask(const Bytes& packed, int64_t numel) {
  check_packed(packed, numel);
  Bytes mask(numel);
  check(cuda::launch_unpack_mask(packed.data(), numel, mask.mutable_data(), nullptr));
  return mask;
}

int64_t count_active(const Bytes& packed) {
  unsigned long long ones = 0;
  with_table(
      cuda::kCountChunk, packed.size(),
      [&](const cuda::Table& table) { return cuda::launch_count_active(table, &ones, nullptr); }, packed.data());
  return static_cast<int64_t>(ones);
}

void zero_inactive(Floats tensor, const Bytes& packed) {
  check_packed(packed, tensor.size());
  with_table(
      cuda::kZeroChunk, tensor.size(),
      [](const cuda::Table& table) { return cuda::launch_zero_inactive(table, sizeof(float), nullptr); },
      tensor.mutable_data(), packed.data());
}

void masked_sgd(Floats param, const Floats& grad, Floats velocity, const Bytes& packed, double lr, double momentum,
                double weight_decay, std::optional<Floats> average, double average_decay) {
  if (grad.size() != param.size() || velocity.size() != param.size() ||
      (average.has_value() && average->size() != param.size())) {
    throw py::value_error("grad, velocity, average: expected the size of param");
  }
  check_packed(packed, param.size());
  const cuda::SgdOptions options = {.lr = {.number = lr},
                                    .momentum = momentum,
                                    .weight_decay = weight_decay,
                                    .is_averaged = average.has_value(),
                                    .average_decay = average_decay};
  const auto launch = [&](const cuda::Table& table) {
    return cuda::launch_masked_sgd(table, Dtype::kFloat32, Dtype::kFloat32, options, nullptr);
  };
  const auto with_averages = [&](auto... addresses) {
    if (average.has_value()) {
      with_table(cuda::kSgdChunk, param.size(), launch, addresses..., average->mutable_data());
    } else {
      with_table(cuda::kSgdChunk, param.size(), launch, addresses...);
    }
  };
  if (momentum == 0) {
    with_averages(param.mutable_data(), grad.data(), packed.data());
  } else {
    with_averages(param.mutable_data(), grad.data(), packed.data(), velocity.mutable_data());
  }
}

void take_turns(const std::string& order, uint64_t seed, unsigned resident) {
  simt::Options options{.seed = seed, .resident = resident};
  if (order == "backward") options.order = simt::Order::kBackward;
  if (order == "shuffled") options.order = simt::Order::kShuffled;
  simt::set_options(options);
}

}  // namespace
}  // namespace granet

PYBIND11_MODULE(granet_simt, module) {
  using namespace granet;
  module.doc() = "CUDA kernels on NumPy arrays, run on the host.";
  module.def("pack_mask", &pack_mask);
  module.def("unpack_mask", &unpack_mask);
  module.def("count_active", &count_active);
  module.def("zero_inactive", &zero_inactive, py::arg("tensor").noconvert(), py::arg("packed").noconvert());
  module.def("masked_sgd", &masked_sgd, py::arg("param").noconvert(), py::arg("grad").noconvert(),
             py::arg("velocity").noconvert(), py::arg("packed").noconvert(), py::arg("lr"), py::arg("momentum"),
             py::arg("weight_decay"), py::arg("average").noconvert() = py::none(), py::arg("average_decay") = 0);
  module.def("take_turns", &take_turns, "forward, backward or shuffled; a seed; blocks that take turns",
             py::arg("order"), py::arg("seed") = 1, py::arg("resident") = 2);
}
