// Scratch memory that a thread keeps from call to call: to allocate takes as long as a small product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace polyrex {

enum Use { INPUTS, GRID, HIDDEN, MIXED, GATES, POWERS, OUTPUTS };

// The calling thread's room for `size` values; what it held before is still there.
template <Use USE, typename Value>
Value* room(int64_t size) {
  struct alignas(64) Line {
    Value values[64 / sizeof(Value)];
  };
  static thread_local std::vector<Line> kept;
  const size_t lines = (size * sizeof(Value) + 63) / 64;
  if (kept.size() < lines) kept.resize(lines);
  return kept.data()->values;
}

}  // namespace polyrex
