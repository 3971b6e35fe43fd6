// The CUDA operations as Python functions; nvcc can't compile pybind11's headers everywhere.
#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../binding.h"
#include "choice_step.h"
#include "runtime.h"
#include "sign_agreement.h"
#include "student_step.h"
#include "student_unroll.h"
#include "teacher_distance.h"
#include "teacher_step.h"

namespace amalgam {
namespace {

cuda::Stored stored(const std::string& dtype) {
  using cuda::Stored;
  if (dtype == "float32") return Stored::float32;
  if (dtype == "bfloat16") return Stored::bfloat16;
  if (dtype == "float16") return Stored::float16;
  throw std::invalid_argument("no storage on GPUs is called " + dtype);
}

cuda::Products products_of(const std::string& precision) {
  using cuda::Products;
  if (precision == "3xtf32") return Products::kSplit;
  if (precision == "tf32") return Products::kTf32;
  if (precision == "bf16") return Products::kBf16;
  throw std::invalid_argument("no products on GPUs are called " + precision);
}

void bind_cuda_student_step(py::module_& module) {
  using namespace py::literals;
  // (layers, hidden): how many coordinates a block takes.
  module.def(
      "student_step_blocks",
      [](bool nominal) {
        std::map<std::pair<int, int>, int> blocks;
        for (const auto& size : cuda::student_sizes(nominal)) {
          blocks[{size.layers, size.hidden}] = size.block;
        }
        return blocks;
      },
      py::kw_only(), "nominal"_a);
  module.def(
      "packed_student_words",
      [](int layers, int hidden, const std::string& products) {
        return cuda::packed_student_words(layers, hidden, products_of(products));
      },
      "layers"_a, "hidden"_a, "products"_a);
  module.def(
      "pack_student",
      [](const std::vector<Address>& weights, Address to, int layers, const std::string& products,
         bool approximate, int device, Address stream) {
        cuda::StudentWeights from{};
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
        cuda::pack_student(from, at<uint32_t>(to), layers, products_of(products),
                                    approximate, device, at<void>(stream));
      },
      "weights"_a, "to"_a, py::kw_only(), "layers"_a, "products"_a, "approximate"_a, "device"_a,
      "stream"_a);
  module.def(
      "student_step_in_place",
      [](Address weights, Address biases, Address corrections, Address places, Address table,
         Address first_block, Address control, int count, int64_t blocks, bool nominal, int layers,
         int hidden, const Constants& constants, const std::string& param, const std::string& grad,
         const std::string& moments, const std::string& cells, double keep, double lr,
         int warmup_steps, bool stochastic, bool aligned, const std::string& products,
         bool approximate, int device, Address stream) {
        const auto [alpha, beta1, beta2, eps] = constants;
        cuda::StudentCall call{};
        call.weights = at<const void>(weights);
        call.biases = at<const float>(biases);
        call.corrections = at<const float>(corrections);
        call.places = at<const int64_t>(places);
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
        cuda::set_constants(call, alpha, beta1, beta2, eps);
        const cuda::StudentKind kind{nominal,
                                     layers,
                                     hidden,
                                     stored(moments),
                                     stored(cells),
                                     aligned,
                                     products_of(products),
                                     approximate};
        const py::gil_scoped_release release;
        cuda::student_step_in_place(call, kind, device, at<void>(stream));
      },
      py::kw_only(), "weights"_a, "biases"_a, "corrections"_a, "places"_a, "table"_a,
      "first_block"_a, "control"_a, "count"_a, "blocks"_a, "nominal"_a, "layers"_a, "hidden"_a,
      "constants"_a, "param"_a, "grad"_a, "moments"_a, "cells"_a, "keep"_a, "lr"_a,
      "warmup_steps"_a, "stochastic"_a, "aligned"_a, "products"_a, "approximate"_a, "device"_a,
      "stream"_a);
}

cuda::UnrollState unroll_state(const StateAddresses& state) {
  return {at<float>(state[0]), at<float>(state[1]), at<float>(state[2]), at<float>(state[3])};
}

cuda::UnrollSums unroll_sums(const std::array<Address, 3>& sums, int64_t warps) {
  return {at<double>(sums[0]), at<double>(sums[1]), at<float>(sums[2]), warps};
}

void bind_cuda_unroll(py::module_& module) {
  using namespace py::literals;
  using Found = std::array<Address, 2>;  // gradients in the weights, and in biases
  module.def("unroll_sizes", &cuda::unroll_sizes);
  module.attr("most_students") = cuda::kMostStudents;
  module.def("unroll_sums", &cuda::unroll_sums, "hidden"_a);
  module.def("unroll_warps", &cuda::unroll_warps, "hidden"_a, "tiles"_a, "device"_a);
  py::class_<cuda::UnrollCall>(module, "UnrollCall", py::module_local())
      .def(py::init([](Address weights, Address biases, Address corrections, Address bounds,
                       Address grads, Address adjoints, int64_t grads_stride,
                       int64_t adjoints_stride, const StateAddresses& state, int64_t n,
                       int64_t tiles, int tensors, int steps, int students,
                       const Constants& constants) {
             cuda::UnrollCall call{};
             call.weights = at<const float>(weights);
             call.biases = at<const float>(biases);
             call.corrections = at<const float>(corrections);
             call.bounds = at<const int64_t>(bounds);
             call.grads = at<const float>(grads);
             call.adjoints = at<const float>(adjoints);
             call.grads_stride = grads_stride;
             call.adjoints_stride = adjoints_stride;
             call.m = at<const float>(state[0]);
             call.v = at<const float>(state[1]);
             call.h = at<const float>(state[2]);
             call.c = at<const float>(state[3]);
             call.n = n;
             call.tiles = tiles;
             call.tensors = tensors;
             call.steps = steps;
             call.students = students;
             const auto [alpha, beta1, beta2, eps] = constants;
             cuda::set_constants(call, alpha, beta1, beta2, eps);
             return call;
           }),
           py::kw_only(), "weights"_a, "biases"_a, "corrections"_a, "bounds"_a, "grads"_a,
           "adjoints"_a, "grads_stride"_a, "adjoints_stride"_a, "state"_a, "n"_a, "tiles"_a,
           "tensors"_a, "steps"_a, "students"_a, "constants"_a);
  module.def(
      "nominal_step",
      [](const cuda::UnrollCall& call, int hidden, Address update, const StateAddresses& to,
         int device, Address stream) {
        cuda::nominal_step(call, hidden, at<float>(update), unroll_state(to), device,
                           at<void>(stream));
      },
      "call"_a, "hidden"_a, py::kw_only(), "update"_a, "new"_a, "device"_a, "stream"_a,
      WithoutGil());
  module.def(
      "nominal_step_backward",
      [](const cuda::UnrollCall& call, int hidden, const StateAddresses& d_new, Address d_grad,
         const StateAddresses& d_state, const std::array<Address, 3>& sums, int64_t warps,
         const Found& found, int device, Address stream) {
        cuda::nominal_step_backward(call, hidden, unroll_state(d_new), at<float>(d_grad),
                                    unroll_state(d_state), unroll_sums(sums, warps),
                                    at<float>(found[0]), at<float>(found[1]), device,
                                    at<void>(stream));
      },
      "call"_a, "hidden"_a, py::kw_only(), "d_new"_a, "d_grad"_a, "d_state"_a, "sums"_a, "warps"_a,
      "found"_a, "device"_a, "stream"_a, WithoutGil());
  module.def(
      "nominal_unroll_backward",
      [](const cuda::UnrollCall& call, int hidden, const std::array<Address, 3>& sums,
         int64_t warps, const Found& found, int device, Address stream) {
        cuda::nominal_unroll_backward(call, hidden, unroll_sums(sums, warps), at<float>(found[0]),
                                      at<float>(found[1]), device, at<void>(stream));
      },
      "call"_a, "hidden"_a, py::kw_only(), "sums"_a, "warps"_a, "found"_a, "device"_a, "stream"_a,
      WithoutGil());
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
         const Doubles& beta2, const Doubles& eps, int device, Address stream) {
        cuda::teacher_step(
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()}, at<const T>(grads),
            at<const T>(m), at<const T>(v), at<T>(updates), at<T>(new_m), at<T>(new_v), n, k,
            device, at<void>(stream));
      },
      "grads"_a, "m"_a, "v"_a, "updates"_a, "new_m"_a, "new_v"_a, py::kw_only(), "n"_a, "k"_a,
      "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "device"_a, "stream"_a, WithoutGil());
  module.def(
      ("teacher_step_backward_" + dtype).c_str(),
      [](Address d_updates, Address d_m, Address d_v, Address grads, Address m, Address v,
         Address in_grads, Address in_m, Address in_v, int64_t n, int64_t k, const Ints& kinds,
         const Doubles& lr, const Doubles& beta1, const Doubles& beta2, const Doubles& eps,
         int device, Address stream) {
        cuda::teacher_step_backward(
            {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()},
            at<const T>(d_updates), at<const T>(d_m), at<const T>(d_v), at<const T>(grads),
            at<const T>(m), at<const T>(v), at<T>(in_grads), at<T>(in_m), at<T>(in_v), n, k,
            device, at<void>(stream));
      },
      "d_updates"_a, "d_m"_a, "d_v"_a, "grads"_a, "m"_a, "v"_a, "in_grads"_a, "in_m"_a, "in_v"_a,
      py::kw_only(), "n"_a, "k"_a, "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "device"_a,
      "stream"_a, WithoutGil());
}

