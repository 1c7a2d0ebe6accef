// What the operands of a product are: values of the arithmetic's type, or narrow ones, several to a
// 32-bit word, that lie one after another in k. A format says how a word of a row and a word of a
// panel are multiplied and added to a sum, for a vector of words, and how a row is written in
// words. Where that takes several instructions, words are taken apart into kParts operands, so that
// what is done to a row's word is done once for all of a panel's, and the other way round.
//
// FUSEDRNN_DOT_PRODUCTS, from the kernel file: there are vdpbf16ps and vpdpbusd.
#pragma once

#include "cpu/vec.h"
#include "recurrence.h"

FUSEDRNN_ISA_BEGIN

// Rows of a tall tile, and of one so narrow that the registers hold more.
inline constexpr int kTallRows = 6, kTallestRows = 8;

// Of a format whose words are multiplied as they are.
template <class W>
struct WholeWords {
  static constexpr int kParts = 1;
  template <int>
  static FUSEDRNN_HD Vec<W> left(Vec<W> word) {
    return word;
  }
  template <int>
  static FUSEDRNN_HD Vec<W> right(Vec<W> word) {
    return word;
  }
};

template <class S>
struct Exact : WholeWords<S> {
  using Word = S;
  using Sum = S;
  static constexpr int kMostRows = sizeof(S) == 8 ? 3 : kTallestRows;
  static FUSEDRNN_HD Vec<S> add(Vec<S> sum, Vec<S> left, Vec<S> right) {
    return sum + left * right;
  }
  static FUSEDRNN_HD Vec<S> totals(Vec<S> words) { return words; }
};

// Two bfloat16 values to a word.
struct Bf16
#ifdef FUSEDRNN_DOT_PRODUCTS
    : WholeWords<uint32_t>
#endif
{
  using Word = uint32_t;
  using Sum = float;

  // The lower half of a word comes first in memory and in k.
#ifdef FUSEDRNN_DOT_PRODUCTS
  static constexpr int kMostRows = kTallRows;
  static FUSEDRNN_HD Vec<float> add(Vec<float> sum, Vec<Word> left, Vec<Word> right) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
#else
  static constexpr int kMostRows = kTallRows - 1, kParts = 2;  // the mask takes a register too
  template <int Part>
  static FUSEDRNN_HD Vec<float> right(Vec<Word> word) {
    return (Vec<float>)(Part == 0 ? word << 16 : word & 0xffff0000u);
  }
  template <int Part>
  static FUSEDRNN_HD Vec<float> left(Vec<Word> word) {
    // A broadcast word: else g++ 12 shifts it before, and a vector is made of it the long way.
  #if defined(__x86_64__)
    asm("" : "+v"(word));
  #endif
    return right<Part>(word);
  }
  static FUSEDRNN_HD Vec<float> add(Vec<float> sum, Vec<float> left, Vec<float> right) {
    return sum + left * right;
  }
#endif

  // The sum of each word's values.
  static FUSEDRNN_HD Vec<float> totals(Vec<Word> words) {
    return (Vec<float>)(words << 16) + (Vec<float>)(words & 0xffff0000u);
  }

  // Rounded to nearest even; NaN stays NaN.
  static FUSEDRNN_HD Vec<Word> rounded(Vec<float> v) {
    const Vec<Word> bits = (Vec<Word>)v;
    const Vec<Word> round = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return v == v ? round : Vec<Word>{} + 0x7fc0u;
  }

  typedef uint16_t Halves __attribute__((vector_size(kLanes<float> * 2)));

  static FUSEDRNN_HD Halves halves_of(Vec<float> v) {
#ifdef FUSEDRNN_DOT_PRODUCTS
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(rounded(v), Halves);
#endif
  }

  // The first n lanes (n may exceed them) as bfloat16.
  static FUSEDRNN_HD void store_half(uint16_t* to, Vec<float> v, int64_t n) {
    const Halves halves = halves_of(v);
    if (n >= kLanes<float>) {
      __builtin_memcpy(to, &halves, sizeof(halves));
    } else {
      store_some(to, halves, n);
    }
  }

  // Returns the factor that the row was divided by.
  static FUSEDRNN_HD float write_row(Word* to, const float* from, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kLanes<float>) {
      store_half(reinterpret_cast<uint16_t*>(to) + i, load(from + i, columns - i), kLanes<float>);
    }
    return 1.0f;
  }

  // From values that are bfloat16 already.
  static FUSEDRNN_HD void copy_row(Word* to, const uint16_t* from, int64_t columns) {
    __builtin_memcpy(to, from, columns * sizeof(uint16_t));
    if (columns % 2 != 0) reinterpret_cast<uint16_t*>(to)[columns] = 0;
  }
};

