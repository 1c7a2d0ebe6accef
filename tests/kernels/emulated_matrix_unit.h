// Intel's matrix unit (AMX) in plain loops, in place of cpu/amx_inl.h: what cpu/matrix_inl.h makes
// of it can then be tested where there is none. What the unit would refuse, or be slow at, ends the
// program. Source: the operation sections of LDTILECFG, TILELOADD and TDPBF16PS in Intel's Software
// Developer's Manual.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isa_namespace.h"

FUSEDRNN_ISA_BEGIN

namespace matrix {

struct Register {
  int rows, bytes;  // of a row; 0: not configured
  uint32_t words[16][16];
};
inline thread_local Register t_registers[8];

inline void require(bool met, const char* what) {
  if (met) return;
  std::fprintf(stderr, "matrix unit: %s\n", what);
  std::abort();
}

inline Register& configured(int index) {
  Register& r = t_registers[index];
  require(r.rows > 0 && r.bytes > 0, "a register is used that has not been configured");
  return r;
}

inline void configure(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  require(reinterpret_cast<uintptr_t>(config) % 64 == 0, "a configuration crosses a cache line");
  require(bytes[0] == 1 && bytes[1] == 0, "palette or first row");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are not zero");
  for (int i = 0; i < 8; ++i) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, sizeof(width));
    const int rows = bytes[48 + i];
    require(rows <= 16 && width <= 64 && width % 4 == 0 && (rows == 0) == (width == 0), "size");
    t_registers[i] = {rows, width, {}};
  }
}

inline void release() {
  for (Register& r : t_registers) r = {};
}

template <int Index>
void zero() {
  std::memset(configured(Index).words, 0, sizeof(Register::words));
}

template <int Index>
void load(const void* from, int64_t apart) {
  Register& r = configured(Index);
  std::memset(r.words, 0, sizeof(r.words));
  for (int i = 0; i < r.rows; ++i) {
    std::memcpy(r.words[i], static_cast<const char*>(from) + i * apart, r.bytes);
  }
}

template <int Index>
void store(void* to, int64_t apart) {
  const Register& r = configured(Index);
  for (int i = 0; i < r.rows; ++i) {
    std::memcpy(static_cast<char*>(to) + i * apart, r.words[i], r.bytes);
  }
}

template <int Sum, int Left, int Right>
void multiply() {
  Register& sum = configured(Sum);
  const Register &left = configured(Left), &right = configured(Right);
  require(left.rows == sum.rows && right.bytes == sum.bytes && left.bytes == 4 * right.rows,
          "sizes of a product's registers do not match");
  const auto value = [](uint32_t word, int half) {
    return __builtin_bit_cast(float, half == 0 ? word << 16 : word & 0xffff0000u);
  };
  for (int m = 0; m < sum.rows; ++m) {
    for (int n = 0; n < sum.bytes / 4; ++n) {
      float total = __builtin_bit_cast(float, sum.words[m][n]);
      for (int k = 0; k < right.rows; ++k) {
        for (int half = 0; half < 2; ++half) {
          total += value(left.words[m][k], half) * value(right.words[k][n], half);
        }
      }
      sum.words[m][n] = __builtin_bit_cast(uint32_t, total);
    }
  }
}

}  // namespace matrix

FUSEDRNN_ISA_END
