// The instruction sets compiled in: one table of kernels each, chosen at run time.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "cpu/team.h"
#include "recurrence.h"
#include "tangents.h"

namespace fusedrnn {

// Kernels for arithmetic in S; indexed by Cell.
template <class S>
struct KernelTable {
  void (*pack[kCells])(const ForwardArgs<S>&, const Slot&);  // forward's packing alone
  void (*forward[kCells])(const ForwardArgs<S>&, const Slot&);
  void (*backward[kCells])(const BackwardArgs<S>&, const Slot&);
  void (*tangents_forward[kCells])(const TangentStep<S>&);
  void (*tangents_backward[kCells])(const TangentStepBack<S>&);
  void (*tangents_pack)(S* packed, const S* w, int64_t rows, int64_t columns, bool transposed);
  void (*tangents_product)(const TangentProduct<S>&);
  // y = sigmoid(x), y = tanh(x), n values: what the cells apply, for tests.
  void (*sigmoid)(const S* x, S* y, int64_t n);
  void (*tanh)(const S* x, S* y, int64_t n);
};

// The same for products of narrow values, in words; the cells' arithmetic is float.
struct NarrowTable {
  void (*pack[kCells])(const ForwardArgs<float, uint32_t>&, const Slot&);
  void (*forward[kCells])(const ForwardArgs<float, uint32_t>&, const Slot&);
  // bfloat16, but for ReLU; else null
  void (*backward[kCells])(const BackwardArgs<float, uint16_t>&, const Slot&);
  // n values to bfloat16, to the nearest, ties to even; else null
  void (*round)(const float* from, uint16_t* to, int64_t n);
};

struct Isa {
  const char* name;
  int vector_bytes;
  bool (*usable)() noexcept;  // on this machine
  KernelTable<float> f32;
  KernelTable<double> f64;
  NarrowTable bf16, int8;
  // Products of bfloat16 take no longer than those of float32.
  bool quick_bf16 = false;

  // Of arithmetic in S on values kept as E.
  template <class S, class E = S>
  const auto& table() const {
    if constexpr (!std::is_same_v<S, E>) {
      return bf16;
    } else if constexpr (sizeof(S) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

// Each defined in its own kernels_*.cpp; the last two copy another set's table and replace a part.
extern const Isa kBaselineIsa;
#if defined(__x86_64__)
extern const Isa kAvx2Isa;
extern const Isa kAvx512Isa;
const Isa& avx512_bf16_isa() noexcept;
  #if defined(__linux__)
const Isa& avx512_amx_isa() noexcept;
  #endif
#endif

// Those usable here, the plainest first.
std::vector<const Isa*> usable_isas();

// The one in use: the best, unless FUSEDRNN_CPU_ISA or set_isa says otherwise.
const Isa& current_isa();

// Null where it is not usable here.
const Isa* find_isa(const std::string& name);

// Throws std::invalid_argument, which lists the names, where `name` is not usable here.
void set_isa(const std::string& name);

}  // namespace fusedrnn