// Four 8-bit values to a word. Rows are unsigned, a value q standing for (q - 128) * factor with
// the row's own factor; panels are signed. Where kShifted, products are of q itself, and the sum of
// 128 times a panel's column is taken off afterwards, by who knows it.
struct Int8
#ifdef FUSEDRNN_DOT_PRODUCTS
    : WholeWords<uint32_t>
#endif
{
  using Word = uint32_t;
  using Sum = int32_t;
  static constexpr int kZero = 128, kMost = 127;

#ifdef FUSEDRNN_DOT_PRODUCTS
  static constexpr int kMostRows = kTallRows;
  static constexpr bool kShifted = true;
  static FUSEDRNN_HD Vec<int32_t> add(Vec<int32_t> sum, Vec<Word> left, Vec<Word> right) {
    return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
  }
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  // vpmaddubsw adds two products in 16 bits: room for 7 bits a side and the sign, which goes to the
  // panel's value.
  static constexpr int kMostRows = 4, kParts = 1;
  static constexpr bool kShifted = false;
  struct Left {
    __m256i value, size;
  };
  template <int>
  static FUSEDRNN_HD Left left(Vec<Word> word) {
    const __m256i value = (__m256i)(word ^ 0x80808080u);
    return {value, _mm256_abs_epi8(value)};
  }
  template <int>
  static FUSEDRNN_HD __m256i right(Vec<Word> word) {
    return (__m256i)word;
  }
  static FUSEDRNN_HD Vec<int32_t> add(Vec<int32_t> sum, Left left, __m256i right) {
    const __m256i pairs = _mm256_maddubs_epi16(left.size, _mm256_sign_epi8(right, left.value));
    return sum + (Vec<int32_t>)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  // Long to compile, and slow in any case: low tiles.
  static constexpr int kMostRows = 2, kParts = 4;
  static constexpr bool kShifted = true;
  template <int Part>
  static FUSEDRNN_HD Vec<int32_t> left(Vec<Word> word) {
    return (Vec<int32_t>)((word >> (8 * Part)) & 255u);
  }
  template <int Part>
  static FUSEDRNN_HD Vec<int32_t> right(Vec<Word> word) {
    return (Vec<int32_t>)(word << (24 - 8 * Part)) >> 24;
  }
  static FUSEDRNN_HD Vec<int32_t> add(Vec<int32_t> sum, Vec<int32_t> left, Vec<int32_t> right) {
    return sum + left * right;
  }
#endif

  // Returns the row's factor; NaN where a value is not finite, so that the products are too.
  static FUSEDRNN_HD float write_row(Word* to, const float* from, int64_t columns) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes<float>)));
    Vec<float> most{}, not_finite{};
    for (int64_t i = 0; i < columns; i += kLanes<float>) {
      const Vec<float> v = load(from + i, columns - i);
      const Vec<float> size = v < 0.0f ? -v : v;
      most = most < size ? size : most;
      not_finite += v - v;
    }
    float largest = 0.0f, poison = 0.0f;
    for (int l = 0; l < kLanes<float>; ++l) {
      largest = largest < most[l] ? most[l] : largest;
      poison += not_finite[l];
    }
    const float factor = largest / kMost;
    const float inverse = largest > 1e-36f && poison == 0.0f ? kMost / largest : 0.0f;
    // Adding 1.5 * 2^23 rounds to an integer, which the lower bits then hold.
    constexpr float rounder = 12582912.0f;
    char* bytes = reinterpret_cast<char*>(to);
    for (int64_t i = 0; i < columns; i += kLanes<float>) {
      const Vec<float> v = load(from + i, columns - i);
      const Vec<float> shifted = v * inverse + (rounder + kZero);
      const Vec<Word> q = poison == 0.0f ? (Vec<Word>)shifted & 255u : Vec<Word>{};
      const Bytes packed = __builtin_convertvector(q, Bytes);
      __builtin_memcpy(bytes + i, &packed, sizeof(packed));
    }
    return factor + poison;
  }
};

