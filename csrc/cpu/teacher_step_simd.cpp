#include "teacher_step.h"

#include "simd.h"
#include "teacher_kinds.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

template <typename T, int inputs, int outputs>
struct Pointers {
  const T* from[inputs];
  T* to[outputs];
};

// Runs body on whole vectors; the last ones are padded with zeros, so that every coordinate is
// computed by the same instructions wherever it stands.
template <typename T, int inputs, int outputs, typename Body>
inline void for_each_vector(const Pointers<T, inputs, outputs>& p, int64_t count,
                            const Body& body) {
  Vector<T> from[inputs];
  Vector<T> to[outputs];
  int64_t at = 0;
  for (; at + kLanes<T> <= count; at += kLanes<T>) {
    for (int i = 0; i < inputs; ++i) from[i] = load(p.from[i] + at);
    body(from, to);
    for (int i = 0; i < outputs; ++i) store<T>(p.to[i] + at, to[i]);
  }
  if (at == count) return;
  const auto bytes = static_cast<unsigned long>(count - at) * sizeof(T);
  for (int i = 0; i < inputs; ++i) {
    from[i] = Vector<T>{};
    __builtin_memcpy(&from[i], p.from[i] + at, bytes);
  }
  body(from, to);
  for (int i = 0; i < outputs; ++i) __builtin_memcpy(p.to[i] + at, &to[i], bytes);
}

template <typename Kind, typename T>
inline Moments<T> moments(const TeacherConstants<T>& c, Vector<T> g, Moments<T> old) {
  if constexpr (Kind::has_m) old.m = c.beta1 * old.m + c.rest1 * g;
  if constexpr (Kind::has_v) old.v = c.beta2 * old.v + c.rest2 * (g * g);
  return old;
}

template <typename T>
struct StepOf {
  template <typename Kind>
  struct Of {
    static void call(const TeacherConstants<T>& constants, const Pointers<T, 3, 3>& pointers,
                     int64_t count) {
      // Copies, as stores might change what references lead to.
      const TeacherConstants<T> c = constants;
      const Pointers<T, 3, 3> p = pointers;
      for_each_vector(p, count, [c](const Vector<T>* from, Vector<T>* to) {
        const Moments<T> now = moments<Kind, T>(c, from[0], {from[1], from[2]});
        to[0] = Kind::template update<T>(c, from[0], now);
        to[1] = now.m;
        to[2] = now.v;
      });
    }
  };
};

template <typename T>
struct GradientsOf {
  template <typename Kind>
  struct Of {
    static void call(const TeacherConstants<T>& constants, const Pointers<T, 6, 3>& pointers,
                     int64_t count) {
      const TeacherConstants<T> c = constants;
      const Pointers<T, 6, 3> p = pointers;
      for_each_vector(p, count, [c](const Vector<T>* from, Vector<T>* to) {
        const Vector<T> g = from[3];
        const Moments<T> now = moments<Kind, T>(c, g, {from[4], from[5]});
        Gradients<T> d = Kind::template gradients<T>(c, from[0], g, now);
        d.m += from[1];
        d.v += from[2];
        if constexpr (Kind::has_m) {
          d.g += c.rest1 * d.m;
          d.m = c.beta1 * d.m;
        }
        if constexpr (Kind::has_v) {
          d.g += T(2) * c.rest2 * g * d.v;
          d.v = c.beta2 * d.v;
        }
        to[0] = d.g;
        to[1] = d.m;
        to[2] = d.v;
      });
    }
  };
};

template <typename T>
void step(const TeacherConstants<T>& c, const T* grad, const T* m, const T* v, T* update, T* new_m,
          T* new_v, int64_t count) {
  const Pointers<T, 3, 3> pointers{{grad, m, v}, {update, new_m, new_v}};
  Kinds::functions<StepOf<T>::template Of>[c.kind](c, pointers, count);
}

template <typename T>
void gradients(const TeacherConstants<T>& c, const T* d_update, const T* d_m, const T* d_v,
               const T* grad, const T* m, const T* v, T* in_grad, T* in_m, T* in_v,
               int64_t count) {
  const Pointers<T, 6, 3> pointers{{d_update, d_m, d_v, grad, m, v}, {in_grad, in_m, in_v}};
  Kinds::functions<GradientsOf<T>::template Of>[c.kind](c, pointers, count);
}

}  // namespace

template <typename T>
TeacherStepKernels<T> teacher_step_kernels() {
  return {Kinds::count, step<T>, gradients<T>};
}

template TeacherStepKernels<float> teacher_step_kernels();
template TeacherStepKernels<double> teacher_step_kernels();

}  // namespace amalgam::cpu::AMALGAM_ISA
