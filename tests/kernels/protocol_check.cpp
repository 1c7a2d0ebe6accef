// The exchanges of bench/cuda/protocols.h between threads of the host, for ThreadSanitizer: a CTA
// is four threads, a relaxed load or store a std::atomic's, a plain one plain memory. Threads yield
// at random between any two accesses.
//
//   protocol_check WHICH    sentinel, flag, push: must be right. The others are broken on purpose,
//                           and must be found out: sentinel-unchecked, sentinel-plain,
//                           flag-relaxed, push-one-buffer, push-no-barrier
//
// Exit code 0 where all words were right; 1 where one was wrong or late; ThreadSanitizer's 66.
#include <sched.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "protocols.h"

namespace {

using namespace fusedrnn;
using namespace fusedrnn::probe;

constexpr uint32_t kCtas = 4, kThreads = 4, kPieces = 8, kSteps = 400;
constexpr uint32_t kOwnBits = 1;  // 2 pieces a CTA, so no thread sends to all CTAs
constexpr int N = kPieces / kThreads;
std::atomic<uint32_t> wrong{0}, late{0};

// Every 7th word reads as unwritten, which must not matter.
uint32_t word_of(uint32_t step, uint32_t index) {
  const uint32_t n = step * kPieces * 4 + index;
  return n % 7 == 0 ? kUnwritten : n * 2654435761u;
}

void sometimes_yield() {
  thread_local std::minstd_rand random(std::hash<std::thread::id>()(std::this_thread::get_id()));
  if (random() % 4 == 0) sched_yield();
}

// Long enough for the others to do a step.
void sometimes_sleep() {
  thread_local std::minstd_rand random(std::hash<std::thread::id>()(std::this_thread::get_id()));
  if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
}

class Deadline {
 public:
  bool expired() {
    sched_yield();
    return std::chrono::steady_clock::now() > end_;
  }

 private:
  std::chrono::steady_clock::time_point end_ =
      std::chrono::steady_clock::now() + std::chrono::seconds(12);
};

using CtaBarrier = std::barrier<>;

// What ports have in common.
struct Port : Deadline {
  explicit Port(CtaBarrier& barrier) : cta_barrier(barrier) {}
  void barrier() {
    sometimes_yield();
    cta_barrier.arrive_and_wait();
  }
  CtaBarrier& cta_barrier;
};

void compare(const Place& at, uint32_t step, const Piece (&got)[N], bool as_published) {
  for (int k = 0; k < N; ++k) {
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t made = word_of(step, at.piece(k) * 4 + i);
      if (got[k].word[i] != (as_published ? publishable(made) : made)) ++wrong;
    }
  }
}

// Runs `body` for every step in every thread of every CTA. body returns false where it gives up.
void run(const std::function<bool(const Place&, CtaBarrier&, uint32_t step)>& body) {
  std::vector<std::unique_ptr<CtaBarrier>> barriers;
  for (uint32_t i = 0; i < kCtas; ++i) barriers.push_back(std::make_unique<CtaBarrier>(kThreads));
  std::vector<std::jthread> threads;
  for (uint32_t i = 0; i < kCtas * kThreads; ++i) {
    threads.emplace_back([&, i] {
      const Place at = {i / kThreads, kCtas, i % kThreads, kThreads, kPieces, kOwnBits};
      CtaBarrier& barrier = *barriers[at.cta];
      for (uint32_t step = 0; step < kSteps; ++step) {
        if (!body(at, barrier, step)) {
          ++late;
          barrier.arrive_and_drop();
          return;
        }
      }
    });
  }
}

// ---- through global memory
// ------------------------------------------------------------------------

enum class How { kRight, kUnchecked, kPlain };

template <How how>
struct SentinelPort : Port {
  using Port::Port;
  using Word = std::conditional_t<how == How::kPlain, uint32_t, std::atomic<uint32_t>>;
  static inline std::vector<Word> words =
      std::vector<Word>(static_cast<size_t>(kSteps) * kPieces * 4);

