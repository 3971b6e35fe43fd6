// amalgam._core: the compiled operations as Python functions of pointers, sizes and a stream.
//
// No PyTorch header, so one build serves every PyTorch. Operations check tensors before backends take
// their pointers; nothing here can. Each operation binds itself (binding.h).
#include <string>

#include "binding.h"
#include "cpu/activation_sweep.h"
#include "cpu/dispatch.h"

namespace amalgam {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

void bind_activation(py::module_& module, const char* name,
                     cpu::ActivationKernel cpu::ActivationKernels::*kernel) {
  using namespace py::literals;
  module.def(
      name,
      [kernel](Address from, Address to, int64_t count) {
        using namespace amalgam::cpu;
        (AMALGAM_DISPATCH(activation_kernels).*kernel)(at<const float>(from), at<float>(to), count);
      },
      "from_"_a, "to"_a, "count"_a);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled operations of amalgam.";
  module.attr("version") = AMALGAM_VERSION;
  module.attr("compiler") = compiler();
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif

  py::module_ of_cpu = module.def_submodule("cpu");
  of_cpu.def("isa", [] { return std::string(cpu::name(cpu::isa())); });
  of_cpu.def("available_isas", &cpu::available_isas);
  of_cpu.def("multiplies_bfloat16", &cpu::multiplies_bfloat16);
  bind_activation(of_cpu, "tanh", &cpu::ActivationKernels::tanh);
  bind_activation(of_cpu, "sigmoid", &cpu::ActivationKernels::sigmoid);
  bind_activation(of_cpu, "tanh_slope", &cpu::ActivationKernels::tanh_slope);
  bind_activation(of_cpu, "exp", &cpu::ActivationKernels::exp);
  Binding::bind_all("cpu", of_cpu);

#ifdef AMALGAM_WITH_CUDA
  py::module_ of_cuda = module.def_submodule("cuda");
  Binding::bind_all("cuda", of_cuda);
#else
  module.attr("cuda") = py::none();
#endif
}

}  // namespace amalgam
