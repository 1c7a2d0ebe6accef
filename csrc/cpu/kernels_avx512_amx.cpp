// AVX-512 with a matrix unit (AMX) for bfloat16: those kernels; the others are those of AVX-512
// with dot products.
#if defined(__x86_64__) && defined(__linux__)
  #define FUSEDRNN_ISA avx512_amx
  #define FUSEDRNN_VECTOR_BYTES 64
  #define FUSEDRNN_ACCUMULATORS 24
  #define FUSEDRNN_DOT_PRODUCTS
  #define FUSEDRNN_MATRIX_UNIT "cpu/amx_inl.h"

  #include <cpuid.h>
  #include <sys/syscall.h>
  #include <unistd.h>

  #include "cpu/kernels_prelude.h"
  // After everything from outside the region.
  #include "cpu/kernels_dot_products_inl.h"

namespace fusedrnn {

// Linux gives a process the unit's registers when it asks for them.
static bool asked_for_tiles() noexcept {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

static bool usable() noexcept {
  static const bool is = []() noexcept {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    return avx512_bf16_isa().usable() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
           (edx & amx_bf16) != 0 && (edx & amx_tile) != 0 && asked_for_tiles();
  }();
  return is;
}

static Isa with_matrix_unit(Isa isa) noexcept {
  isa.name = "avx512_amx";
  isa.usable = usable;
  isa.bf16 = avx512_amx::narrow_table<avx512_amx::Bf16>();
  isa.quick_bf16 = true;
  return isa;
}

const Isa& avx512_amx_isa() noexcept {
  static const Isa isa = with_matrix_unit(avx512_bf16_isa());
  return isa;
}

}  // namespace fusedrnn
#endif
