// How CTAs hand each other one step's words, without a word on how memory is reached: a Port does
// that. The probe's ports are inline assembly (asm.cuh); the test's are std::atomic, threads and
// ThreadSanitizer (tests/kernels/protocol_check.cpp).
//
// A step has `words` words, shared out evenly: each of `ctas` CTAs makes its share, and all get
// all.
#pragma once

#include <cstdint>

#include "cuda/sentinel.h"

namespace fusedrnn::probe {

using Piece = Words;

// One thread's view of a step: its pieces are thread, thread + threads, ... of `pieces`.
struct Place {
  uint32_t cta, ctas;
  uint32_t thread, threads;  // of the CTA
  uint32_t pieces;           // a step's words / 4
  uint32_t own_bits = 0;     // pushing: a CTA makes 2^own_bits pieces, and ctas is a power of two

  FUSEDRNN_HD uint32_t piece(int k) const { return thread + static_cast<uint32_t>(k) * threads; }
  FUSEDRNN_HD bool has(int k) const { return piece(k) < pieces; }
  FUSEDRNN_HD uint32_t share() const { return pieces * 4 / ctas; }  // words that a CTA makes
};

// ---- the payload is the flag
// ----------------------------------------------------------------------
//
// As cuda/sentinel.h has it.
//
// Port: store(step, word index, word), load(step, piece index), both relaxed word by word;
// expired(), asked after each failed poll.

template <class Port>
FUSEDRNN_HD void sentinel_publish(Port& port, const Place& at, uint32_t step, uint32_t index,
                                  uint32_t word) {
  port.store(step, at.cta * at.share() + index, publishable(word));
}

// This thread's pieces of the step, N at most; false where the time was up.
template <int N, class Port>
FUSEDRNN_HD bool sentinel_gather(Port& port, const Place& at, uint32_t step, Piece (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    out[k] = at.has(k) ? port.load(step, at.piece(k)) : Piece{};
  }
  return await(
      out, [&](int k) { return port.load(step, at.piece(k)); }, [&] { return port.expired(); },
      [](bool mine) { return mine; });
}

// ---- a counter
// ------------------------------------------------------------------------------------
//
// Plain stores, then one release a CTA on a counter that only grows; plain loads after an acquire.
//
// Port: barrier() of the CTA, add_release(), counter() (an acquire), expired().

// Between the stores of a step and its loads; false in a thread that saw the time run out.
template <class Port>
FUSEDRNN_HD bool flag_wait(Port& port, const Place& at, uint32_t step) {
  bool in_time = true;
  port.barrier();
  if (at.thread == 0) {
    port.add_release();
    const uint32_t target = at.ctas * (step + 1);
    while (in_time && port.counter() < target) in_time = !port.expired();
  }
  port.barrier();
  return in_time;
}

// ---- pushed to every reader
// -----------------------------------------------------------------------
//
// Each CTA has kPushBuffers buffers of a step's pieces, and a phase for each that ends once the
// bytes of a whole step have come. Nobody says that a buffer has been read: a sender of step t + 2
// has all of step t + 1, and whoever sent that had read step t. So two buffers do; one does not.
//
// Port: send(cta, buffer, piece index, piece), arm(buffer) once a phase, ended(buffer, parity),
// read(buffer, piece index), barrier() of the CTA, expired(). Every phase 0 is armed beforehand.

inline constexpr uint32_t kPushBuffers = 2;

// piece_of(step, piece index) makes a piece of this CTA's share.
template <int N, uint32_t kBuffers = kPushBuffers, class Port, class Make>
FUSEDRNN_HD bool push_step(Port& port, const Place& at, uint32_t step, const Make& piece_of,
                           Piece (&out)[N]) {
  const uint32_t buffer = step % kBuffers, parity = step / kBuffers % 2;
  const uint32_t own = 1u << at.own_bits;  // own * ctas sends are shared out over the threads
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!at.has(k)) continue;
    // Each CTA begins with another receiver.
    const uint32_t to = ((at.piece(k) >> at.own_bits) + at.cta) & (at.ctas - 1);
    const uint32_t piece = at.cta * own + (at.piece(k) & (own - 1));
    port.send(to, buffer, piece, piece_of(step, piece));
  }
  bool in_time = true;
  while (in_time && !port.ended(buffer, parity)) in_time = !port.expired();
  // Armed before this CTA's next send, without which no later phase ends anywhere. A thread that
  // still asks for the phase that has ended gets the same answer as before.
  if (at.thread == 0 && in_time) port.arm(buffer);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = at.has(k) ? port.read(buffer, at.piece(k)) : Piece{};
  port.barrier();  // all has been read before anything is sent
  return in_time;
}

}  // namespace fusedrnn::probe
