// The optimizer step, namespace granet_cuda: an adaptor from tensors to cuda/sgd.h.
//
// Gradients have the memory layout of their parameters, and hyperparameters that are tensors lie on their device in the
// dtype that is computed in, which the caller sees to; what is checked here is what keeps a direct call from reading or
// writing out of bounds.
#include "cuda/sgd.h"

#include <optional>
#include <vector>

#include "torch/cuda/table.h"
#include "torch/step_check.h"

namespace granet {
namespace {

const void* address_of(const std::optional<Tensor>& scalar, const Tensor& first, ScalarType dtype, const char* name) {
  if (!scalar.has_value()) return nullptr;
  check_beside(*scalar, first, name);
  STD_TORCH_CHECK(scalar->scalar_type() == dtype && scalar->numel() == 1, name,
                  ": expected one number in the dtype that is computed in");
  return scalar->const_data_ptr();
}

void masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
                 std::vector<Tensor> masks, double lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool first, std::optional<Tensor> lr_tensor,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::vector<Tensor> averages,
                 double average_decay) {
  const bool has_momentum = momentum != 0, has_averages = !averages.empty();
  STD_TORCH_CHECK(!params.empty(), "params: expected at least one tensor, got none");
  STD_TORCH_CHECK(grads.size() == params.size() && masks.size() == params.size() &&
                      (!has_momentum || momenta.size() == params.size()) &&
                      (!has_averages || averages.size() == params.size()),
                  "grads, masks, momenta, averages: expected one for each of the ", params.size(), " params");
  const ScalarType dtype = params[0].scalar_type();
  const ScalarType momentum_dtype = has_momentum ? momenta[0].scalar_type() : dtype;
  cuda::TableRows rows(/*lists=*/3 + has_momentum + has_averages, /*further=*/0, cuda::kSgdChunk);
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    check_dense_beside(params[i], numel, params[0], element("params", i));
    check_dense_beside(grads[i], numel, params[0], element("grads", i));
    check_packed_beside(masks[i], numel, params[0], element("masks", i));
    STD_TORCH_CHECK(params[i].scalar_type() == dtype && grads[i].scalar_type() == dtype, element("params", i),
                    ": expected the dtype of params[0], and its gradient's");
    rows.begin_row(numel);
    rows.add(params[i].mutable_data_ptr());
    rows.add(grads[i].const_data_ptr());
    rows.add(masks[i].const_data_ptr());
    if (has_momentum) {
      check_dense_beside(momenta[i], numel, params[0], element("momenta", i));
      STD_TORCH_CHECK(momenta[i].scalar_type() == momentum_dtype, element("momenta", i),
                      ": expected the dtype of momenta[0]");
      rows.add(momenta[i].mutable_data_ptr());
    }
    if (has_averages) {
      check_dense_beside(averages[i], numel, params[0], element("averages", i));
      STD_TORCH_CHECK(averages[i].scalar_type() == average_dtype(dtype), element("averages", i),
                      ": expected the dtype that the params are computed in");
      rows.add(averages[i].mutable_data_ptr());
    }
  }
  if (rows.chunks() == 0) return;
  const OnDeviceOf device(params[0]);
  const Dtype of_params = floating_dtype(dtype, "params[0]");
  const Dtype of_momenta = floating_dtype(momentum_dtype, "momenta[0]");
  const ScalarType computed =
      cuda::sgd_compute_dtype(of_params, of_momenta) == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const cuda::SgdOptions options = {
      .lr = {.number = lr, .address = address_of(lr_tensor, params[0], computed, "lr_tensor")},
      .momentum = momentum,
      .dampening = dampening,
      .weight_decay = weight_decay,
      .grad_scale = {.number = 1, .address = address_of(grad_scale, params[0], computed, "grad_scale")},
      .found_inf = static_cast<const float*>(address_of(found_inf, params[0], ScalarType::Float, "found_inf")),
      .nesterov = nesterov,
      .maximize = maximize,
      .first = first,
      .is_averaged = has_averages,
      .average_decay = average_decay};
  const DeviceTable table = device_table(rows, params[0], device.stream());
  check_cuda(cuda::launch_masked_sgd(table.table, of_params, of_momenta, options, device.stream()), "masked_sgd_");
}

// Whether there is none, or one that a kernel can read where it is.
bool is_usual_scalar(const std::optional<Tensor>& scalar, const Tensor& first, ScalarType dtype) {
  return !scalar.has_value() || (is_on_device(*scalar) && scalar->get_device_index() == first.get_device_index() &&
                                 scalar->scalar_type() == dtype && scalar->numel() == 1);
}

// Computes if the arguments are plainly right, and says whether it did.
bool try_masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
                     std::vector<Tensor> masks, double lr, double momentum, double dampening, double weight_decay,
                     bool nesterov, bool maximize, bool first, std::optional<Tensor> lr_tensor,
                     std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::vector<Tensor> averages,
                     double average_decay) {
  if (momenta.empty() != (momentum == 0) || !is_usual_decay(average_decay)) return false;
  if (!is_usual_step(params, grads, momenta, masks, averages)) return false;
  const bool is_fp64 = params[0].scalar_type() == ScalarType::Double ||
                       (!momenta.empty() && momenta[0].scalar_type() == ScalarType::Double);
  const ScalarType computed = is_fp64 ? ScalarType::Double : ScalarType::Float;
  if (!is_usual_scalar(lr_tensor, params[0], computed) || !is_usual_scalar(grad_scale, params[0], computed) ||
      !is_usual_scalar(found_inf, params[0], ScalarType::Float)) {
    return false;
  }
  masked_sgd_(std::move(params), std::move(grads), std::move(momenta), std::move(masks), lr, momentum, dampening,
              weight_decay, nesterov, maximize, first, std::move(lr_tensor), std::move(grad_scale),
              std::move(found_inf), std::move(averages), average_decay);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cuda, m) {
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, "
      "Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, Tensor(c!)[] averages, float average_decay) -> ()");
  m.def(
      "try_masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, "
      "Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, Tensor(c!)[] averages, float average_decay) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cuda, GRANET_CUDA_KEY, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("try_masked_sgd_", TORCH_BOX(&try_masked_sgd_));
}

}  // namespace granet
