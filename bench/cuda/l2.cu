// Reading L2: bytes a clock for one SM and for all, everybody the same words and each its own.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "asm.cuh"
#include "probe.cuh"

namespace fusedrnn::probe {
namespace {

constexpr int kLoads = 8;  // of 16 bytes, on their way at once in each thread
constexpr size_t kTile = kThreads * sizeof(Piece) * kLoads;  // 32 KB: what a CTA reads a round

// Each CTA reads `tiles` tiles, from its own first one on, again and again. sums: (CTAs, kThreads)
__global__ __launch_bounds__(kThreads, 1) void read_tiles(const uint32_t* words, uint32_t tiles,
                                                          uint32_t own_tiles, uint32_t rounds,
                                                          uint32_t* sums, Ticks* ticks) {
  const uint32_t* mine =
      words + static_cast<size_t>(blockIdx.x) * own_tiles * (kTile / 4) + threadIdx.x * 4;
  uint32_t sum = 0, tile = 0;
  const Stopwatch watch;
  for (uint32_t round = 0; round < rounds; ++round) {
    Piece pieces[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      pieces[k] = load_relaxed(mine + tile * (kTile / 4) + k * kThreads * 4);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      for (uint32_t word : pieces[k].word) sum += word;
    }
    if (++tile == tiles) tile = 0;
  }
  watch.stop(ticks);
  sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

void read(uint32_t ctas, uint32_t tiles, bool own, const char* how) {
  guarded(Figure("l2_read"), [&](Figure& figure) {
    constexpr uint32_t kRounds = 4096;
    const size_t bytes = kTile * tiles * (own ? ctas : 1);
    const Memory words(bytes), sums(static_cast<size_t>(ctas) * kThreads * 4), ticks(sizeof(Ticks));
    check(cudaMemset(words.as<void>(), 1, bytes), "cudaMemset");
    const auto run = [&](uint32_t rounds) {
      read_tiles<<<ctas, kThreads, one_cta_bytes()>>>(words.as<uint32_t>(), tiles, own ? tiles : 0,
                                                      rounds, sums.as<uint32_t>(),
                                                      ticks.as<Ticks>());
      check(cudaGetLastError(), "a reading kernel's launch");
    };
    check(cudaFuncSetAttribute(read_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               one_cta_bytes()),
          "cudaFuncSetAttribute");
    const double quarter = microseconds([&] { run(kRounds / 4); });
    const double per_round = (microseconds([&] { run(kRounds); }) - quarter) / (kRounds * 0.75);
    std::vector<uint32_t> got(static_cast<size_t>(ctas) * kThreads);
    check(cudaMemcpy(got.data(), sums.as<void>(), got.size() * 4, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const uint32_t right = kRounds * kLoads * 4 * 0x01010101u;
    if (std::count(got.begin(), got.end(), right) != static_cast<int64_t>(got.size())) {
      throw std::runtime_error("wrong sums of what was read");
    }
    Ticks last;
    check(cudaMemcpy(&last, ticks.as<void>(), sizeof last, cudaMemcpyDeviceToHost), "cudaMemcpy");
    const double rate = kTile * ctas / per_round, mhz = last.mhz();  // bytes a microsecond
    figure.number("ctas", ctas)
        .number("buffer_bytes", static_cast<double>(bytes))
        .number("sm_clock_mhz", mhz)
        .number("bytes_per_clock_and_sm", rate / ctas / mhz)
        .number("bytes_per_clock", rate / mhz)
        .value(rate / 1e6, "TB/s", how);
  });
}

}  // namespace

void l2_reads() {
  warm_up();
  const uint32_t sms = static_cast<uint32_t>(properties().multiProcessorCount);
  const char* same = "16-byte ld.relaxed.gpu, 8 on their way a thread, all CTAs the same words";
  const char* own = "16-byte ld.relaxed.gpu, 8 on their way a thread, each CTA its own words";
  read(1, 2, false, same);
  for (uint32_t ctas : {8u, 32u, sms}) read(ctas, 2, false, same);  // 64 KB
  read(sms, 1, false, same);                                        // 32 KB
  for (uint32_t ctas : {8u, 32u, sms}) read(ctas, 4, true, own);    // 128 KB each
}

}  // namespace fusedrnn::probe
