// What the machine can do at best, all threads at once: multiplications and additions from
// registers, the same in a product's tile, reading from the private and from the shared cache, and
// handing a line from one core to another.
//
//   probe THREADS     prints {"flops", "product", "private_cache", "shared_cache", "transfer",
//                     "private_bytes"}: operations and bytes a second, each for one thread; the
//                     seconds a line takes, 0 for one thread; the private cache's size
//
// Compiled by bench/floors.py for the machine that it runs on (-march=native).
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kTileRows = 6, kTileVectors = 4;  // as many sums as the registers hold
#else
constexpr int kBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
typedef float Vec __attribute__((vector_size(kBytes), aligned(4), may_alias));
constexpr int kLanes = kBytes / 4;
constexpr int kChains = 12;  // as many as hide an addition's latency, and fit the registers

volatile float sink;

void keep(const Vec (&values)[kChains]) {
  float total = 0;
  for (const Vec& v : values) total += v[0] + v[kLanes - 1];
  sink = total;
}

// Operations done.
double multiply_add(int64_t rounds) {
  Vec sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Vec{} + static_cast<float>(c);  // each its own
  const Vec a = Vec{} + 0.999f, b = Vec{} + 1e-6f;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * a + b;
  }
  keep(sums);
  return 2.0 * kLanes * kChains * static_cast<double>(rounds);
}

// Not by memcpy: for 32 bytes g++ 12 takes the way through memory, 50 times slower.
Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }

// Operations done: rows times a panel of k x kTileVectors vectors, tile by tile.
double multiply(const float* rows, const float* panel, int64_t k, int64_t tiles) {
  constexpr int64_t width = kTileVectors * kLanes;
  for (int64_t t = 0; t < tiles; ++t) {
    Vec sums[kTileRows][kTileVectors] = {};
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) {
          sums[r][v] += rows[r * k + i] * load(panel + i * width + v * kLanes);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sink = sums[r][v][0];
    }
  }
  return 2.0 * kTileRows * width * static_cast<double>(k * tiles);
}

// Bytes read.
double read(const float* from, int64_t values, int64_t rounds) {
  Vec sums[kChains] = {};
  constexpr int64_t each = kChains * kLanes;
  const int64_t whole = values / each * each;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t i = 0; i < whole; i += each) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) {
        sums[c] += load(from + i + c * kLanes);
      }
    }
  }
  keep(sums);
  return 4.0 * static_cast<double>(whole * rounds);
}

// The best of many turns, in which all threads run at once; the slowest thread's rate counts.
template <class Work>
double best_rate(int threads, Work work) {
  std::vector<double> best(200, 1e300);
  std::vector<std::vector<double>> rates(threads, std::vector<double>(best.size()));
  std::barrier start(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      for (size_t turn = 0; turn < best.size(); ++turn) {
        start.arrive_and_wait();
        const auto begin = std::chrono::steady_clock::now();
        const double done = work(t);
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
        rates[t][turn] = done / spent.count();
      }
    });
  }
  for (std::thread& thread : team) thread.join();
  for (const auto& own : rates) {
    for (size_t turn = 0; turn < best.size(); ++turn) best[turn] = std::min(best[turn], own[turn]);
  }
  return *std::max_element(best.begin(), best.end());
}

// Seconds from a store to its sight on another core: the best of many turns of some hundred ways.
double best_transfer() {
  struct alignas(128) Line {
    std::atomic<int64_t> count{0};
  };
  constexpr int64_t turns = 300, ways = 200;
  Line there, back;
  std::thread other([&] {
    for (int64_t i = 1; i <= turns * ways; ++i) {
      while (there.count.load(std::memory_order_acquire) < i) {
      }
      back.count.store(i, std::memory_order_release);
    }
  });
  double best = 1e300;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t i = turn * ways + 1; i <= (turn + 1) * ways; ++i) {
      there.count.store(i, std::memory_order_release);
      while (back.count.load(std::memory_order_acquire) < i) {
      }
    }
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    best = std::min(best, spent.count() / (2 * ways));
  }
  other.join();
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (threads < 1) return std::fprintf(stderr, "probe: expected a number of threads\n"), 2;
  const auto reading = [&](int64_t bytes) {
    std::vector<std::vector<float>> data(threads, std::vector<float>(bytes / 4, 1.0f));
    const int64_t rounds = std::max<int64_t>(1, (int64_t{64} << 20) / bytes);
    return best_rate(threads, [&](int t) { return read(data[t].data(), bytes / 4, rounds); });
  };
  long private_bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  private_bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  if (private_bytes <= 0) private_bytes = 1 << 20;
  const auto multiplying = [&] {
    constexpr int64_t k = 256;
    std::vector<std::vector<float>> data(
        threads, std::vector<float>(k * (kTileRows + kTileVectors * kLanes), 1e-3f));
    return best_rate(threads, [&](int t) {
      return multiply(data[t].data(), data[t].data() + k * kTileRows, k, 2000);
    });
  };
  std::printf(
      "{\"flops\": %.4g, \"product\": %.4g, \"private_cache\": %.4g, \"shared_cache\": %.4g, "
      "\"transfer\": %.3g, \"private_bytes\": %ld}\n",
      best_rate(threads, [](int) { return multiply_add(2'000'000); }), multiplying(),
      reading(private_bytes / 2), reading(private_bytes * 4), threads > 1 ? best_transfer() : 0.0,
      private_bytes);
}
