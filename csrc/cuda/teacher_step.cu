#include "teacher_step.h"

#include <algorithm>

#include "launch.cuh"
#include "pack.cuh"
#include "teacher_pool.cuh"

namespace amalgam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;  // of a processor

// Teachers of a launch: their settings are its parameters, of which there are 4 KB.
constexpr int kTeachers = 32;

template <typename T>
struct Pool {
  TeacherConstants<T> teachers[kTeachers];
};

template <typename T, int inputs>
struct Rows {
  const T* from[inputs];  // (K, N) each
  T* to[3];               // (K, N) each, out
  int64_t n;
};

// What one wide access moves.
template <typename T>
using Wide = Pack<T, 16 / sizeof(T)>;

// Computes `body` of a row's coordinates, by 16 bytes where the row lies so; all blocks of the grid
// that have this row share it.
template <typename T, int inputs, typename Body>
__device__ void for_each_coordinate(const Rows<T, inputs>& rows, const Body& body) {
  constexpr int size = 16 / sizeof(T);
  const int64_t row = blockIdx.y * rows.n;
  uintptr_t addresses = 0;
  for (const T* from : rows.from) addresses |= reinterpret_cast<uintptr_t>(from + row);
  for (const T* to : rows.to) addresses |= reinterpret_cast<uintptr_t>(to + row);
  const int64_t packs = addresses % sizeof(Wide<T>) == 0 ? rows.n / size : 0;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t at = first; at < packs; at += step) {
    Wide<T> from[inputs], to[3];
#pragma unroll
    for (int i = 0; i < inputs; ++i) {
      from[i] = reinterpret_cast<const Wide<T>*>(rows.from[i] + row)[at];
    }
#pragma unroll
    for (int each = 0; each < size; ++each) {
      T in[inputs], out[3];
#pragma unroll
      for (int i = 0; i < inputs; ++i) in[i] = from[i].values[each];
      body(in, out);
#pragma unroll
      for (int i = 0; i < 3; ++i) to[i].values[each] = out[i];
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) reinterpret_cast<Wide<T>*>(rows.to[i] + row)[at] = to[i];
  }
  for (int64_t at = packs * size + first; at < rows.n; at += step) {
    T in[inputs], out[3];
#pragma unroll
    for (int i = 0; i < inputs; ++i) in[i] = rows.from[i][row + at];
    body(in, out);
#pragma unroll
    for (int i = 0; i < 3; ++i) rows.to[i][row + at] = out[i];
  }
}

// Block (p, k) takes a part of teacher k's coordinates.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    teachers_forward(const Pool<T> pool, const Rows<T, 3> rows) {
  const TeacherConstants<T> c = pool.teachers[blockIdx.y];
  with_kind(c.kind, [&](auto kind) {
    using Kind = decltype(kind);
    for_each_coordinate(rows, [&](const T(&in)[3], T(&out)[3]) {
      const Moments<T> now = moments<Kind, T>(c, in[0], {in[1], in[2]});
      out[0] = Kind::update(c, in[0], now);
      out[1] = now.m;
      out[2] = now.v;
    });
  });
}

// Of float64 two blocks a processor: where ptxas aims at three it spills, for sm_100.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) > sizeof(float) ? 2 : 3)
    teachers_backward(const Pool<T> pool, const Rows<T, 6> rows) {
  const TeacherConstants<T> c = pool.teachers[blockIdx.y];
  with_kind(c.kind, [&](auto kind) {
    using Kind = decltype(kind);
    for_each_coordinate(rows, [&](const T(&in)[6], T(&out)[3]) {
      const T g = in[3];
      const Moments<T> now = moments<Kind, T>(c, g, {in[4], in[5]});
      const Gradients<T> d = step_gradients<Kind, T>(c, in[0], {in[1], in[2]}, g, now);
      out[0] = d.g;
      out[1] = d.m;
      out[2] = d.v;
    });
  });
}

template <typename T, int inputs>
void run(const char* doing, void (*kernel)(Pool<T>, Rows<T, inputs>),
         const TeacherSettings& settings, Rows<T, inputs> rows, int64_t k, int device,
         void* stream) {
  Pool<T> pool;
  for (int64_t row = 0; row < k; ++row) constants_of<T>(settings, row);  // before any is launched
  if (k == 0 || rows.n == 0) return;
  use_device(device);
  const int64_t a_block = kThreads * (16 / sizeof(T));
  const int64_t blocks = (rows.n + a_block - 1) / a_block;
  for (int64_t first = 0; first < k; first += kTeachers) {
    const int count = static_cast<int>(std::min(k - first, int64_t{kTeachers}));
    for (int row = 0; row < count; ++row) {
      pool.teachers[row] = constants_of<T>(settings, first + row);
    }
    const int each = std::max(1, kBlocks / count);
    launch(doing, kernel, dim3(sharing_blocks(blocks, each, device), count), kThreads, stream, pool,
           rows);
    for (const T*& from : rows.from) from += count * rows.n;
    for (T*& to : rows.to) to += count * rows.n;
  }
}

}  // namespace

template <typename T>
void teacher_step(const TeacherSettings& settings, const T* grads, const T* m, const T* v,
                  T* updates, T* new_m, T* new_v, int64_t n, int64_t k, int device, void* stream) {
  const Rows<T, 3> rows{{grads, m, v}, {updates, new_m, new_v}, n};
  run("teacher_step", teachers_forward<T>, settings, rows, k, device, stream);
}

template <typename T>
void teacher_step_backward(const TeacherSettings& settings, const T* d_updates, const T* d_m,
                           const T* d_v, const T* grads, const T* m, const T* v, T* in_grads,
                           T* in_m, T* in_v, int64_t n, int64_t k, int device, void* stream) {
  const Rows<T, 6> rows{{d_updates, d_m, d_v, grads, m, v}, {in_grads, in_m, in_v}, n};
  run("teacher_step_backward", teachers_backward<T>, settings, rows, k, device, stream);
}

#define AMALGAM_INSTANTIATE(T)                                                                   \
  template void teacher_step(const TeacherSettings&, const T*, const T*, const T*, T*, T*, T*,   \
                             int64_t, int64_t, int, void*);                                      \
  template void teacher_step_backward(const TeacherSettings&, const T*, const T*, const T*,      \
                                      const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t, \
                                      int, void*);
AMALGAM_INSTANTIATE(float)
AMALGAM_INSTANTIATE(double)
#undef AMALGAM_INSTANTIATE

}  // namespace amalgam::cuda
