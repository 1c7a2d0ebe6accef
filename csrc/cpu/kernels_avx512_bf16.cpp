// AVX-512 with dot products of 16- and 8-bit values (BF16 and VNNI): the narrow kernels; the others
// are those of AVX-512.
#if defined(__x86_64__)
  #define FUSEDRNN_ISA avx512_bf16
  #define FUSEDRNN_VECTOR_BYTES 64
  #define FUSEDRNN_ACCUMULATORS 24
  #define FUSEDRNN_DOT_PRODUCTS

  #include "cpu/kernels_prelude.h"
  // After everything from outside the region.
  #include "cpu/kernels_dot_products_inl.h"

namespace fusedrnn {

static bool usable() noexcept {
  return kAvx512Isa.usable() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

static Isa with_dot_products(Isa isa) noexcept {
  isa.name = "avx512_bf16";
  isa.usable = usable;
  isa.bf16 = avx512_bf16::narrow_table<avx512_bf16::Bf16>();
  isa.int8 = avx512_bf16::narrow_table<avx512_bf16::Int8>();
  // Intel's cores take two cycles for a vdpbf16ps where they finish four vfmadd: half the rate.
  isa.quick_bf16 = !__builtin_cpu_is("intel");
  return isa;
}

const Isa& avx512_bf16_isa() noexcept {
  static const Isa isa = with_dot_products(kAvx512Isa);
  return isa;
}

}  // namespace fusedrnn
#endif
