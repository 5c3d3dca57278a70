// What the CPU operators share: 16 floats at a time, as the compiler maps them to the processor.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace polyrex {

using at::BFloat16;

constexpr int64_t LANES = 16;

using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Halves = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
inline void store(float* at, Floats value) { *reinterpret_cast<Floats*>(at) = value; }

inline Floats load(const BFloat16* at) {
  Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16;
  return reinterpret_cast<Floats&>(bits);
}

inline void store(BFloat16* at, Floats value) {
#ifdef __AVX512BF16__
  *reinterpret_cast<Halves*>(at) = (Halves)_mm512_cvtneps_pbh(value);
#else
  Words bits = reinterpret_cast<Words&>(value);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words nan = (Words)(value != value);
  bits = (nan & 0x7fc0) | (~nan & bits);
  *reinterpret_cast<Halves*>(at) = __builtin_convertvector(bits, Halves);
#endif
}

inline void copy(float* to, const float* from) { store(to, load(from)); }
inline void copy(float* to, const BFloat16* from) { store(to, load(from)); }
inline void copy(BFloat16* to, const BFloat16* from) {
  *reinterpret_cast<Halves*>(to) = *reinterpret_cast<const Halves*>(from);
}

// y[c] += out[c] for `width` columns.
template <typename Value>
void add_row(Value* y, const float* out, int64_t width) {
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) store(y + c, load(y + c) + load(out + c));
  for (; c < width; ++c) y[c] = float(y[c]) + out[c];
}

}  // namespace polyrex
