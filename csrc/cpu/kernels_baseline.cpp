// Kernels for what every machine of the architecture has (SSE2 on x86-64).
#define FUSEDRNN_ISA baseline
#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_ACCUMULATORS 12

#include "cpu/kernels_prelude.h"

#include "cpu/kernels_inl.h"

namespace fusedrnn {

static bool usable() noexcept { return true; }

constinit const Isa kBaselineIsa = {"baseline",
                                    FUSEDRNN_VECTOR_BYTES,
                                    usable,
                                    baseline::kernel_table<float>(),
                                    baseline::kernel_table<double>(),
                                    baseline::narrow_table<baseline::Bf16>(),
                                    baseline::narrow_table<baseline::Int8>()};

}  // namespace fusedrnn