  static Word& at(uint32_t step, uint32_t index) { return words[step * kPieces * 4 + index]; }
  void store(uint32_t step, uint32_t index, uint32_t word) {
    sometimes_yield();
    if constexpr (how == How::kPlain) {
      at(step, index) = word;
    } else {
      at(step, index).store(word, std::memory_order_relaxed);
    }
  }
  Piece load(uint32_t step, uint32_t piece) {
    Piece found;
    for (uint32_t i = 0; i < 4; ++i) {
      sometimes_yield();
      if constexpr (how == How::kPlain) {
        found.word[i] = at(step, piece * 4 + i);
      } else {
        found.word[i] = at(step, piece * 4 + i).load(std::memory_order_relaxed);
      }
      if (how == How::kUnchecked && found.word[i] == kUnwritten) found.word[i] = 0;
    }
    return found;
  }
};

template <How how>
void sentinel() {
  using Mine = SentinelPort<how>;
  for (auto& word : Mine::words) word = kUnwritten;
  run([](const Place& at, CtaBarrier& barrier, uint32_t step) {
    Mine port(barrier);
    for (uint32_t i = at.thread; i < at.share(); i += at.threads) {
      sentinel_publish(port, at, step, i, word_of(step, at.cta * at.share() + i));
    }
    Piece got[N];
    if (!sentinel_gather(port, at, step, got)) return false;
    compare(at, step, got, true);
    port.barrier();  // a step's end: all threads of the CTA have all
    return true;
  });
}

struct FlagPort : Port {
  using Port::Port;
  static inline std::memory_order release = std::memory_order_release;
  static inline std::memory_order acquire = std::memory_order_acquire;
  static inline std::atomic<uint32_t> counted{0};
  static inline std::vector<uint32_t> words =
      std::vector<uint32_t>(static_cast<size_t>(kSteps) * kPieces * 4, kUnwritten);

  void add_release() { counted.fetch_add(1, release); }
  uint32_t counter() {
    sometimes_yield();
    return counted.load(acquire);
  }
};

void flag() {
  run([](const Place& at, CtaBarrier& barrier, uint32_t step) {
    FlagPort port(barrier);
    uint32_t* words = FlagPort::words.data() + step * kPieces * 4;
    for (uint32_t i = at.thread; i < at.share(); i += at.threads) {
      const uint32_t index = at.cta * at.share() + i;
      sometimes_yield();
      words[index] = word_of(step, index);
    }
    if (!flag_wait(port, at, step)) return false;
    Piece got[N];
    for (int k = 0; k < N; ++k) std::memcpy(&got[k], words + at.piece(k) * 4, sizeof(Piece));
    compare(at, step, got, false);
    port.barrier();
    return true;
  });
}

// ---- through shared memory
// ------------------------------------------------------------------------

// PTX's mbarrier with one arrival a phase: a phase ends when it has been armed and as many bytes as
// were expected have come. They may come before it is armed.
class Mbarrier {
 public:
  void arm(int bytes) {
    const std::lock_guard lock(mutex_);
    left_ += bytes;
    armed_ = true;
    end();
  }
  void come(int bytes) {
    const std::lock_guard lock(mutex_);
    left_ -= bytes;
    end();
  }
  bool ended(uint32_t parity) {
    const std::lock_guard lock(mutex_);
    return phase_ % 2 != parity;
  }

 private:
  void end() {
    if (!armed_ || left_ != 0) return;
    armed_ = false;
    ++phase_;
  }
  std::mutex mutex_;
  int left_ = 0;
  bool armed_ = false;
  uint32_t phase_ = 0;
};

struct Shared {  // of a CTA
  Piece buffer[kPushBuffers][kPieces];
  Mbarrier mbarrier[kPushBuffers];
};
Shared shared[kCtas];

