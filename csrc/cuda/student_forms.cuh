// The two forms of a student's step, of a thread's coordinates; amalgam/operations/student_forms.py has
// the formulas. A form has
//   kFeatures, kOutputs  how many inputs the LSTM has, and how many outputs its head;
//   kOwnBias             whether the first layer's bias is the tensor's own;
//   see                  the features of a coordinate, from its gradient and moments that have seen it;
//   update               its update, from the head's outputs.
#pragma once

#include "activations.cuh"
#include "student_frame.cuh"

namespace amalgam::cuda {

template <bool approximate, int count>
struct RnnProp {
  static constexpr int kFeatures = 2, kOutputs = 1;
  static constexpr bool kOwnBias = false;

  uint32_t still = 0;  // a bit for each whose gradients were all zero

  __device__ void see(const StudentCall& call, const Corrections&, int k, float g, float m, float v,
                      float (&x)[kFeatures][count]) {
    features(call, g, m, v, x[0][k], x[1][k]);
    still |= uint32_t{v == 0.0f} << k;
  }

  __device__ float update(const StudentCall& call, const Corrections&, int k,
                          const float (&o)[kOutputs][count]) const {
    return still >> k & 1 ? 0.0f : __fmul_rn(call.alpha, tanh<approximate>(o[0][k]));
  }
};

constexpr float kLeastLog = -7.0f, kMostLog = 4.0f;  // of the factor on the nominal form's step
constexpr float kSoft = 3.0f;                        // where its b is clipped to

// alpha exp(log), within bounds; NaN stays.
__device__ inline float factor_of(float alpha, float log) {
  log = log < kLeastLog ? kLeastLog : log > kMostLog ? kMostLog : log;
  const float power = __fmul_rn(log, float(kLog2E));
  // What that product has lost, for exp2 errs by as much of its result.
  const float lost = __fmaf_rn(log, float(kLog2E), -power);
  const float factor = exp2_approx(power);
  return __fmul_rn(alpha, __fmaf_rn(factor, __fmul_rn(lost, float(1 / kLog2E)), factor));
}

template <bool approximate, int count>
struct Nominal {
  static constexpr int kFeatures = 3, kOutputs = 2;
  static constexpr bool kOwnBias = true;

  float a[count], b[count];  // the corrected moment and the gradient, over the root

  __device__ void see(const StudentCall& call, const Corrections& by, int k, float g, float m,
                      float v, float (&x)[kFeatures][count]) {
    const float below = __fadd_rn(root_approx(__fmul_rn(v, by.of_v)), call.eps);
    const float r = v > 0.0f ? reciprocal(below) : 0.0f;
    a[k] = __fmul_rn(__fmul_rn(m, by.of_m), r);
    b[k] = __fmul_rn(g, r);
    x[0][k] = fabsf(a[k]);
    x[1][k] = tanh<approximate>(__fmul_rn(a[k], b[k]));
    x[2][k] = tanh<approximate>(fabsf(b[k]));
  }

  __device__ float update(const StudentCall&, const Corrections& by, int k,
                          const float (&o)[kOutputs][count]) const {
    const float soft =
        __fmul_rn(b[k], reciprocal(__fmaf_rn(fabsf(b[k]), float(1 / kSoft), 1.0f)));
    return __fmul_rn(factor_of(by.alpha, o[0][k]), __fmaf_rn(o[1][k], soft, a[k]));
  }
};

}  // namespace amalgam::cuda
