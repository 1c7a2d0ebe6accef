// The vector type of one instruction set (GCC and Clang vector extensions) and its memory access.
//
// FUSEDRNN_VECTOR_BYTES and FUSEDRNN_ACCUMULATORS (registers a product may use for its sums) come
// from the kernel file.
#pragma once

#include <cstdint>
#include <cstring>
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

// The first n lanes (n may exceed the lanes); the others read as zero and are not written.
template <class S>
FUSEDRNN_HD Vec<S> load(const S* from, int64_t n) {
  if (n >= kLanes<S>) return load(from);
  S lanes[kLanes<S>] = {};
  copy_some(lanes, from, n);
  return load(lanes);
}

template <class S>
FUSEDRNN_HD void store(S* to, Vec<S> v, int64_t n) {
  if (n >= kLanes<S>) return store(to, v);
  S lanes[kLanes<S>];
  store(lanes, v);
  copy_some(to, lanes, n);
}

// The line at an address into the cache, to be read, or to be written too.
template <class S>
FUSEDRNN_HD void fetch_to_read(const S* from) {
  __builtin_prefetch(from, 0, 3);
}
template <class S>
FUSEDRNN_HD void fetch_to_write(S* to) {
  __builtin_prefetch(to, 1, 3);
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

template <int Step, class S>
FUSEDRNN_HD void add_stage(Vec<S> (&rows)[kLanes<S>]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<S>>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<S>; i += 2 * Step) {
    rows[i] = interleave<Step, false, S>(rows[i], rows[i + Step], lanes) +
              interleave<Step, true, S>(rows[i], rows[i + Step], lanes);
  }
  if constexpr (2 * Step < kLanes<S>) add_stage<2 * Step, S>(rows);
}

// The lanes of the result are the sums of the rows' lanes: a transposition that adds on the way.
template <class S>
FUSEDRNN_HD Vec<S> sums_of(Vec<S> (&rows)[kLanes<S>]) {
  add_stage<1, S>(rows);
  return rows[0];
}

FUSEDRNN_ISA_END
