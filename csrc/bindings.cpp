// amalgam._core: the compiled operations as Python functions of pointers, sizes and a stream.
//
// No PyTorch header, so one build serves every PyTorch. amalgam/backends checks tensors before it
// takes their pointers; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/activation_sweep.h"
#include "cpu/choice_step.h"
#include "cpu/dispatch.h"
#include "cpu/largest_magnitude.h"
#include "cpu/storage.h"
#include "cpu/student_step.h"
#include "cpu/student_unroll_backward.h"
#include "cpu/teacher_distance.h"
#include "cpu/teacher_step.h"
#ifdef AMALGAM_WITH_CUDA
#include "cuda/runtime.h"
#include "cuda/student_step.h"
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

amalgam::cpu::Storage storage(const std::string& dtype) {
  using amalgam::cpu::Storage;
  if (dtype == "float32") return Storage::float32;
  if (dtype == "float64") return Storage::float64;
  if (dtype == "bfloat16") return Storage::bfloat16;
  if (dtype == "float16") return Storage::float16;
  throw std::invalid_argument("no storage is called " + dtype);
}

template <typename T>
std::vector<T*> all_at(const std::vector<Address>& addresses) {
  std::vector<T*> pointers;
  for (Address address : addresses) pointers.push_back(at<T>(address));
  return pointers;
}

using Constants = std::array<double, 4>;  // alpha, beta1, beta2, eps

amalgam::cpu::StudentConstants student_constants(const Constants& values) {
  const auto [alpha, beta1, beta2, eps] = values;
  return {alpha, beta1, beta2, eps};
}

// A student's m, v, h, c; or gradients in them.
using StateAddresses = std::array<Address, 4>;

template <typename T>
amalgam::cpu::StudentState<T> student_state(const StateAddresses& addresses) {
  const auto [m, v, h, c] = addresses;
  return {at<T>(m), at<T>(v), at<T>(h), at<T>(c)};
}

template <typename T>
void bind_student_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("student_step_" + dtype).c_str(),
      [](Address tensors, int64_t count, const std::vector<Address>& weights, int layers,
         int hidden, const Constants& constants, const std::string& grad, const std::string& cells,
         const std::string& out, bool in_place, double keep, double lr, bool stochastic,
         int threads) {
        const amalgam::cpu::StudentStep step{
            layers,         hidden,       student_constants(constants),
            storage(grad),  storage(cells), storage(out),
            in_place,       keep,         lr,
            stochastic};
        const std::vector<const T*> pointers = all_at<const T>(weights);
        const py::gil_scoped_release release;
        amalgam::cpu::student_step<T>(step, pointers.data(),
                                      at<const amalgam::cpu::StudentTensor>(tensors), count,
                                      threads);
      },
      "tensors"_a, "count"_a, "weights"_a, py::kw_only(), "layers"_a, "hidden"_a, "constants"_a,
      "grad"_a, "cells"_a, "out"_a, "in_place"_a, "keep"_a, "lr"_a, "stochastic"_a, "threads"_a);
  module.def(
      ("student_step_backward_" + dtype).c_str(),
      [](Address d_update, const StateAddresses& d_new, Address grad, const StateAddresses& state,
         Address d_grad, const StateAddresses& d_state, const std::vector<Address>& weights,
         const std::vector<Address>& d_weights, int64_t n, int layers, int hidden,
         const Constants& constants, int threads) {
        const std::vector<const T*> from = all_at<const T>(weights);
        const std::vector<T*> to = all_at<T>(d_weights);
        const py::gil_scoped_release release;
        amalgam::cpu::student_step_backward<T>(
            layers, hidden, student_constants(constants), from.data(), n, at<const T>(grad),
            student_state<const T>(state), at<const T>(d_update), student_state<const T>(d_new),
            at<T>(d_grad), student_state<T>(d_state), to.data(), threads);
      },
      "d_update"_a, "d_new"_a, "grad"_a, "state"_a, "d_grad"_a, "d_state"_a, "weights"_a,
      "d_weights"_a, py::kw_only(), "n"_a, "layers"_a, "hidden"_a, "constants"_a, "threads"_a);
}

