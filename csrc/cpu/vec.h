// The vector type of one instruction set (GCC and Clang vector extensions) and its memory access.
//
// FUSEDRNN_VECTOR_BYTES and FUSEDRNN_ACCUMULATORS (registers a product may use for its sums) come
// from the kernel file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa_namespace.h"

FUSEDRNN_ISA_BEGIN

template <class S, int Lanes>
struct VectorOf {
  typedef S type __attribute__((vector_size(Lanes * sizeof(S))));
};

template <class S>
inline constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / static_cast<int>(sizeof(S));

template <class S>
using Vec = typename VectorOf<S, kLanes<S>>::type;

template <class S>
FUSEDRNN_HD Vec<S> load(const S* from) {
  Vec<S> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class S>
FUSEDRNN_HD void store(S* to, Vec<S> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// A call: inlined, its loop would stand at a hundred places.
template <class S>
__attribute__((noinline)) void copy_some(S* to, const S* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
FUSEDRNN_HD uint32_t first_lanes(int64_t n) { return n <= 0 ? 0 : (uint32_t{1} << n) - 1; }
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
// Every bit of the first n lanes of 4 or 8 bytes.
template <class I>
FUSEDRNN_HD __m256i first_lanes(int64_t n) {
  Vec<I> lane;
  for (int i = 0; i < kLanes<I>; ++i) lane[i] = i;
  return (__m256i)(lane < static_cast<I>(n));
}
#endif

// Fewer lanes of V than it has: the first n, none where n is negative; the others read as zero and
// are not written.
template <class V, class S>
FUSEDRNN_HD V load_some(const S* from, int64_t n) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 8) return (V)_mm512_maskz_loadu_epi64(first_lanes(n), from);
  if constexpr (sizeof(S) == 4) return (V)_mm512_maskz_loadu_epi32(first_lanes(n), from);
  if constexpr (sizeof(S) == 2) return (V)_mm256_maskz_loadu_epi16(first_lanes(n), from);
#else
  #if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(S) == 8) {
    return (V)_mm256_maskload_epi64((const long long*)from, first_lanes<int64_t>(n));
  }
  if constexpr (sizeof(S) == 4) {
    return (V)_mm256_maskload_epi32((const int*)from, first_lanes<int32_t>(n));
  }
  #endif
  V v{};
  copy_some(reinterpret_cast<S*>(&v), from, n);
  return v;
#endif
}

template <class S, class V>
FUSEDRNN_HD void store_some(S* to, V v, int64_t n) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_epi64(to, first_lanes(n), (__m512i)v);
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_epi32(to, first_lanes(n), (__m512i)v);
  if constexpr (sizeof(S) == 2) _mm256_mask_storeu_epi16(to, first_lanes(n), (__m256i)v);
#else
  #if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(S) == 8) {
    return _mm256_maskstore_epi64((long long*)to, first_lanes<int64_t>(n), (__m256i)v);
  }
  if constexpr (sizeof(S) == 4) {
    return _mm256_maskstore_epi32((int*)to, first_lanes<int32_t>(n), (__m256i)v);
  }
  #endif
  copy_some(to, reinterpret_cast<const S*>(&v), n);
#endif
}

// The first n lanes (n may exceed the lanes); the others read as zero and are not written.
template <class S>
FUSEDRNN_HD Vec<S> load(const S* from, int64_t n) {
  return n >= kLanes<S> ? load(from) : load_some<Vec<S>>(from, n);
}

template <class S>
FUSEDRNN_HD void store(S* to, Vec<S> v, int64_t n) {
  if (n >= kLanes<S>) {
    store(to, v);
  } else {
    store_some(to, v, n);
  }
}

// v with zeros from lane n on.
template <class S>
FUSEDRNN_HD Vec<S> with_first_lanes(Vec<S> v, int64_t n) {
  using I = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  if (n >= kLanes<S>) return v;
  Vec<I> lane;
  for (int i = 0; i < kLanes<I>; ++i) lane[i] = i;
  return lane < static_cast<I>(n) ? v : Vec<S>{};
}

// f(std::integral_constant) for 0 to Count - 1.
template <int Count, class Visit>
FUSEDRNN_HD void for_each_constant(Visit f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, Count>{});
}

// Values of a cache line.
template <class S>
inline constexpr int64_t kLine = 64 / sizeof(S);

// The line at an address into the cache, to be read, or to be written too.
template <class S>
FUSEDRNN_HD void fetch_to_read(const S* from) {
  __builtin_prefetch(from, 0, 3);
}
template <class S>
FUSEDRNN_HD void fetch_to_write(S* to) {
  __builtin_prefetch(to, 1, 3);
}

// The first lines of a row of n values.
template <class S>
FUSEDRNN_HD void fetch_row(const S* from, int64_t n) {
  constexpr int64_t most = 8 * kLine<S>;
  for (int64_t i = 0; i < std::min(n, most); i += kLine<S>) fetch_to_read(from + i);
}

// The same vector, of which the compiler knows nothing: it stays in a register, where g++ 12 may
// load it again for each use, and a product is not joined with what it is added to.
template <class V>
FUSEDRNN_HD V kept(V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64) {
    asm("" : "+v"(v));
  } else {
    asm("" : "+x"(v));
  }
#endif
  return v;
}

template <class S>
FUSEDRNN_HD Vec<S> broadcast(S s) {
  return s - Vec<S>{};  // folds to one broadcast from memory; s + 0 would not, for s = -0
}

// One butterfly stage of a transposition: lanes whose index has bit Step clear come from a, and
// their neighbours from b.
template <int Step, bool High, class S, int... I>
FUSEDRNN_HD Vec<S> interleave(Vec<S> a, Vec<S> b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(
      a, b, (I & Step ? lanes + (High ? I : I - Step) : (High ? I + Step : I))...);
}

template <int Step, class S>
FUSEDRNN_HD void transpose_stage(Vec<S> (&rows)[kLanes<S>]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<S>>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<S>; ++i) {
    if (i & Step) continue;
    const Vec<S> low = rows[i], high = rows[i + Step];
    rows[i] = interleave<Step, false, S>(low, high, lanes);
    rows[i + Step] = interleave<Step, true, S>(low, high, lanes);
  }
  if constexpr (2 * Step < kLanes<S>) transpose_stage<2 * Step, S>(rows);
}

// rows[i][j] becomes rows[j][i].
template <class S>
FUSEDRNN_HD void transpose(Vec<S> (&rows)[kLanes<S>]) {
  transpose_stage<1, S>(rows);
}

// Stages Step to End / 2 of sums_of, of the rows whose index they look at: multiples of Step.
template <int Step, int End, class S, int N>
FUSEDRNN_HD void add_stages(Vec<S> (&rows)[N]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<S>>();
  if constexpr (Step < End) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i += 2 * Step) {
      rows[i] = interleave<Step, false, S>(rows[i], rows[i + Step], lanes) +
                interleave<Step, true, S>(rows[i], rows[i + Step], lanes);
    }
    add_stages<2 * Step, End, S>(rows);
  }
}

// The lanes of the result are the sums of the rows' lanes: a transposition that adds on the way.
template <class S>
FUSEDRNN_HD Vec<S> sums_of(Vec<S> (&rows)[kLanes<S>]) {
  add_stages<1, kLanes<S>, S>(rows);
  return rows[0];
}

FUSEDRNN_ISA_END