template <typename T>
void bind_teacher_distance(py::module_& module, const std::string& dtype) {
  using namespace py::literals;
  module.def(("teacher_distance_partials_" + dtype).c_str(),
             &cuda::teacher_distance_partials<T>, "n"_a);
  module.def(
      ("teacher_distance_" + dtype).c_str(),
      [](Address students, Address teachers, Address distances, Address totals, Address partials,
         int64_t rows, int64_t teacher_rows, int64_t n, int64_t k, double eps, double huber_delta,
         int device, Address stream) {
        cuda::teacher_distance(at<const T>(students), at<const T>(teachers), at<T>(distances),
                               at<T>(totals), at<double>(partials), rows, teacher_rows, n, k, eps,
                               huber_delta, device, at<void>(stream));
      },
      "students"_a, "teachers"_a, "distances"_a, "totals"_a, "partials"_a, py::kw_only(),
      "rows"_a, "teacher_rows"_a, "n"_a, "k"_a, "eps"_a, "huber_delta"_a, "device"_a, "stream"_a,
      WithoutGil());
  module.def(
      ("teacher_distance_backward_" + dtype).c_str(),
      [](Address grad, Address students, Address teachers, Address totals, Address in_students,
         Address in_teachers, int64_t rows, int64_t teacher_rows, int64_t n, int64_t k, double eps,
         double huber_delta, int device, Address stream) {
        cuda::teacher_distance_backward(
            at<const T>(grad), at<const T>(students), at<const T>(teachers), at<const T>(totals),
            at<T>(in_students), at<T>(in_teachers), rows, teacher_rows, n, k, eps, huber_delta,
            device, at<void>(stream));
      },
      "grad"_a, "students"_a, "teachers"_a, "totals"_a, "in_students"_a, "in_teachers"_a,
      py::kw_only(), "rows"_a, "teacher_rows"_a, "n"_a, "k"_a, "eps"_a, "huber_delta"_a,
      "device"_a, "stream"_a, WithoutGil());
}