template <class F>
inline constexpr int kValuesPerWord = std::is_same_v<F, Bf16>   ? 2
                                      : std::is_same_v<F, Int8> ? 4
                                                                : 1;

// Words of a row of `columns` values. Not words_of<E>, which takes the type that values are kept
// in.
template <class F>
constexpr int64_t format_words(int64_t columns) {
  static_assert(sizeof(typename F::Word) > 0, "F is a format");
  return words_of(columns, kValuesPerWord<F>);
}

// Values from one row of a weight to the next, whose rows are whole words.
template <class F>
constexpr int64_t values_apart(int64_t columns) {
  return format_words<F>(columns) * kValuesPerWord<F>;
}

// ---- values kept as E: float, double or bfloat16 ------------------------------------------------

template <class E>
using FormatOf = std::conditional_t<std::is_same_v<E, uint16_t>, Bf16, Exact<E>>;

// The bits of n values, n <= lanes, each in a word of its own.
FUSEDRNN_HD Vec<uint32_t> load_bits(const uint16_t* from, int64_t n) {
  Bf16::Halves halves;
  if (n >= kLanes<float>) {
    __builtin_memcpy(&halves, from, sizeof(halves));
  } else {
    halves = load_some<Bf16::Halves>(from, n);
  }
  return __builtin_convertvector(halves, Vec<uint32_t>);
}

// The first n values (n may exceed the lanes), the others zero.
template <class S>
FUSEDRNN_HD Vec<S> read(const S* from, int64_t n = kLanes<S>) {
  return load(from, n);
}
FUSEDRNN_HD Vec<float> read(const uint16_t* from, int64_t n = kLanes<float>) {
  return (Vec<float>)(load_bits(from, n) << 16);
}

// One of them.
template <class S>
FUSEDRNN_HD S value_of(S value) {
  return value;
}
FUSEDRNN_HD float value_of(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

template <class S>
FUSEDRNN_HD void write(S* to, Vec<S> v) {
  store(to, v);
}
FUSEDRNN_HD void write(uint16_t* to, Vec<float> v) { Bf16::store_half(to, v, kLanes<float>); }

// One word of k for each of up to `lanes` columns: n values of one row, or of two, `second` after
// `first`. Null: zeros.
template <class F, class E>
FUSEDRNN_HD Vec<typename F::Word> word_of_rows(const E* first, const E* second, int64_t n) {
  Vec<typename F::Word> word{};
  if constexpr (kValuesPerWord<F> == 1) {
    if (first != nullptr) word = load(first, n);
  } else {
    if (first != nullptr) word = load_bits(first, n);
    if (second != nullptr) word |= load_bits(second, n) << 16;
  }
  return word;
}

// A padded row as products read it, and row `row` of a weight of `columns` columns.
template <class E>
const Word<E>* as_words(const E* row) {
  return reinterpret_cast<const Word<E>*>(row);
}
template <class F, class E>
const E* weight_row(const Word<E>* weight, int64_t row, int64_t columns) {
  return reinterpret_cast<const E*>(weight + row * format_words<F>(columns));
}

FUSEDRNN_ISA_END
