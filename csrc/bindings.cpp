// amalgam._core: the compiled operations as Python functions of pointers, sizes and a stream.
//
// No PyTorch header, so one build serves every PyTorch. amalgam/backends checks tensors before it
// takes their pointers; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/teacher_distance.h"
#ifdef AMALGAM_WITH_CUDA
#include "cuda/runtime.h"
#include "cuda/teacher_distance.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

template <typename T>
void bind_cpu(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("teacher_distance_" + dtype).c_str(),
      [](Address student, Address teachers, Address distances, Address totals, int64_t n,
         int64_t k, double eps, double huber_delta, int threads) {
        amalgam::cpu::teacher_distance(at<const T>(student), at<const T>(teachers),
                                       at<T>(distances), at<T>(totals), n, k, eps, huber_delta,
                                       threads);
      },
      "student"_a, "teachers"_a, "distances"_a, "totals"_a, py::kw_only(), "n"_a, "k"_a, "eps"_a,
      "huber_delta"_a, "threads"_a, WithoutGil());
  module.def(
      ("teacher_distance_backward_" + dtype).c_str(),
      [](Address grad, Address student, Address teachers, Address totals, Address in_student,
         Address in_teachers, int64_t n, int64_t k, double eps, double huber_delta, int threads) {
        amalgam::cpu::teacher_distance_backward(
            at<const T>(grad), at<const T>(student), at<const T>(teachers), at<const T>(totals),
            at<T>(in_student), at<T>(in_teachers), n, k, eps, huber_delta, threads);
      },
      "grad"_a, "student"_a, "teachers"_a, "totals"_a, "in_student"_a, "in_teachers"_a,
      py::kw_only(), "n"_a, "k"_a, "eps"_a, "huber_delta"_a, "threads"_a, WithoutGil());
}

#ifdef AMALGAM_WITH_CUDA
template <typename T>
void bind_cuda(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(("teacher_distance_partials_" + dtype).c_str(),
             &amalgam::cuda::teacher_distance_partials<T>, "n"_a);
  module.def(
      ("teacher_distance_" + dtype).c_str(),
      [](Address student, Address teachers, Address distances, Address totals, Address partials,
         int64_t n, int64_t k, double eps, double huber_delta, int device, Address stream) {
        amalgam::cuda::teacher_distance(at<const T>(student), at<const T>(teachers),
                                        at<T>(distances), at<T>(totals), at<double>(partials), n,
                                        k, eps, huber_delta, device, at<void>(stream));
      },
      "student"_a, "teachers"_a, "distances"_a, "totals"_a, "partials"_a, py::kw_only(), "n"_a,
      "k"_a, "eps"_a, "huber_delta"_a, "device"_a, "stream"_a, WithoutGil());
  module.def(
      ("teacher_distance_backward_" + dtype).c_str(),
      [](Address grad, Address student, Address teachers, Address totals, Address in_student,
         Address in_teachers, int64_t n, int64_t k, double eps, double huber_delta, int device,
         Address stream) {
        amalgam::cuda::teacher_distance_backward(
            at<const T>(grad), at<const T>(student), at<const T>(teachers), at<const T>(totals),
            at<T>(in_student), at<T>(in_teachers), n, k, eps, huber_delta, device,
            at<void>(stream));
      },
      "grad"_a, "student"_a, "teachers"_a, "totals"_a, "in_student"_a, "in_teachers"_a,
      py::kw_only(), "n"_a, "k"_a, "eps"_a, "huber_delta"_a, "device"_a, "stream"_a, WithoutGil());
}
#endif

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

  py::module_ cpu = module.def_submodule("cpu");
  cpu.def("isa", [] { return std::string(amalgam::cpu::name(amalgam::cpu::isa())); });
  cpu.def("available_isas", &amalgam::cpu::available_isas);
  bind_cpu<float>(cpu, "float32");
  bind_cpu<double>(cpu, "float64");

#ifdef AMALGAM_WITH_CUDA
  py::module_ cuda = module.def_submodule("cuda");
  cuda.attr("archs") = AMALGAM_CUDA_ARCHS;
  cuda.def("runtime_version", &amalgam::cuda::runtime_version);
  cuda.def("device_count", &amalgam::cuda::device_count);
  bind_cuda<float>(cuda, "float32");
  bind_cuda<double>(cuda, "float64");
#else
  module.attr("cuda") = py::none();
#endif
}
