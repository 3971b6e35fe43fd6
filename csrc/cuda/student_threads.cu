#include "student_threads.h"

#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "student_frame.cuh"

namespace amalgam::cuda {
namespace {

const std::vector<ThreadsLaunch>& launches(bool nominal, Stored cells) {
  static const std::vector<ThreadsLaunch> all[2][2] = {
      {rnnprop_launches<float>(), rnnprop_launches<Bfloat16>()},
      {nominal_launches<float>(), nominal_launches<Bfloat16>()},
  };
  return all[nominal][cells == Stored::bfloat16];
}

}  // namespace

std::vector<StudentSize> sizes_by_threads(bool nominal) {
  std::vector<StudentSize> sizes;
  for (const ThreadsLaunch& each : launches(nominal, Stored::float32)) sizes.push_back(each.size);
  return sizes;
}

void step_by_threads(const StudentCall& call, const StudentKind& kind, void* stream) {
  if (kind.moments != (kind.nominal ? kind.cells : Stored::float32)) {
    throw std::invalid_argument(kind.nominal ? "moments must be stored as the cells"
                                             : "moments must be float32");
  }
  for (const ThreadsLaunch& by : launches(kind.nominal, kind.cells)) {
    if (by.size.layers != kind.layers || by.size.hidden != kind.hidden) continue;
    if (call.blocks == 0) return;
    launch("student_step_", by.kernel(call.stochastic, kind.approximate),
           static_cast<unsigned>(call.blocks), by.threads, stream, call);
    return;
  }
  throw std::invalid_argument("no step of " + std::to_string(kind.layers) + " layers of " +
                              std::to_string(kind.hidden) + " units is compiled in");
}

}  // namespace amalgam::cuda