// Delivers what a CTA has sent, later and in any order, as st.async may.
class Courier {
 public:
  struct Parcel {
    uint32_t to, buffer, piece;
    Piece content;
  };
  Courier() : thread_([this](std::stop_token stop) { deliver(stop); }) {}
  void take(const Parcel& parcel) {
    const std::lock_guard lock(mutex_);
    parcels_.push_back(parcel);
  }

 private:
  void deliver(const std::stop_token& stop) {
    std::minstd_rand random(1);
    while (!stop.stop_requested()) {
      sched_yield();
      Parcel parcel;
      {
        const std::lock_guard lock(mutex_);
        if (parcels_.empty()) continue;
        std::swap(parcels_.front(), parcels_[random() % parcels_.size()]);
        parcel = parcels_.front();
        parcels_.pop_front();
      }
      shared[parcel.to].buffer[parcel.buffer][parcel.piece] = parcel.content;
      sometimes_yield();
      shared[parcel.to].mbarrier[parcel.buffer].come(sizeof(Piece));
    }
  }
  std::mutex mutex_;
  std::deque<Parcel> parcels_;
  std::jthread thread_;
};

template <bool kBarrier>
struct PushPort : Port {
  PushPort(CtaBarrier& barrier, uint32_t cta, Courier& by) : Port(barrier), own(cta), courier(by) {}
  void send(uint32_t to, uint32_t buffer, uint32_t piece, const Piece& made) {
    courier.take({to, buffer, piece, made});
  }
  void arm(uint32_t buffer) {
    sometimes_yield();
    shared[own].mbarrier[buffer].arm(kPieces * sizeof(Piece));
  }
  bool ended(uint32_t buffer, uint32_t parity) {
    return shared[own].mbarrier[buffer].ended(parity);
  }
  Piece read(uint32_t buffer, uint32_t piece) {
    sometimes_sleep();
    return shared[own].buffer[buffer][piece];
  }
  void barrier() {
    if (kBarrier) Port::barrier();
  }
  uint32_t own;
  Courier& courier;
};

template <uint32_t kBuffers, bool kBarrier = true>
void push() {
  for (Shared& cta : shared) {
    for (Mbarrier& mbarrier : cta.mbarrier) mbarrier.arm(kPieces * sizeof(Piece));
  }
  Courier couriers[kCtas];
  run([&](const Place& at, CtaBarrier& barrier, uint32_t step) {
    PushPort<kBarrier> port(barrier, at.cta, couriers[at.cta]);
    const auto piece_of = [](uint32_t t, uint32_t piece) {
      Piece made;
      for (uint32_t i = 0; i < 4; ++i) made.word[i] = word_of(t, piece * 4 + i);
      return made;
    };
    Piece got[N];
    if (!push_step<N, kBuffers>(port, at, step, piece_of, got)) return false;
    compare(at, step, got, false);
    return true;
  });
}

}  // namespace

int main(int count, char** arguments) {
  const char* which = count == 2 ? arguments[1] : "";
  const auto is = [&](const char* name) { return std::strcmp(which, name) == 0; };
  if (is("sentinel")) {
    sentinel<How::kRight>();
  } else if (is("sentinel-unchecked")) {
    sentinel<How::kUnchecked>();
  } else if (is("sentinel-plain")) {
    sentinel<How::kPlain>();
  } else if (is("flag")) {
    flag();
  } else if (is("flag-relaxed")) {
    FlagPort::release = FlagPort::acquire = std::memory_order_relaxed;
    flag();
  } else if (is("push")) {
    push<kPushBuffers>();
  } else if (is("push-one-buffer")) {
    push<1>();
  } else if (is("push-no-barrier")) {
    push<kPushBuffers, false>();
  } else {
    std::fprintf(stderr, "usage: protocol_check WHICH\n");
    return 2;
  }
  std::printf("%s: %u steps, %u wrong words, %u late threads\n", which, kSteps, wrong.load(),
              late.load());
  return wrong != 0 || late != 0 ? 1 : 0;
}
