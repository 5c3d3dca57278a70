// Scratch memory that a thread keeps between calls: an allocation takes as long as a small product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace polyrex {

enum Use { INPUTS, GRID, HIDDEN, MIXED, GATES, POWERS, OUTPUTS };

// The calling thread's memory for `size` values of one use. It still holds what was written before.
template <Use USE, typename Value>
Value* scratch(int64_t size) {
  struct alignas(64) Line {
    Value values[64 / sizeof(Value)];
  };
  static thread_local std::vector<Line> kept;
  const size_t lines = (size * sizeof(Value) + 63) / 64;
  if (kept.size() < lines) kept.resize(lines);
  return kept.data()->values;
}

}  // namespace polyrex
