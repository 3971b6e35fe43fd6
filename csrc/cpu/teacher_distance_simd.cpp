#include "teacher_distance.h"

#include "simd.h"

namespace amalgam::cpu::AMALGAM_ISA {
namespace {

// Lanes sum this many elements in T before they are added up in double: at most 32 terms a lane.
constexpr int kShortBlock = 512;

template <typename T>
inline Vector<T> absolute(const Vector<T>& x) {
  return x < T(0) ? -x : x;
}

// Twice the penalty without Huber, so that it is one fused multiply-add.
template <bool huber, typename T>
inline Vector<T> penalty(const Vector<T>& difference, T delta) {
  if constexpr (!huber) {
    return difference * difference;
  } else {
    const Vector<T> size = absolute<T>(difference);
    return size < delta ? T(0.5) * difference * difference : delta * (size - T(0.5) * delta);
  }
}

// Comparisons with NaN are false, so NaN passes through as in torch.clamp.
template <bool huber, typename T>
inline Vector<T> slope(Vector<T> difference, T delta) {
  if constexpr (huber) {
    difference = difference > delta ? splat<T>(delta) : difference;
    difference = difference < -delta ? splat<T>(-delta) : difference;
  }
  return difference;
}

template <bool huber, typename T>
inline void add_chunk(Vector<T>* sums, const T* student, const T* teacher, T delta) {
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes<T>;
    sums[v] += penalty<huber, T>(load(student + at) - load(teacher + at), delta);
  }
}

template <typename T>
inline void copy_part(T* to, const T* from, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(T));
}

template <bool huber, typename T>
double sum(const T* student, const T* teacher, int64_t count, T delta) {
  double lanes[kChunk<T>] = {};
  for (int64_t start = 0; start < count; start += kShortBlock) {
    const int64_t stop = count - start < kShortBlock ? count : start + kShortBlock;
    Vector<T> sums[kVectors] = {};
    int64_t at = start;
    for (; at + kChunk<T> <= stop; at += kChunk<T>) {
      add_chunk<huber>(sums, student + at, teacher + at, delta);
    }
    if (at < stop) {
      T rest_of_student[kChunk<T>] = {};
      T rest_of_teacher[kChunk<T>] = {};
      copy_part(rest_of_student, student + at, stop - at);
      copy_part(rest_of_teacher, teacher + at, stop - at);
      add_chunk<huber>(sums, rest_of_student, rest_of_teacher, delta);
    }
    T short_sums[kChunk<T>];
    for (int v = 0; v < kVectors; ++v) store(short_sums + v * kLanes<T>, sums[v]);
    for (int lane = 0; lane < kChunk<T>; ++lane) lanes[lane] += short_sums[lane];
  }
  for (int half = kChunk<T> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return huber ? lanes[0] : 0.5 * lanes[0];
}

// The gradients of one chunk of coordinates.
template <bool huber, bool with_teachers, typename T>
inline void chunk_gradients(const T* weights, const T* student, const T* teachers, T* in_student,
                            T* in_teachers, int64_t stride, int64_t k, T delta) {
  Vector<T> at_student[kVectors];
  Vector<T> sums[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) at_student[v] = load(student + v * kLanes<T>);
  for (int64_t row = 0; row < k; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = row * stride + v * kLanes<T>;
      const Vector<T> weighted =
          weights[row] * slope<huber, T>(at_student[v] - load(teachers + at), delta);
      sums[v] += weighted;
      if constexpr (with_teachers) store<T>(in_teachers + at, -weighted);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(in_student + v * kLanes<T>, sums[v]);
}

template <bool huber, typename T>
inline void scalar_gradients(const T* weights, T student, const T* teachers, T* in_student,
                             T* in_teachers, int64_t stride, int64_t k, T delta) {
  T sum = 0;
  for (int64_t row = 0; row < k; ++row) {
    T difference = student - teachers[row * stride];
    if constexpr (huber) {
      difference = difference > delta ? delta : difference;
      difference = difference < -delta ? -delta : difference;
    }
    const T weighted = weights[row] * difference;
    sum += weighted;
    if (in_teachers) in_teachers[row * stride] = -weighted;
  }
  *in_student = sum;
}

template <bool huber, bool with_teachers, typename T>
void gradients(const T* weights, const T* student, const T* teachers, T* in_student,
               T* in_teachers, int64_t count, int64_t stride, int64_t k, T delta) {
  int64_t at = 0;
  for (; at + kChunk<T> <= count; at += kChunk<T>) {
    chunk_gradients<huber, with_teachers>(weights, student + at, teachers + at, in_student + at,
                                          with_teachers ? in_teachers + at : nullptr, stride, k,
                                          delta);
  }
  for (; at < count; ++at) {
    scalar_gradients<huber>(weights, student[at], teachers + at, in_student + at,
                            with_teachers ? in_teachers + at : nullptr, stride, k, delta);
  }
}

template <typename T>
double any_sum(const T* student, const T* teacher, int64_t count, T delta) {
  return delta >= 0 ? sum<true>(student, teacher, count, delta)
                   : sum<false>(student, teacher, count, delta);
}

template <typename T>
void any_gradients(const T* weights, const T* student, const T* teachers, T* in_student,
                   T* in_teachers, int64_t count, int64_t stride, int64_t k, T delta) {
  const auto chosen = delta >= 0
                          ? (in_teachers ? gradients<true, true, T> : gradients<true, false, T>)
                          : (in_teachers ? gradients<false, true, T> : gradients<false, false, T>);
  chosen(weights, student, teachers, in_student, in_teachers, count, stride, k, delta);
}

}  // namespace

template <typename T>
TeacherDistanceKernels<T> teacher_distance_kernels() {
  return {any_sum<T>, any_gradients<T>};
}

template TeacherDistanceKernels<float> teacher_distance_kernels();
template TeacherDistanceKernels<double> teacher_distance_kernels();

}  // namespace amalgam::cpu::AMALGAM_ISA