template <typename T>
void bind_student_unroll_backward(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(
      ("student_unroll_backward_" + dtype).c_str(),
      [](Address grads, Address adjoints, const StateAddresses& state,
         const std::vector<Address>& weights, const std::vector<Address>& d_weights, int64_t steps,
         int64_t n, int64_t grads_stride, int64_t adjoints_stride, int layers, int hidden,
         const Constants& constants, int threads) {
        const std::vector<const T*> from = all_at<const T>(weights);
        const std::vector<T*> to = all_at<T>(d_weights);
        amalgam::cpu::student_unroll_backward<T>(
            layers, hidden, student_constants(constants), from.data(), steps, n,
            {at<const T>(grads), grads_stride}, {at<const T>(adjoints), adjoints_stride},
            student_state<const T>(state), to.data(), threads);
      },
      "grads"_a, "adjoints"_a, "state"_a, "weights"_a, "d_weights"_a, py::kw_only(), "steps"_a,
      "n"_a, "grads_stride"_a, "adjoints_stride"_a, "layers"_a, "hidden"_a, "constants"_a,
      "threads"_a, WithoutGil());
}

template <typename T>
void bind_teacher_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  using Ints = std::vector<int>;
  using Doubles = std::vector<double>;
  module.def(
      ("teacher_step_" + dtype).c_str(),
      [](Address grads, Address m, Address v, Address updates, Address new_m, Address new_v,
         int64_t n, int64_t k, const Ints& kinds, const Doubles& lr, const Doubles& beta1,
         const Doubles& beta2, const Doubles& eps, int threads) {
        amalgam::cpu::teacher_step(
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()}, at<const T>(grads),
            at<const T>(m), at<const T>(v), at<T>(updates), at<T>(new_m), at<T>(new_v), n, k,
            threads);
      },
      "grads"_a, "m"_a, "v"_a, "updates"_a, "new_m"_a, "new_v"_a, py::kw_only(), "n"_a, "k"_a,
      "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "threads"_a, WithoutGil());
  module.def(
      ("teacher_step_backward_" + dtype).c_str(),
      [](Address d_updates, Address d_m, Address d_v, Address grads, Address m, Address v,
         Address in_grads, Address in_m, Address in_v, int64_t n, int64_t k, const Ints& kinds,
         const Doubles& lr, const Doubles& beta1, const Doubles& beta2, const Doubles& eps,
         int threads) {
        amalgam::cpu::teacher_step_backward(
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()},
            at<const T>(d_updates), at<const T>(d_m), at<const T>(d_v), at<const T>(grads),
            at<const T>(m), at<const T>(v), at<T>(in_grads), at<T>(in_m), at<T>(in_v), n, k,
            threads);
      },
      "d_updates"_a, "d_m"_a, "d_v"_a, "grads"_a, "m"_a, "v"_a, "in_grads"_a, "in_m"_a, "in_v"_a,
      py::kw_only(), "n"_a, "k"_a, "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "threads"_a,
      WithoutGil());
}

// The teachers' settings, and all else but n, weights and threads.
struct ChoiceArguments {
  std::vector<int> kinds;
  std::vector<double> lr, beta1, beta2, eps;
  int layers, hidden;
  double time, learning_rate;

  amalgam::cpu::ChoiceSettings settings() const {
    return {static_cast<int>(kinds.size()),
            layers,
            hidden,
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()},
            time,
            learning_rate};
  }
};

template <typename T>
amalgam::cpu::ChoiceState<T> choice_state(const StateAddresses& addresses) {
  const auto [m, v, h, c] = addresses;
  return {at<T>(m), at<T>(v), at<T>(h), at<T>(c)};
}

