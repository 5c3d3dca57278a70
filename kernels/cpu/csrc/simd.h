// Vectors of 16 floats, which the compiler maps to the registers of the processor.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace polyrex {

using at::BFloat16;

constexpr int64_t LANES = 16;

constexpr int64_t rounded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Integers = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Halves = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

constexpr Integers NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
inline void store(float* at, Floats value) { *reinterpret_cast<Floats*>(at) = value; }

inline Floats load(const BFloat16* at) {
#ifdef __AVX512F__  // compilers convert in several instructions
  Words bits = (Words)_mm512_cvtepu16_epi32(*reinterpret_cast<const __m256i_u*>(at)) << 16;
#else
  Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16;
#endif
  return reinterpret_cast<Floats&>(bits);
}

// Rounds to bfloat16: to nearest, ties to even.
inline Halves halves(Floats value) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh(value);
#else
  Words bits = reinterpret_cast<Words&>(value);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (Words)(value != value);
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & bits), Halves);
#endif
}

inline void store(BFloat16* at, Floats value) { *reinterpret_cast<Halves*>(at) = halves(value); }

// Stores 16 columns of two rows, interleaved in pairs.
inline void store_in_twos(BFloat16* at, Floats first, Floats second) {
#ifdef __AVX512BF16__
  const Words both = (Words)_mm512_cvtne2ps_pbh(second, first);  // first is the lower half
  const Words low = (Words)NUMBERS;
  *reinterpret_cast<Words*>(at) =
      (Words)_mm512_permutexvar_epi16((__m512i)(low | (low + 16) << 16), (__m512i)both);
#else
  *reinterpret_cast<Words*>(at) = __builtin_convertvector(halves(first), Words) |
                                  __builtin_convertvector(halves(second), Words) << 16;
#endif
}

inline void copy(float* to, const float* from) { store(to, load(from)); }
inline void copy(float* to, const BFloat16* from) { store(to, load(from)); }
inline void copy(BFloat16* to, const float* from) { store(to, load(from)); }
inline void copy(BFloat16* to, const BFloat16* from) {
  *reinterpret_cast<Halves*>(to) = *reinterpret_cast<const Halves*>(from);
}

// Writes `size` values: `length` from `from`, then zeros.
template <typename Input, typename From>
void copy_row(Input* to, int64_t size, const From* from, int64_t length) {
  const int64_t there = std::clamp<int64_t>(length, 0, size);
  int64_t k = 0;
  for (; k + LANES <= there; k += LANES) copy(to + k, from + k);
  for (; k < there; ++k) to[k] = Input(from[k]);
  std::fill(to + k, to + size, Input(0));
}

// The number of rows of a matrix that are interleaved, so that a dot product takes them at once.
template <typename Value>
constexpr int64_t ROWS_TOGETHER = sizeof(float) / sizeof(Value);

// sum + x^T rows, for 16 columns of the interleaved rows.
inline Floats dot(Floats sum, const float* rows, const float* x) { return sum + *x * load(rows); }
inline Floats dot(Floats sum, const BFloat16* rows, const BFloat16* x) {
  const Words both = *reinterpret_cast<const Words*>(rows);
  uint32_t two;
  std::memcpy(&two, x, sizeof two);
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)(Words{} + two));
#else
  Words even = both << 16, odd = both & 0xffff0000;
  return sum + float(x[0]) * reinterpret_cast<Floats&>(even) +
         float(x[1]) * reinterpret_cast<Floats&>(odd);
#endif
}

inline float largest(Floats values) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)values);
#else
  float result = values[0];
  for (int64_t k = 1; k < LANES; ++k) result = std::max(result, values[k]);
  return result;
#endif
}

inline float sum(Floats values) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)values);
#else
  float result = 0;
  for (int64_t k = 0; k < LANES; ++k) result += values[k];
  return result;
#endif
}

// exp(x) for x up to 0, with a relative error below 2e-7.
inline Floats exp_of(Floats x) {
  constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  x = x > -87.f ? x : Floats{} - 87.f;  // below that, the result is no normal float
  const Integers power = __builtin_convertvector(x * LOG2_E - 0.5f, Integers);  // to nearest
  const Floats whole = __builtin_convertvector(power, Floats);
  const Floats r = x - whole * LN2_HIGH - whole * LN2_LOW;
  Floats series = Floats{} + 1 / 5040.f;
  for (float term : {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f})
    series = series * r + term;
  Integers bits = (power + 127) << 23;
  return series * reinterpret_cast<Floats&>(bits);
}

// y[c] += out[c] for `width` columns.
template <typename Value>
void add_row(Value* y, const float* out, int64_t width) {
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) store(y + c, load(y + c) + load(out + c));
  for (; c < width; ++c) y[c] = float(y[c]) + out[c];
}

}  // namespace polyrex