void bind_sign_agreement(py::module_& module) {
  using namespace py::literals;
  using Formats = std::vector<int>;
  module.def(
      "sign_agreements",
      [](const std::vector<Address>& first, const Formats& first_formats,
         const std::vector<Address>& second, const Formats& second_formats,
         const std::vector<int64_t>& numels, Address found, int device, Address stream) {
        std::vector<cuda::SignPair> pairs;
        for (size_t i = 0; i < first.size(); ++i) {
          pairs.push_back({at<const void>(first[i]), at<const void>(second[i]), numels[i],
                           static_cast<cuda::Format>(first_formats[i]),
                           static_cast<cuda::Format>(second_formats[i])});
        }
        cuda::sign_agreements(pairs.data(), static_cast<int64_t>(pairs.size()), at<int64_t>(found),
                              device, at<void>(stream));
      },
      "first"_a, "first_formats"_a, "second"_a, "second_formats"_a, "numels"_a, "found"_a,
      py::kw_only(), "device"_a, "stream"_a, WithoutGil());
}

using Ints = std::vector<int>;
using Doubles = std::vector<double>;

// A pool's settings, by column.
struct Columns {
  const Ints& kinds;
  const Doubles &lr, &beta1, &beta2, &eps;

  cuda::TeacherSettings settings() const {
    return {kinds.data(), lr.data(), beta1.data(), beta2.data(), eps.data()};
  }
};

