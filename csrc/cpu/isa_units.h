// All that the translation unit of an instruction set provides.
#pragma once
#include "butterfly_unit.h"
#include "exact_unit.h"
#include "fftconv_unit.h"
#include "glu_unit.h"
#include "isa.h"
#include "modes_unit.h"
#include "real_part_unit.h"
#include "ssm_step_unit.h"
#include "ssm_unit.h"
#include "stream_unit.h"

namespace seqconv::SEQCONV_ISA {

constexpr IsaKernels all_kernels(const char* name, bool (*runnable)(),
                                 const IsaKernels* shorter = nullptr) {
  return {name,
          runnable,
          kConvKernel<float>,
          kConvKernel<double>,
          kSsmKernel<float>,
          kSsmKernel<double>,
          kButterflyKernel<float>,
          kButterflyKernel<double>,
          kRealPartKernel<float>,
          kRealPartKernel<double>,
          kStreamKernel<float>,
          kStreamKernel<double>,
          ssm_step_unit<float>,
          ssm_step_unit<double>,
          kExactKernel<float>,
          kExactKernel<double>,
          modes_forward_unit,
          modes_backward_unit,
          glu_forward_unit,
          glu_backward_unit,
          shorter};
}

}  // namespace seqconv::SEQCONV_ISA