template <typename T>
void bind_choice_step(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  using Ints = std::vector<int>;
  using Doubles = std::vector<double>;
  module.def(
      ("choice_step_" + dtype).c_str(),
      [](Address grad, const StateAddresses& state, Address ranks, Address update,
         const StateAddresses& new_state, Address mixture, const std::vector<Address>& weights,
         int64_t n, int layers, int hidden, const Ints& kinds, const Doubles& lr,
         const Doubles& beta1, const Doubles& beta2, const Doubles& eps, double time,
         double learning_rate, int threads) {
        const ChoiceArguments rest{kinds, lr, beta1, beta2, eps, layers, hidden, time,
                                   learning_rate};
        const std::vector<const T*> from = all_at<const T>(weights);
        amalgam::cpu::choice_step<T>(rest.settings(), from.data(), n, at<const T>(grad),
                                     at<const int64_t>(ranks), choice_state<const T>(state),
                                     at<T>(update), choice_state<T>(new_state), at<T>(mixture),
                                     threads);
      },
      "grad"_a, "state"_a, "ranks"_a, "update"_a, "new_state"_a, "mixture"_a, "weights"_a,
      py::kw_only(), "n"_a, "layers"_a, "hidden"_a, "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a,
      "eps"_a, "time"_a, "learning_rate"_a, "threads"_a, WithoutGil());
  module.def(
      ("choice_step_backward_" + dtype).c_str(),
      [](Address d_update, const StateAddresses& d_new, Address d_mixture, Address grad,
         const StateAddresses& state, Address ranks, Address d_grad, const StateAddresses& d_state,
         const std::vector<Address>& weights, const std::vector<Address>& d_weights, int64_t n,
         int layers, int hidden, const Ints& kinds, const Doubles& lr, const Doubles& beta1,
         const Doubles& beta2, const Doubles& eps, double time, double learning_rate,
         int threads) {
        const ChoiceArguments rest{kinds, lr, beta1, beta2, eps, layers, hidden, time,
                                   learning_rate};
        const std::vector<const T*> from = all_at<const T>(weights);
        const std::vector<T*> to = all_at<T>(d_weights);
        amalgam::cpu::choice_step_backward<T>(
            rest.settings(), from.data(), n, at<const T>(grad), at<const int64_t>(ranks),
            choice_state<const T>(state), at<const T>(d_update), choice_state<const T>(d_new),
            at<const T>(d_mixture), at<T>(d_grad), choice_state<T>(d_state), to.data(), threads);
      },
      "d_update"_a, "d_new"_a, "d_mixture"_a, "grad"_a, "state"_a, "ranks"_a, "d_grad"_a,
      "d_state"_a, "weights"_a, "d_weights"_a, py::kw_only(), "n"_a, "layers"_a, "hidden"_a,
      "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "time"_a, "learning_rate"_a, "threads"_a,
      WithoutGil());
}

void bind_activation(py::module_& module, const char* name,
                     amalgam::cpu::ActivationKernel amalgam::cpu::ActivationKernels::*kernel) {
  using namespace py::literals;
  module.def(
      name,
      [kernel](Address from, Address to, int64_t count) {
        using namespace amalgam::cpu;
        (AMALGAM_DISPATCH(activation_kernels).*kernel)(at<const float>(from), at<float>(to), count);
      },
      "from_"_a, "to"_a, "count"_a);
}

