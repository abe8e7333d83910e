// The Python module granet_kernels._native: what is not a tensor operator. It knows nothing of torch.
#include <sstream>
#include <string>

#include <pybind11/pybind11.h>

#include "common/isa.h"

namespace granet {
namespace {

namespace py = pybind11;

// Passed by setup.py: plain words, no quotes. An empty one means that there was none.
#define GRANET_TEXT_(words) #words
#define GRANET_TEXT(words) GRANET_TEXT_(words)

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The instruction set the compiler was allowed to assume everywhere; the kernels choose a better one at run time.
py::list cpu_baseline() {
  py::list isa;
#if defined(__x86_64__)
  isa.append("x86-64");
#elif defined(__aarch64__)
  isa.append("aarch64");
#endif
#if defined(__AVX2__)
  isa.append("avx2");
#endif
#if defined(__AVX512F__)
  isa.append("avx512f");
#endif
  return isa;
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

// "sm_80:sm_90:compute_90", or nothing.
py::list cuda_architectures() {
  py::list names;
  std::istringstream words(GRANET_TEXT(GRANET_CUDA_ARCHITECTURES));
  for (std::string name; std::getline(words, name, ':');) names.append(name);
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = GRANET_TEXT(GRANET_VERSION);
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch_abi_target"] = GRANET_TEXT(GRANET_TORCH_ABI_TARGET);
  info["torch_built_against"] = GRANET_TEXT(GRANET_TORCH_VERSION);
  info["cpu_baseline"] = cpu_baseline();
  info["cpu_kernels"] = isa_name(isa());
  info["cuda_toolkit"] = text_or_none(GRANET_TEXT(GRANET_CUDA_TOOLKIT));
  info["cuda_architectures"] = cuda_architectures();
  return info;
}

}  // namespace
}  // namespace granet

PYBIND11_MODULE(_native, module) {
  module.doc() = "How the compiled part of granet_kernels was built.";
  module.def("build_info", &granet::build_info, "A new dict that says how the compiled part was built.");
}
