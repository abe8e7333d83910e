#include "torch/conv_operands.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/active.h"
#include "torch/parallel.h"

namespace granet {

double time_of(const ConvShape& shape, int64_t entries) {
  const auto pixels = [](const Pair& size) { return static_cast<double>(size.h * size.w); };
  const double products = pixels(shape.output()) * static_cast<double>(shape.batch * entries);
  const double elements =
      static_cast<double>(shape.batch) * (static_cast<double>(shape.channels) * pixels(shape.input) +
                                          static_cast<double>(shape.out_channels) * pixels(shape.output()));
  return products / 40 + elements * 0.36;
}

int64_t entries_in(const std::vector<Tensor>& index) { return index.size() == 4 ? index[1].numel() : 0; }

bool is_evenly_spaced(const Tensor& tensor) {
  return tensor.dim() == 2 || tensor.size(2) <= 1 || tensor.size(3) <= 1 ||
         tensor.stride(2) == tensor.size(3) * tensor.stride(3);
}

ImageView view_of(const Tensor& tensor, const char* name, bool pointwise) {
  ImageView view{tensor.mutable_data_ptr(), element_of(tensor, name), 0, 0, 0, 0, 0};
  if (tensor.dim() == 2) {
    view.channel_stride = tensor.stride(1);
    view.y_stride = tensor.stride(0);
    view.pixels = std::max<int64_t>(1, tensor.size(0));
    return view;
  }
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected 2 or 4 dimensions, got ", tensor.dim());
  view.image_stride = tensor.stride(0);
  view.channel_stride = tensor.stride(1);
  view.y_stride = tensor.stride(2);
  view.x_stride = tensor.stride(3);
  if (pointwise) {
    STD_TORCH_CHECK(is_evenly_spaced(tensor), name, ": expected pixels that are evenly spaced in memory");
    view.pixels = std::max<int64_t>(1, tensor.size(2) * tensor.size(3));
    view.y_stride = tensor.size(3) == 1 ? view.y_stride : view.x_stride;
  }
  return view;
}

bool has_planes(const Tensor& tensor, const ImageView& view, const ConvShape& shape) {
  return view.element == cpu::Element::kFloat32 && view.y_stride == 1 &&
         (tensor.size(1) == 1 || view.channel_stride == shape.input.h * shape.input.w);
}

ImageView view_for(const Tensor& tensor, const char* name, const ConvShape& shape, bool in_place) {
  const ImageView view = view_of(tensor, name, in_place || is_pointwise(shape));
  STD_TORCH_CHECK(!in_place || has_planes(tensor, view, shape), name,
                  ": expected contiguous float32 planes, to be read in place");
  return view;
}

void check_size(const Tensor& tensor, const char* name, int64_t batch, int64_t channels, Pair size) {
  const bool matches = tensor.dim() == 2 ? tensor.size(0) == batch * size.h * size.w && tensor.size(1) == channels
                                         : tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == channels &&
                                               tensor.size(2) == size.h && tensor.size(3) == size.w;
  STD_TORCH_CHECK(matches, name, ": its shape is not the one that the index was built for");
}

namespace {

// Whether the entries of an index are in runs (cpu/stencil_index.h): it has their first ranks then, else all of them.
bool is_in_runs(const std::vector<Tensor>& index) { return index[3].numel() != 0; }

}  // namespace

const int32_t* ranks_of(const std::vector<Tensor>& index) {
  return is_in_runs(index) ? nullptr : static_cast<const int32_t*>(index[2].const_data_ptr());
}

cpu::StencilEntries entries_of(const std::vector<Tensor>& index, const Work& work, const float* values) {
  STD_TORCH_CHECK(index.size() == 4, "index: expected 4 tensors, got ", index.size());
  check_contiguous(index[0], ScalarType::Long, "index[0]", "int64");
  check_contiguous(index[1], ScalarType::Int, "index[1]", "int32");
  check_contiguous(index[2], ScalarType::Int, "index[2]", "int32");
  check_contiguous(index[3], ScalarType::Long, "index[3]", "int64");
  const int64_t groups = work.plan.blocks * work.stencil.rows();
  STD_TORCH_CHECK(index[0].numel() == groups + 1 && index[2].numel() == (is_in_runs(index) ? 0 : index[1].numel()) &&
                      index[3].numel() == (is_in_runs(index) ? groups : 0),
                  "index: not one that was built for these shapes");
  const auto* begin = static_cast<const int64_t*>(index[0].const_data_ptr());
  return {work.stencil.rows(), begin, static_cast<const int32_t*>(index[1].const_data_ptr()),
          is_in_runs(index) ? static_cast<const int64_t*>(index[3].const_data_ptr()) : begin, values};
}

Known known_of(const std::vector<Tensor>& known, int64_t weights) {
  STD_TORCH_CHECK(known.size() == 2, "known: expected 2 tensors, got ", known.size());
  check_packed(known[0], weights, "known[0]");
  check_contiguous(known[1], ScalarType::Int, "known[1]", "int32");
  return {known[0], known[1]};
}

bool are_those_of(const Tensor& bits, const Tensor& mask) {
  check_packed(mask, 0, "mask");
  const auto size = static_cast<size_t>(bits.numel());
  return bits.numel() == mask.numel() && std::memcmp(bits.const_data_ptr(), mask.const_data_ptr(), size) == 0;
}

Tensor fetched(const Tensor& weight, const Known& known, bool to_bfloat16) {
  const int64_t count = known.positions.numel();
  Tensor values = torch::stable::new_empty(known.positions, {count}, ScalarType::Float);
  cpu::gather(weight.const_data_ptr(), element_of(weight, "weight"),
              {static_cast<const int32_t*>(known.positions.const_data_ptr()), count, true}, to_bfloat16,
              static_cast<float*>(values.mutable_data_ptr()),
              TorchThreads(static_cast<double>(count) * cpu::kFetchNanoseconds));
  return values;
}

Tensor ordered(const Tensor& stored, const Known& known, const std::vector<Tensor>& index) {
  const int64_t count = known.positions.numel();
  STD_TORCH_CHECK(index.size() == 4 && entries_in(index) == count, "index: expected 4 tensors and ", count, " entries");
  check_contiguous(index[2], ScalarType::Int, "index[2]", "int32");
  check_contiguous(stored, ScalarType::Float, "stored", "float32");
  STD_TORCH_CHECK(stored.numel() == count, "stored: expected ", count, " elements, got ", stored.numel());
  if (is_in_runs(index)) return stored;
  STD_TORCH_CHECK(index[2].numel() == count, "index[2]: expected ", count, " elements, got ", index[2].numel());
  Tensor values = torch::stable::new_empty(stored, {count}, ScalarType::Float);
  cpu::gather(stored.const_data_ptr(), cpu::Element::kFloat32, {ranks_of(index), count, false}, false,
              static_cast<float*>(values.mutable_data_ptr()), TorchThreads(static_cast<double>(count)));
  return values;
}

bool rounds_to_bfloat16(const Tensor& input) { return input.scalar_type() == ScalarType::BFloat16; }

void check_weight(const Tensor& weight, const ConvShape& shape, const char* name) {
  STD_TORCH_CHECK(is_dense(weight) && weight.numel() == shape.weights(), name, ": expected a dense tensor of ",
                  shape.weights(), " elements, got ", weight.numel());
}

}  // namespace granet
