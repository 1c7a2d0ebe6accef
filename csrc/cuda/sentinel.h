// How CTAs hand each other one step's words: the payload is the flag.
//
// A buffer for all steps, each word written once, relaxed, over kUnwritten. There is no fence and
// no counter, as nothing but the word itself is read on account of having seen it. How memory is
// reached is the caller's matter: the kernels' loads and stores (block.cuh), the probe's
// (bench/cuda/asm.cuh), or std::atomic under ThreadSanitizer (tests/kernels/protocol_check.cpp).
#pragma once

#include <cstdint>

#include "isa_namespace.h"

namespace fusedrnn {

// Four words, the widest load.
struct alignas(16) Words {
  uint32_t word[4];
};

// What memory holds where no word has been written: 0xFF everywhere, NaN in any float format.
inline constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

// A word as it is published: one that reads as unwritten becomes another NaN.
FUSEDRNN_HD uint32_t publishable(uint32_t word) { return word == kUnwritten ? 0x7FFF7FFFu : word; }

FUSEDRNN_HD bool complete(const Words& words) {
  const uint32_t a = words.word[0] < words.word[1] ? words.word[1] : words.word[0];
  const uint32_t b = words.word[2] < words.word[3] ? words.word[3] : words.word[2];
  return (a < b ? b : a) != kUnwritten;  // the largest there is
}

// Loads again what has not come yet of `out`, each by load(k), until all is there; false where
// expired(), asked before each turn, said so. Some(bool) tells whether the answer is yes for any of
// the threads that wait together.
template <int N, class Load, class Expired, class Some>
FUSEDRNN_HD bool await(Words (&out)[N], const Load& load, const Expired& expired,
                       const Some& some) {
  static_assert(N <= 32);
  uint32_t missing = 0;  // bit k: out[k] has not all its words
  for (int k = 0; k < N; ++k) missing |= complete(out[k]) ? 0u : 1u << k;
  while (some(missing != 0)) {
    if (expired()) return false;
    for (int k = 0; k < N; ++k) {
      if (missing >> k & 1u) out[k] = load(k);
    }
    for (int k = 0; k < N; ++k) {
      if (complete(out[k])) missing &= ~(1u << k);
    }
  }
  return true;
}

}  // namespace fusedrnn
