// The CPU path of adapters whose sides are tensor products of a task's leaves.
// kernels/factored.py documents the operator; its twin is adapters/methods/tensor_product.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "tiles.h"
#include "scratch.h"
#include "simd.h"

namespace {

using namespace polyrex;
using at::Tensor;

// A side of a task's adapter, which is never built: row k is first_k (x) second_k - shift_k, cut.
// Its leaves follow each other: first [p, R]; second [q, R] or its transpose, with rows interleaved
// in pairs if it is of bfloat16; and shift [R] in float32. R is 16.
template <typename Value>
struct Leaves {
  const Value *first, *second;
  const float* shift;
  const Value* end;

  Leaves(const Value* at, int64_t p, int64_t q)
      : first(at), second(at + p * LANES),
        shift(reinterpret_cast<const float*>(second + q * LANES)),
        end(reinterpret_cast<const Value*>(shift + LANES)) {}
};

// The factored products, in vectors.
template <typename Value>
struct FactoredVectors {
  // first^T X second for one token, X = x laid out in rows of q.
  Floats shrink(const Value* x, int64_t length, int64_t q, const Leaves<Value>& side) const {
    constexpr int64_t STEP = ROWS_TOGETHER<Value>;
    Floats hidden = {};
    for (int64_t begin = 0, i = 0; begin < length; begin += q, ++i) {
      const Value* row = x + begin;
      const int64_t end = std::min(q, length - begin);
      Floats sums[4] = {};  // independent: none waits for another
      int64_t j = 0;
      for (; j + 4 * STEP <= end; j += 4 * STEP)
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; ++k)
          sums[k] = dot(sums[k], side.second + (j + k * STEP) * LANES, row + j + k * STEP);
      for (; j < end; j += STEP) sums[0] = dot(sums[0], side.second + j * LANES, row + j);
      hidden += load(side.first + i * LANES) * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return hidden;
  }

