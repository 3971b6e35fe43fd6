// How files bind their operations to Python: each says how, and bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace amalgam {

namespace py = pybind11;

using Address = std::uintptr_t;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<T*> all_at(const std::vector<Address>& addresses) {
  std::vector<T*> pointers;
  for (Address address : addresses) pointers.push_back(at<T>(address));
  return pointers;
}

// What binds an operation to the submodule "cpu" or "cuda". A file has one object of this for each.
class Binding {
 public:
  using Bind = void (*)(py::module_&);

  Binding(const char* submodule, Bind bind) : submodule_(submodule), bind_(bind), next_(first_) {
    first_ = this;
  }

  // Binds everything that belongs to a submodule.
  static void bind_all(const std::string& submodule, py::module_& module) {
    for (const Binding* each = first_; each; each = each->next_) {
      if (submodule == each->submodule_) each->bind_(module);
    }
  }

 private:
  const char* submodule_;
  Bind bind_;
  const Binding* next_;
  static inline const Binding* first_ = nullptr;
};

using Constants = std::array<double, 4>;  // alpha, beta1, beta2, eps

// A student's m, v, h, c; or gradients in them.
using StateAddresses = std::array<Address, 4>;

}  // namespace amalgam