template <typename T>
void bind_cpu(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  bind_teacher_step<T>(module, dtype);
  bind_student_step<T>(module, dtype);
  bind_student_unroll_backward<T>(module, dtype);
  bind_choice_step<T>(module, dtype);
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
amalgam::cuda::Stored stored(const std::string& dtype) {
  using amalgam::cuda::Stored;
  if (dtype == "float32") return Stored::float32;
  if (dtype == "bfloat16") return Stored::bfloat16;
  if (dtype == "float16") return Stored::float16;
  throw std::invalid_argument("no storage on GPUs is called " + dtype);
}

amalgam::cuda::Products products_of(const std::string& precision) {
  using amalgam::cuda::Products;
  if (precision == "3xtf32") return Products::kSplit;
  if (precision == "tf32") return Products::kTf32;
  if (precision == "bf16") return Products::kBf16;
  throw std::invalid_argument("no products on GPUs are called " + precision);
}

void bind_cuda_student_step(py::module_& module) {
  using namespace py::literals;
  // (layers, hidden): how many coordinates a block takes.
  module.def("student_step_blocks", [] {
    std::map<std::pair<int, int>, int> blocks;
    for (const auto& size : amalgam::cuda::student_sizes()) {
      blocks[{size.layers, size.hidden}] = size.block;
    }
    return blocks;
  });
  module.def(
      "packed_student_words",
      [](int layers, int hidden, const std::string& products) {
        return amalgam::cuda::packed_student_words(layers, hidden, products_of(products));
      },
      "layers"_a, "hidden"_a, "products"_a);
  module.def(
      "pack_student",
      [](const std::vector<Address>& weights, Address to, int layers, const std::string& products,
         bool approximate, int device, Address stream) {
        amalgam::cuda::StudentWeights from{};
        if (layers < 1 || layers > 2 || weights.size() != 3u * layers + 2) {
          throw std::invalid_argument("weights must be three a layer, of one or two, and the head's");
        }
        for (int layer = 0; layer < layers; ++layer) {
          from.w_ih[layer] = at<const float>(weights[3 * layer]);
          from.w_hh[layer] = at<const float>(weights[3 * layer + 1]);
          from.b[layer] = at<const float>(weights[3 * layer + 2]);
        }
        from.head = at<const float>(weights[3 * layers]);
        from.head_bias = at<const float>(weights[3 * layers + 1]);
        amalgam::cuda::pack_student(from, at<uint32_t>(to), layers, products_of(products),
                                    approximate, device, at<void>(stream));
      },
      "weights"_a, "to"_a, py::kw_only(), "layers"_a, "products"_a, "approximate"_a, "device"_a,
      "stream"_a);
  module.def(
      "student_step_in_place",
      [](Address weights, Address table, Address first_block, Address control, int count,
         int64_t blocks, int layers, int hidden, const Constants& constants,
         const std::string& param, const std::string& grad, const std::string& cells, double keep,
         double lr, int warmup_steps, bool stochastic, bool aligned, const std::string& products,
         bool approximate, int device, Address stream) {
        const auto [alpha, beta1, beta2, eps] = constants;
        amalgam::cuda::StudentCall call{};
        call.weights = at<const void>(weights);
        call.table = at<const int64_t>(table);
        call.first_block = at<const int64_t>(first_block);
        call.control = at<const double>(control);
        call.blocks = blocks;
        call.count = count;
        call.warmup_steps = warmup_steps;
        call.param = stored(param);
        call.grad = stored(grad);
        call.stochastic = stochastic;
        call.keep = static_cast<float>(keep);
        call.lr = static_cast<float>(lr);
        call.alpha = static_cast<float>(alpha);
        call.beta1 = static_cast<float>(beta1);
        call.beta2 = static_cast<float>(beta2);
        call.of_grad = static_cast<float>(1 - beta1);
        call.of_square = static_cast<float>(1 - beta2);
        call.per_m = static_cast<float>(1 / (1 - beta1));
        call.per_v = static_cast<float>(1 / (1 - beta2));
        call.eps = static_cast<float>(eps);
        const amalgam::cuda::StudentKind kind{layers,  hidden,
                                              stored(cells), aligned,
                                              products_of(products), approximate};
        const py::gil_scoped_release release;
        amalgam::cuda::student_step_in_place(call, kind, device, at<void>(stream));
      },
      py::kw_only(), "weights"_a, "table"_a, "first_block"_a, "control"_a, "count"_a, "blocks"_a,
      "layers"_a, "hidden"_a, "constants"_a, "param"_a, "grad"_a, "cells"_a, "keep"_a, "lr"_a,
      "warmup_steps"_a, "stochastic"_a, "aligned"_a, "products"_a, "approximate"_a, "device"_a,
      "stream"_a);
}

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
  using namespace py::literals;
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
  bind_activation(cpu, "tanh", &amalgam::cpu::ActivationKernels::tanh);
  bind_activation(cpu, "sigmoid", &amalgam::cpu::ActivationKernels::sigmoid);
  bind_activation(cpu, "tanh_slope", &amalgam::cpu::ActivationKernels::tanh_slope);
  bind_activation(cpu, "exp", &amalgam::cpu::ActivationKernels::exp);
  cpu.def(
      "largest_magnitude",
      [](const std::vector<Address>& tensors, const std::vector<int64_t>& numels, int bytes,
         int threads) {
        const std::vector<const void*> pointers = all_at<const void>(tensors);
        return amalgam::cpu::largest_magnitude(pointers.data(), numels.data(),
                                               static_cast<int64_t>(pointers.size()), bytes,
                                               threads);
      },
      "tensors"_a, "numels"_a, py::kw_only(), "bytes"_a, "threads"_a, WithoutGil());
  cpu.attr("student_tensor_fields") = amalgam::cpu::kStudentTensorFields;
  bind_cpu<float>(cpu, "float32");
  bind_cpu<double>(cpu, "float64");

#ifdef AMALGAM_WITH_CUDA
  py::module_ cuda = module.def_submodule("cuda");
  cuda.attr("archs") = AMALGAM_CUDA_ARCHS;
  cuda.def("runtime_version", &amalgam::cuda::runtime_version);
  cuda.def("device_count", &amalgam::cuda::device_count);
  bind_cuda<float>(cuda, "float32");
  bind_cuda<double>(cuda, "float64");
  bind_cuda_student_step(cuda);
#else
  module.attr("cuda") = py::none();
#endif
}