// `from`: addresses of weights, grad, ranks, m, v, h and c.
cuda::ChoiceCall choice_call(const std::array<Address, 7>& from, int64_t n, size_t teachers,
                             double time, double learning_rate) {
  return {at<const float>(from[0]),      at<const float>(from[1]), at<const int64_t>(from[2]),
          at<const float>(from[3]),      at<const float>(from[4]), at<const float>(from[5]),
          at<const float>(from[6]),      n,                        static_cast<int>(teachers),
          static_cast<float>(time), static_cast<float>(learning_rate)};
}

cuda::ChoiceState choice_state(const StateAddresses& state) {
  return {at<float>(state[0]), at<float>(state[1]), at<float>(state[2]), at<float>(state[3])};
}

void bind_choice_step(py::module_& module) {
  using namespace py::literals;
  module.def("choice_sizes", &cuda::choice_sizes);
  module.def("choice_pool", &cuda::choice_pool, "teachers"_a);
  module.def("choice_sums", &cuda::choice_sums, "hidden"_a, "teachers"_a);
  module.def("choice_warps", &cuda::choice_warps, "hidden"_a, "teachers"_a, "n"_a, "device"_a);
  module.def(
      "choice_step",
      [](const std::array<Address, 7>& inputs, Address update, const StateAddresses& to,
         Address mixture, int64_t n, int hidden, const Ints& kinds, const Doubles& lr,
         const Doubles& beta1, const Doubles& beta2, const Doubles& eps, double time,
         double learning_rate, int device, Address stream) {
        const Columns pool{kinds, lr, beta1, beta2, eps};
        cuda::choice_step(choice_call(inputs, n, kinds.size(), time, learning_rate),
                          pool.settings(), hidden, at<float>(update), choice_state(to),
                          at<float>(mixture), device, at<void>(stream));
      },
      "inputs"_a, py::kw_only(), "update"_a, "new"_a, "mixture"_a, "n"_a, "hidden"_a, "kinds"_a,
      "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "time"_a, "learning_rate"_a, "device"_a, "stream"_a,
      WithoutGil());
  module.def(
      "choice_step_backward",
      [](const std::array<Address, 7>& inputs, Address d_update, const StateAddresses& d_new,
         Address d_mixture, Address d_grad, const StateAddresses& d_state, Address sums,
         int64_t warps, int64_t n, int hidden, const Ints& kinds, const Doubles& lr,
         const Doubles& beta1, const Doubles& beta2, const Doubles& eps, double time,
         double learning_rate, int device, Address stream) {
        const Columns pool{kinds, lr, beta1, beta2, eps};
        cuda::choice_step_backward(
            choice_call(inputs, n, kinds.size(), time, learning_rate), pool.settings(), hidden,
            at<const float>(d_update), choice_state(d_new), at<const float>(d_mixture),
            at<float>(d_grad), choice_state(d_state), at<double>(sums), warps, device,
            at<void>(stream));
      },
      "inputs"_a, py::kw_only(), "d_update"_a, "d_new"_a, "d_mixture"_a, "d_grad"_a, "d_state"_a,
      "sums"_a, "warps"_a, "n"_a, "hidden"_a, "kinds"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
      "time"_a, "learning_rate"_a, "device"_a, "stream"_a, WithoutGil());
}

const Binding binding("cuda", [](py::module_& module) {
  module.attr("archs") = AMALGAM_CUDA_ARCHS;
  module.def("runtime_version", &cuda::runtime_version);
  module.def("device_count", &cuda::device_count);
  bind_teacher_distance<float>(module, "float32");
  bind_teacher_distance<double>(module, "float64");
  bind_teacher_step<float>(module, "float32");
  bind_teacher_step<double>(module, "float64");
  bind_choice_step(module);
  bind_sign_agreement(module);
  bind_cuda_student_step(module);
  bind_cuda_unroll(module);
});

}  // namespace
}  // namespace amalgam
