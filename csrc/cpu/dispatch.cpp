#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace amalgam::cpu {
namespace {

bool runs(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#ifdef AMALGAM_X86
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return runs(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& each : names) text += (text.empty() ? "" : ", ") + each;
  return text;
}

Isa decide() {
  const char* variable = std::getenv("AMALGAM_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (wanted.empty() ? runs(isa) : wanted == name(isa)) {
      if (runs(isa)) return isa;
      throw std::invalid_argument("AMALGAM_CPU_ISA=" + wanted +
                                  " is not available here: this machine and this build have " +
                                  joined(available_isas()));
    }
  }
  throw std::invalid_argument("AMALGAM_CPU_ISA must be avx512, avx2 or portable (or unset), not '" +
                              wanted + "'");
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (runs(isa)) names.emplace_back(name(isa));
  }
  return names;
}

Isa isa() {
  // A throwing initialiser leaves the static unset, so every call reports the bad variable.
  static const Isa chosen = decide();
  return chosen;
}

bool multiplies_bfloat16() {
#ifdef AMALGAM_BF16
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace amalgam::cpu
