// The optimizer step, namespace granet_cpp: an adaptor from tensors to cpu/sgd.h.
//
// Gradients have the memory layout of their parameters, which the caller sees to; what is checked here is what keeps a
// direct call from reading or writing out of bounds.
#include <vector>

#include "cpu/sgd.h"
#include "torch/checks.h"
#include "torch/parallel.h"
#include "torch/step_check.h"

namespace granet {
namespace {

void masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
                 std::vector<Tensor> masks, double lr, double momentum, double dampening, double weight_decay,
                 double grad_scale, bool nesterov, bool maximize, bool first, std::vector<Tensor> averages,
                 double average_decay) {
  const bool has_momentum = momentum != 0, has_averages = !averages.empty();
  STD_TORCH_CHECK(!params.empty(), "params: expected at least one tensor, got none");
  STD_TORCH_CHECK(grads.size() == params.size() && masks.size() == params.size() &&
                      (!has_momentum || momenta.size() == params.size()) &&
                      (!has_averages || averages.size() == params.size()),
                  "grads, masks, momenta, averages: expected one for each of the ", params.size(), " params");
  const ScalarType dtype = params[0].scalar_type();
  const ScalarType momentum_dtype = has_momentum ? momenta[0].scalar_type() : dtype;
  std::vector<cpu::SgdTensor> tensors(params.size());
  int64_t weights = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    weights += numel;
    check_dense(params[i], numel, element("params", i));
    check_dense(grads[i], numel, element("grads", i));
    check_packed(masks[i], numel, element("masks", i));
    STD_TORCH_CHECK(params[i].scalar_type() == dtype && grads[i].scalar_type() == dtype, element("params", i),
                    ": expected the dtype of params[0], and its gradient's");
    tensors[i] = {.param = params[i].mutable_data_ptr(),
                  .grad = grads[i].const_data_ptr(),
                  .momentum = nullptr,
                  .mask = static_cast<const uint8_t*>(masks[i].const_data_ptr()),
                  .numel = numel};
    if (has_momentum) {
      check_dense(momenta[i], numel, element("momenta", i));
      STD_TORCH_CHECK(momenta[i].scalar_type() == momentum_dtype, element("momenta", i),
                      ": expected the dtype of momenta[0]");
      tensors[i].momentum = momenta[i].mutable_data_ptr();
    }
    if (has_averages) {
      check_dense(averages[i], numel, element("averages", i));
      STD_TORCH_CHECK(averages[i].scalar_type() == average_dtype(dtype), element("averages", i),
                      ": expected the dtype that the params are computed in");
      tensors[i].average = averages[i].mutable_data_ptr();
    }
  }
  const cpu::SgdOptions options = {.lr = lr,
                                   .momentum = momentum,
                                   .dampening = dampening,
                                   .weight_decay = weight_decay,
                                   .grad_scale = grad_scale,
                                   .nesterov = nesterov,
                                   .maximize = maximize,
                                   .first = first,
                                   .average_decay = average_decay};
  cpu::masked_sgd(tensors, floating_dtype(dtype, "params[0]"), floating_dtype(momentum_dtype, "momenta[0]"), options,
                  TorchThreads(static_cast<double>(weights) * 0.5));
}

// Computes if the arguments are plainly right, and says whether it did.
bool try_masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
                     std::vector<Tensor> masks, double lr, double momentum, double dampening, double weight_decay,
                     bool nesterov, bool maximize, bool first, std::vector<Tensor> averages, double average_decay) {
  if (momenta.empty() != (momentum == 0) || !is_usual_decay(average_decay)) return false;
  if (!is_usual_step(params, grads, momenta, masks, averages)) return false;
  masked_sgd_(std::move(params), std::move(grads), std::move(momenta), std::move(masks), lr, momentum, dampening,
              weight_decay, /*grad_scale=*/1, nesterov, maximize, first, std::move(averages), average_decay);
  return true;
}

bool judge_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
                std::vector<Tensor> masks, std::vector<Tensor> averages) {
  return is_usual_step(params, grads, momenta, masks, averages);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, float grad_scale, bool nesterov, bool maximize, "
      "bool first, Tensor(c!)[] averages, float average_decay) -> ()");
  m.def(
      "try_masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, "
      "Tensor(c!)[] averages, float average_decay) -> bool");
  m.def("is_usual_step(Tensor[] params, Tensor[] grads, Tensor[] momenta, Tensor[] masks, Tensor[] averages) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("try_masked_sgd_", TORCH_BOX(&try_masked_sgd_));
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CompositeExplicitAutograd, m) { m.impl("is_usual_step", TORCH_BOX(&judge_step)); }

}  // namespace granet
