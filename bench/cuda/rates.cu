// Arithmetic: mma.sync of bfloat16, half and TF32, and FFMA, by 8 warps on every SM.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "asm.cuh"
#include "probe.cuh"

namespace fusedrnn::probe {
namespace {

constexpr int kChains = 8;  // products that do not wait for each other
constexpr int kFmaChains = 16;
constexpr int kRounds = 16384;  // sums of small whole numbers stay exact: 16384 * 16 * 9 < 2^24

// -3 ... 3 in the operand's format: whole numbers, so that sums are exact in any order. Two of a
// register's halves where the format has 16 bits.
__device__ uint32_t operand(Product kind, uint32_t seed) {
  const auto bits = [&](uint32_t n) -> uint32_t {
    const float value = static_cast<float>(static_cast<int>(n % 7) - 3);
    const uint32_t as_float = __float_as_uint(value);
    if (kind == Product::kTf32) return as_float;
    if (kind == Product::kBf16) return as_float >> 16;
    constexpr uint32_t halves[] = {0xC200, 0xC000, 0xBC00, 0, 0x3C00, 0x4000, 0x4200};
    return halves[n % 7];
  };
  const uint32_t mixed = (seed + 1) * 2654435761u >> 8;
  return kind == Product::kTf32 ? bits(mixed) : bits(mixed) | bits(mixed >> 8) << 16;
}

// sums: (CTAs, kThreads, kChains, 4)
template <Product kind>
__global__ __launch_bounds__(kThreads, 1) void products(int rounds, float* sums, Ticks* ticks) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  uint32_t a[4], b[kChains][2];
  for (uint32_t i = 0; i < 4; ++i) a[i] = operand(kind, thread * 32 + i);
  for (uint32_t i = 0; i < kChains; ++i) {
    for (uint32_t j = 0; j < 2; ++j) b[i][j] = operand(kind, thread * 32 + 8 + 2 * i + j);
  }
  float d[kChains][4] = {};
  const Stopwatch watch;
#pragma unroll 2
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) mma<kind>(d[i], a, b[i]);
  }
  watch.stop(ticks);
  for (int i = 0; i < kChains; ++i) {
    for (int j = 0; j < 4; ++j) sums[(thread * kChains + i) * 4 + j] = d[i][j];
  }
}

// sums: (CTAs, kThreads, kFmaChains)
__global__ __launch_bounds__(kThreads, 1) void multiply_adds(int rounds, float one, float* sums,
                                                             Ticks* ticks) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  float d[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) d[i] = static_cast<float>(i);
  const float more = static_cast<float>(thread % 7 + 1);
  const Stopwatch watch;
#pragma unroll 2
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kFmaChains; ++i) multiply_add(d[i], one, more);
  }
  watch.stop(ticks);
  for (int i = 0; i < kFmaChains; ++i) {
    sums[thread * kFmaChains + i] = d[i] - static_cast<float>(i);
  }
}

// Times `run(rounds, sums, ticks)`. What it sums up must be `rounds` times what one round does, and
// not zero throughout: then every round has been computed.
template <class Run>
void rate(Figure& figure, const Run& run, int chains, int numbers, double flops, const char* how) {
  const int sms = properties().multiProcessorCount;
  const size_t count = static_cast<size_t>(sms) * kThreads * numbers;
  const Memory memory(count * sizeof(float)), ticks(sizeof(Ticks));
  const auto launch = [&](int rounds) {
    run(rounds, memory.as<float>(), ticks.as<Ticks>());
    check(cudaGetLastError(), "a product's launch");
  };
  const auto sums_of = [&](int rounds) {
    launch(rounds);
    std::vector<float> sums(count);
    check(cudaMemcpy(sums.data(), memory.as<void>(), count * sizeof(float), cudaMemcpyDeviceToHost),
          "a product");
    return sums;
  };
  const std::vector<float> one = sums_of(1), all = sums_of(kRounds);
  bool wrong = false, any = false;
  for (size_t i = 0; i < count; ++i) {
    wrong |= !(all[i] == one[i] * static_cast<float>(kRounds));
    any |= one[i] != 0.0f;
  }
  if (wrong || !any) throw std::runtime_error("the sums are not rounds times those of one round");
  const double quarter = microseconds([&] { launch(kRounds / 4); });
  const double per_round = (microseconds([&] { launch(kRounds); }) - quarter) / (kRounds * 0.75);
  Ticks last;  // of the last launch, of all the rounds
  check(cudaMemcpy(&last, ticks.as<void>(), sizeof last, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const double warps = kThreads / 32.0, quarter_warps = warps / 4;
  figure.number("sm_clock_mhz", last.mhz())
      .number("clocks_per_instruction_and_sm_quarter",
              static_cast<double>(last.clocks) / kRounds / (chains * quarter_warps))
      .value(flops * chains * warps * sms / per_round / 1e6, "TFLOP/s", how);
}

template <Product kind>
void product_rate(const char* name, double k) {
  guarded(Figure(name), [&](Figure& figure) {
    const auto run = [](int rounds, float* sums, Ticks* ticks) {
      products<kind><<<properties().multiProcessorCount, kThreads>>>(rounds, sums, ticks);
    };
    rate(figure, run, kChains, kChains * 4, 2 * 16 * 8 * k,
         "8 warps an SM, 8 sums a warp, whole numbers of -3 to 3, slope over the rounds");
  });
}

}  // namespace

void rates() {
  warm_up();
  product_rate<Product::kBf16>("mma_m16n8k16_bfloat16", 16);
  product_rate<Product::kHalf>("mma_m16n8k16_float16", 16);
  product_rate<Product::kTf32>("mma_m16n8k8_tf32", 8);
  guarded(Figure("ffma"), [&](Figure& figure) {
    const auto run = [](int rounds, float* sums, Ticks* ticks) {
      multiply_adds<<<properties().multiProcessorCount, kThreads>>>(rounds, 1.0f, sums, ticks);
    };
    rate(figure, run, kFmaChains, kFmaChains, 2 * 32,
         "8 warps an SM, 16 sums a thread, slope over the rounds");
  });
}

}  // namespace fusedrnn::probe
