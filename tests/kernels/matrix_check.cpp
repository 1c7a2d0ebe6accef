// Products by a matrix unit (cpu/matrix_inl.h, and what cpu/gemm_inl.h makes of them) with an
// emulated one: tiles of many heights, all numbers of vectors, k with and without a tail, rows that
// lie evenly or not, all in memory of exactly their size. Values are small whole numbers, so that
// all sums are exact. Built by tests/test_kernels.py, with sanitizers by `make sanitize`.
//
// Exit status 0: all agree; 77: this machine has no AVX-512.
#define FUSEDRNN_ISA avx512_emulated
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_ACCUMULATORS 24
#define FUSEDRNN_MATRIX_UNIT "tests/kernels/emulated_matrix_unit.h"

#include <cstdio>
#include <random>
#include <vector>

#include "cpu/kernels_prelude.h"
#include FUSEDRNN_MATRIX_UNIT

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "cpu/gemm_inl.h"

namespace fusedrnn {
namespace avx512_emulated {

int cases = 0, failures = 0;

// Two whole numbers from -4 to 4 as bfloat16, which are a float's upper bits.
uint32_t random_word() {
  static std::mt19937 generator(1);
  const auto half = [] {
    const float value = static_cast<float>(generator() % 9) - 4.0f;
    return __builtin_bit_cast(uint32_t, value) >> 16;
  };
  const uint32_t first = half();
  return half() << 16 | first;
}

std::vector<uint32_t> random_words(int64_t n) {
  std::vector<uint32_t> words(n);
  for (uint32_t& word : words) word = random_word();
  return words;
}

float dot(uint32_t a, uint32_t b) {
  const auto value = [](uint32_t word) { return __builtin_bit_cast(float, word & 0xffff0000u); };
  return value(a) * value(b) + value(a << 16) * value(b << 16);
}

// Rows of k words: behind each other with a gap, or each somewhere else.
struct Rows {
  std::vector<std::vector<uint32_t>> storage;
  std::vector<const uint32_t*> at;

  Rows(int64_t rows, int64_t k, bool even) {
    const int64_t apart = k + 3;
    if (even) storage.push_back(random_words((rows - 1) * apart + k));
    for (int64_t r = 0; r < rows; ++r) {
      if (!even) storage.push_back(random_words(k));
      at.push_back(even ? storage[0].data() + r * apart : storage[r].data());
    }
  }
};

template <int NV>
void check(int64_t rows, int64_t k, int64_t panels, bool even, bool from_end) {
  constexpr int lanes = kLanes<float>;
  const Rows left(rows, k, even);
  const int64_t panel_size = k * NV * lanes;
  const std::vector<uint32_t> packed = random_words(panels * panel_size);
  std::vector<float> found(rows * panels * NV * lanes);
  std::vector<int> visits(rows * panels);
  const auto epilogue = [&]<int R, int Vectors>(const Tile<float, R, Vectors>& tile, int64_t row,
                                                int64_t panel) {
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * panels + panel;
      for (int i = 0; i < Vectors / NV; ++i) ++visits[at + i];
      std::memcpy(&found[at * NV * lanes], tile.sum[r], sizeof(tile.sum[r]));
    }
  };
  const auto row_at = [&](int64_t row) { return left.at[row]; };
  const int64_t count = tile_count<Bf16, NV>(rows);
  for (const Range mine : {Range{0, count / 2}, Range{count / 2, count}}) {
    product_of_tiles<Bf16, NV>({{0, rows}, count, mine}, Range{0, panels}, row_at, packed.data(),
                               panel_size, k, epilogue, from_end);
  }
  release_matrix_unit();

  int64_t wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t at = row * panels + panel;
      wrong += visits[at] != 1;
      for (int64_t column = 0; column < NV * lanes; ++column) {
        float sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          sum += dot(left.at[row][i], packed[panel * panel_size + i * NV * lanes + column]);
        }
        wrong += found[at * NV * lanes + column] != sum;
      }
    }
  }
  ++cases;
  if (wrong == 0) return;
  ++failures;
  std::printf("NV %d rows %ld k %ld panels %ld even %d from_end %d: %ld wrong\n", NV, long(rows),
              long(k), long(panels), even, from_end, long(wrong));
}

template <int NV>
void check_all() {
  // The last leaves the first cache, where two tiles are taken at once.
  for (int64_t k : {1, 15, 16, 17, 48, 52, 656 / NV / 16 * 16}) {
    for (int64_t rows : {1, 2, 3, 5, 15, 16, 17, 18, 31, 33, 47, 49}) {
      for (bool even : {true, false}) check<NV>(rows, k, 1 + rows % 2, even, rows % 3 == 0);
    }
  }
}

}  // namespace avx512_emulated
}  // namespace fusedrnn
#pragma GCC pop_options

int main() {
  using namespace fusedrnn::avx512_emulated;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    std::puts("needs AVX-512");
    return 77;
  }
  check_all<1>();
  check_all<2>();
  check_all<3>();
  check_all<4>();
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
