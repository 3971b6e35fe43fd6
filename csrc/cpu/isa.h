// The instruction sets of the CPU kernels.
//
// The pattern of every CPU operation `x`:
//   x_simd.cpp  the inner loops, compiled once per instruction set into a namespace of its name;
//   x.cpp       threads, partition and all that is not hot, compiled once;
//   x.h         declares both.
// Beside them x_bf16.cpp is compiled once, into the namespace avx512_bf16: what takes AVX-512's
// bfloat16 instructions, which not all machines with AVX-512 have.
#pragma once

// setup.py defines AMALGAM_X86 exactly where it also compiles the avx2 and avx512 objects.
#ifdef AMALGAM_X86
#define AMALGAM_FOR_EACH_ISA(declare) declare(portable) declare(avx2) declare(avx512)
#else
#define AMALGAM_FOR_EACH_ISA(declare) declare(portable)
#endif