  // out = level + sum_k h_k first_k (x) second_k for one token; second is [16, width].
  // A row of out is written in whole vectors, beyond its end: the next row is written later.
  void expand(float* out, int64_t length, int64_t q, int64_t width, const Leaves<Value>& side,
              Floats hidden, float level) const {
    constexpr int64_t STEP = ROWS_TOGETHER<Value>;
    for (int64_t begin = 0, i = 0; begin < length; begin += q, ++i) {
      Value weights[LANES];
      store(weights, hidden * load(side.first + i * LANES));
      for (int64_t j = 0; j < q; j += LANES) {
        Floats sums[4] = {Floats{} + level};
#pragma GCC unroll 16
        for (int64_t k = 0; k < LANES / STEP; ++k)
          sums[k % 4] =
              dot(sums[k % 4], side.second + k * STEP * width + j * STEP, weights + k * STEP);
        store(out + begin + j, (sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
    }
  }
};

struct FactoredTiles;

#ifdef __AMX_BF16__
// The same in tiles, which the rows of one token fill. Rows are read in place, beyond their end,
// where the other factor is 0, and 32 at a time, beyond the last one.
struct FactoredTiles : Tiles {
  static constexpr int64_t ROWS = 32;
  // Tiles 0 and 1 are sums; 2 and 3 multiply 32 of the depth, 4 to 6 multiply 16.
  FactoredTiles() {
    configure({.bytes = {64, 64, 64, 64, 32, 32, 64}, .rows = {16, 16, 16, 16, 16, 16, 8}});
  }

  Floats shrink(const BFloat16* x, int64_t length, int64_t q, const Leaves<BFloat16>& side) const {
    const int64_t rows = rounded(length, q) / q, depth = rounded(q, LANES);
    alignas(64) float out[ROWS * LANES];
    Floats hidden = {};
    for (int64_t row = 0; row < rows; row += ROWS) {
      const BFloat16 *upper = x + row * q, *lower = upper + 16 * q;
      _tile_zero(0);
      _tile_zero(1);
      int64_t k = 0;
      for (; k + 32 <= depth; k += 32) {
        _tile_loadd(3, side.second + k * LANES, 64);
        _tile_loadd(2, upper + k, q * 2);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(2, lower + k, q * 2);
        _tile_dpbf16ps(1, 2, 3);
      }
      if (k < depth) {
        _tile_loadd(6, side.second + k * LANES, 64);
        _tile_loadd(4, upper + k, q * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower + k, q * 2);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, out, 64);
      _tile_stored(1, out + 16 * LANES, 64);
      for (int64_t i = 0; i < std::min(ROWS, rows - row); ++i)
        hidden += load(side.first + (row + i) * LANES) * load(out + i * LANES);
    }
    return hidden;
  }

  void expand(float* out, int64_t length, int64_t q, int64_t width, const Leaves<BFloat16>& side,
              Floats hidden, float level) const {
    const int64_t rows = rounded(length, q) / q;
    alignas(64) BFloat16 weights[ROWS * LANES];
    alignas(64) float levels[16 * LANES];
    for (int64_t i = 0; i < 16; ++i) store(levels + i * LANES, Floats{} + level);
    for (int64_t row = 0; row < rows; row += ROWS) {
      for (int64_t i = 0; i < ROWS; ++i) {
        const BFloat16* first = side.first + (row + i) * LANES;
        store(weights + i * LANES, row + i < rows ? hidden * load(first) : Floats{});
      }
      _tile_loadd(4, weights, 32);
      _tile_loadd(5, weights + 16 * LANES, 32);
      // The last columns reach into the next row, so they are written first.
      for (int64_t j = width - LANES; j >= 0; j -= LANES) {
        _tile_loadd(6, side.second + j * 2, width * 4);
        _tile_loadd(0, levels, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stored(0, out + row * q + j, q * 4);
        _tile_loadd(1, levels, 64);
        _tile_dpbf16ps(1, 5, 6);
        _tile_stored(1, out + (row + 16) * q + j, q * 4);
      }
    }
  }
};
#endif

// The sum in the order of the lanes, on every processor; with AVX-512, `sum` adds in a tree.
float sum_in_order(Floats values) {
  float result = 0;
  for (int64_t k = 0; k < LANES; ++k) result += values[k];
  return result;
}

// A row of `parts`: one module of a layer.
struct Part {
  int64_t start;         // where its leaves begin in a task's row
  int64_t column;        // where its outputs begin
  int64_t length;        // how many there are
  int64_t p, q;          // the sizes of the A side's leaves
  int64_t p_out, q_out;  // of the B side's
};

// y_t += B_t A_t x_t for every module; `Sides` computes the products with both sides.
template <typename Value, typename Sides>
void factored_add(Tensor& y, const Tensor& x, const Tensor& leaves, const Part* part,
                  int64_t modules, const int64_t* place) {
  const int64_t size = leaves.size(1), d_in = x.size(1);
  int64_t most_in = 0, most_out = 0;
  for (int64_t m = 0; m < modules; ++m) {
    most_in = std::max(most_in, (rounded(d_in, part[m].q) / part[m].q + 32) * part[m].q + 32);
    const int64_t rows = rounded(part[m].length, part[m].q_out) / part[m].q_out;
    most_out = std::max(most_out, (rows + 32) * part[m].q_out + LANES);
  }
  at::parallel_for(0, x.size(0), 1, [&](int64_t from, int64_t to) {
    const Sides sides;
    Value* in = scratch<INPUTS, Value>(most_in);
    std::fill(in + d_in, in + most_in, Value(0));
    float* out = scratch<OUTPUTS, float>(most_out);
    for (int64_t t = from; t < to; ++t) {
      if (place[t] < 0) continue;
      copy_row(in, d_in, x.const_data_ptr<Value>() + t * x.stride(0), d_in);
      Floats sums = {};
      for (int64_t i = 0; i < d_in; i += LANES) sums += load(in + i);  // zeros follow
      const float total = sum_in_order(sums);
      for (int64_t m = 0; m < modules; ++m) {
        const auto [start, column, length, p, q, p_out, q_out] = part[m];
        const int64_t width = rounded(q_out, LANES);
        const Value* at = leaves.const_data_ptr<Value>() + place[t] * size + start;
        const Leaves<Value> a(at, p, rounded(q, LANES)), b(a.end, p_out, width);
        // The leaves of tasks are far apart: prefetch those of the next token.
        if (t + 1 < to && place[t + 1] >= 0)
          for (const Value* own = at; own < b.end; own += 64 / sizeof(Value))
            __builtin_prefetch(own + (place[t + 1] - place[t]) * size);
        const Floats hidden = sides.shrink(in, d_in, q, a) - load(a.shift) * total;
        sides.expand(out, length, q_out, width, b, hidden, -sum_in_order(hidden * load(b.shift)));
        add_row(y.data_ptr<Value>() + t * y.stride(0) + column, out, length);
      }
    }
  });
}

void factored_add_(Tensor& y, const Tensor& x, const Tensor& leaves, const Tensor& parts,
                   const Tensor& places) {
  const auto dtype = leaves.scalar_type();
  TORCH_CHECK(x.stride(1) == 1 && y.stride(1) == 1 && leaves.is_contiguous() &&
              parts.is_contiguous() && parts.size(1) * sizeof(int64_t) == sizeof(Part),
              "expected rows without gaps and parts [M, 7]");
  TORCH_CHECK(x.scalar_type() == dtype && y.scalar_type() == dtype,
              "expected inputs and outputs in the leaves' dtype ", dtype, ", got ",
              x.scalar_type(), " and ", y.scalar_type());
  TORCH_CHECK(places.numel() == x.size(0), "expected routing for ", x.size(0),
              " tokens, got it for ", places.numel());
  const Part* part = reinterpret_cast<const Part*>(parts.const_data_ptr<int64_t>());
  with_products<FactoredVectors, FactoredTiles>(dtype, [&]<typename Value, typename Sides>() {
    factored_add<Value, Sides>(y, x, leaves, part, parts.size(0), places.const_data_ptr<int64_t>());
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrex, library) {
  library.def(
      "factored_add_(Tensor(a!) y, Tensor x, Tensor leaves, Tensor parts, Tensor places) -> ()",
      &factored_add_);
}
