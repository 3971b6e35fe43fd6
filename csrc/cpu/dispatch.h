// Which instruction set the CPU kernels run with, decided once per process.
#pragma once

#include <string>
#include <vector>

#include "isa.h"

namespace amalgam::cpu {

enum class Isa { portable, avx2, avx512 };

const char* name(Isa isa);

// Instruction sets that this build holds and this machine runs, slowest first.
std::vector<std::string> available_isas();

// The best available one, or the one that AMALGAM_CPU_ISA names; read at the first call.
// Throws std::invalid_argument where that variable names no instruction set or an unavailable one.
Isa isa();

// Whether lstm_bf16.cpp runs here: it is in this build, and goes with avx512 where the CPU has it.
bool multiplies_bfloat16();

}  // namespace amalgam::cpu

// Calls `function` of the namespace of the instruction set in use.
#ifdef AMALGAM_X86
#define AMALGAM_DISPATCH(function)                                           \
  (::amalgam::cpu::isa() == ::amalgam::cpu::Isa::avx512 ? avx512::function() \
   : ::amalgam::cpu::isa() == ::amalgam::cpu::Isa::avx2 ? avx2::function()   \
                                                        : portable::function())
#else
#define AMALGAM_DISPATCH(function) (::amalgam::cpu::isa(), portable::function())
#endif
