// The CPU path of adapters that are sums of Kronecker products. kernels/kronecker.py documents the
// operator; its twin is adapters/methods/tensorpoly_x.py.

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

// A row of `parts`: one module of a layer, `sum_e first_e (x) second_e`.
struct Part {
  int64_t start;   // where its factors begin in a task's row
  int64_t column;  // where its outputs begin
  int64_t length;  // how many there are
  int64_t bonds;   // how many terms the sum has
  int64_t p, p_out, q, q_out;

  // The columns of one term in `between`, and of all terms; then those of X and of second, padded
  // to whole vectors.
  int64_t each() const { return rounded(q, 2); }
  int64_t depth() const { return rounded(bonds * each(), 32); }
  int64_t width() const { return rounded(q, LANES); }
  int64_t width_out() const { return rounded(q_out, LANES); }
};

// A task's factors: first [p_out * bonds, p], then second [depth, width_out].
template <typename Value>
struct Factors {
  const Value *first, *second, *end;

  Factors(const Value* at, const Part& part)
      : first(at), second(at + rounded(part.p_out * part.bonds, 16) * rounded(part.p, 32)),
        end(second + part.depth() * part.width_out()) {}
};

// out [rows, columns] = a [rows, depth] w [depth, columns], with a depth that is a multiple of 32.
// The rows of a bfloat16 w are interleaved in pairs. A row of out is written in whole vectors, past
// its end: the next row is written later.
template <typename Value>
struct VectorProduct {
  void operator()(const Value* a, int64_t rows, int64_t depth, const Value* w, int64_t columns,
                  float* out, int64_t out_row) const {
    constexpr int64_t STEP = ROWS_TOGETHER<Value>;
    const int64_t width = rounded(columns, LANES);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < width; column += LANES) {
        Floats sums[4] = {};
        for (int64_t k = 0; k < depth; k += 4 * STEP)
#pragma GCC unroll 4
          for (int64_t s = 0; s < 4; ++s)
            sums[s] = dot(sums[s], w + (k + s * STEP) * width + column * STEP,
                          a + row * depth + k + s * STEP);
        store(out + row * out_row + column, (sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
  }
};

struct TileProduct;

#ifdef __AMX_BF16__
// The same in tiles, which the rows of one token fill. a is read 16 rows at a time.
struct TileProduct : Tiles {
  TileProduct() {
    configure({.bytes = {64, 64, 64, 64, 64, 64, 64, 64},
               .rows = {16, 16, 16, 16, 16, 16, 16, 16}});
  }

  void operator()(const BFloat16* a, int64_t rows, int64_t depth, const BFloat16* w,
                  int64_t columns, float* out, int64_t out_row) const {
    const int64_t width = rounded(columns, LANES);
    for (int64_t row = 0; row < rows; row += 32)
      for (int64_t column = (width - 1) / 32 * 32; column >= 0; column -= 32) {
        const bool lower = row + 16 < rows, right = column + 16 < width;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < depth; k += 32) {
          const BFloat16 *upper = a + row * depth + k, *left = w + k * width + column * 2;
          _tile_loadd(4, upper, depth * 2);
          _tile_loadd(6, left, width * 4);
          _tile_dpbf16ps(0, 4, 6);
          if (right) {
            _tile_loadd(7, left + 32, width * 4);
            _tile_dpbf16ps(1, 4, 7);
          }
          if (lower) {
            _tile_loadd(5, upper + 16 * depth, depth * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (right) _tile_dpbf16ps(3, 5, 7);
          }
        }
        float* to = out + row * out_row + column;
        if (right) {
          _tile_stored(1, to + LANES, out_row * 4);
          if (lower) _tile_stored(3, to + 16 * out_row + LANES, out_row * 4);
        }
        _tile_stored(0, to, out_row * 4);
        if (lower) _tile_stored(2, to + 16 * out_row, out_row * 4);
      }
  }
};
#endif

// Writes X = x in rows of q as the right side of a product; x is followed by zeros.
void lay_out(const float* x, const Part& part, float* to) {
  for (int64_t row = 0; row < rounded(part.p, 32); ++row)
    copy_row(to + row * part.width(), part.width(), x + row * part.q, row < part.p ? part.q : 0);
}

void lay_out(const BFloat16* x, const Part& part, BFloat16* to) {
  for (int64_t row = 0; row < rounded(part.p, 32); row += 2) {
    const BFloat16 *first = x + row * part.q, *second = first + part.q;
    for (int64_t k = 0; k < part.width(); k += LANES)
      store_in_twos(to + row * part.width() + k * 2, load(first + k), load(second + k));
  }
}

// y_t += (sum_e first_e (x) second_e)^T x_t for every module.
template <typename Value, typename Product>
class KroneckerAdd {
 public:
  KroneckerAdd(Tensor& y, const Tensor& x, const Tensor& states, const Tensor& parts,
               const int64_t* place)
      : y(y.data_ptr<Value>()), y_stride(y.stride(0)), x(x.const_data_ptr<Value>()),
        x_stride(x.stride(0)), tokens(x.size(0)), d_in(x.size(1)),
        states(states.const_data_ptr<Value>()), size(states.size(1)),
        parts(reinterpret_cast<const Part*>(parts.const_data_ptr<int64_t>())),
        modules(parts.size(0)), place(place) {
    for (int64_t m = 0; m < modules; ++m) {
      const Part& part = this->parts[m];
      TORCH_CHECK(part.p == this->parts[0].p && part.q == this->parts[0].q,
                  "expected modules that read their input in the same rows");
      most_in = std::max(most_in, rounded(part.p, 32) * part.q + part.width());
      most_grid = std::max(most_grid, rounded(part.p, 32) * part.width());
      most_sums = std::max(most_sums, 32 * part.width());
      most_between = std::max(most_between, rounded(part.p_out, 16) * part.depth() + LANES);
      most_out = std::max(most_out, rounded(part.p_out, 16) * part.q_out + LANES);
    }
  }

  void run() {
    at::parallel_for(0, tokens, 1, [&](int64_t from, int64_t to) {
      const Product product;
      Value* grids = scratch<GRID, Value>(TOGETHER * most_grid);
      Value* between = scratch<HIDDEN, Value>(TOGETHER * most_between);
      for (int64_t begin = from; begin < to; begin += TOGETHER) {
        const int64_t end = std::min(begin + TOGETHER, to);
        for (int64_t m = 0; m < modules; ++m) {
          for (int64_t t = begin; t < end; ++t) {
            if (place[t] < 0) continue;
            Value* grid = grids + (t - begin) * most_grid;
            if (m == 0) read(t, grid);
            contract(product, t, parts[m], grid, between + (t - begin) * most_between);
          }
          for (int64_t t = begin; t < end; ++t)
            if (place[t] >= 0) expand(product, t, parts[m], between + (t - begin) * most_between);
          // The factors of tasks are far apart: prefetch those of the next tokens.
          for (int64_t t = begin; t < end && t + TOGETHER < to; ++t) fetch(t, parts[m]);
        }
      }
    });
  }

 private:
  // Few enough tokens that the second product finds the results of the first in the cache.
  static constexpr int64_t TOGETHER = 4;

  Factors<Value> factors(int64_t token, const Part& part) const {
    return Factors<Value>(states + place[token] * size + part.start, part);
  }

  // Writes X, which all modules of a layer share: p and q follow from the size of the input.
  void read(int64_t token, Value* grid) const {
    Value* in = scratch<INPUTS, Value>(most_in);
    copy_row(in, most_in, x + token * x_stride, d_in);
    lay_out(in, parts[0], grid);
  }

  // between_je = first_je X, in the dtype of the model.
  void contract(const Product& product, int64_t token, const Part& part, const Value* grid,
                Value* between) const {
    const Value* first = factors(token, part).first;
    const int64_t rows = part.p_out * part.bonds, depth = rounded(part.p, 32);
    const int64_t width = part.width(), gap = part.depth() - part.bonds * part.each();
    if (gap) std::fill_n(between, part.p_out * part.depth(), Value(0));
    float* sums = scratch<MIXED, float>(most_sums);
    Value* to = between;
    for (int64_t row = 0, term = 0; row < rows; row += 32) {
      const int64_t here = std::min<int64_t>(32, rows - row);
      product(first + row * depth, here, depth, grid, part.q, sums, width);
      for (int64_t i = 0; i < here; ++i) {
        for (int64_t k = 0; k < width; k += LANES) copy(to + k, sums + i * width + k);
        to += part.each();
        if (++term == part.bonds) to += gap, term = 0;
      }
    }
  }

  void expand(const Product& product, int64_t token, const Part& part, const Value* between) const {
    float* out = scratch<OUTPUTS, float>(most_out);
    const Value* second = factors(token, part).second;
    product(between, part.p_out, part.depth(), second, part.q_out, out, part.q_out);
    add_row(y + token * y_stride + part.column, out, part.length);
  }

  void fetch(int64_t token, const Part& part) const {
    const int64_t next = token + TOGETHER;
    if (place[next] < 0 || place[next] == place[token]) return;
    const Factors<Value> own = factors(next, part);
    for (const Value* at = own.first; at < own.end; at += 64 / sizeof(Value))
      __builtin_prefetch(at);
  }

  Value* const y;
  const int64_t y_stride;
  const Value* const x;
  const int64_t x_stride, tokens, d_in;
  const Value* const states;
  const int64_t size;
  const Part* const parts;
  const int64_t modules;
  const int64_t* const place;
  int64_t most_in = 0, most_grid = 0, most_sums = 0, most_between = 0, most_out = 0;
};

void kronecker_add_(Tensor& y, const Tensor& x, const Tensor& states, const Tensor& parts,
                    const Tensor& places) {
  const auto dtype = states.scalar_type();
  TORCH_CHECK(x.stride(1) == 1 && y.stride(1) == 1 && states.is_contiguous() &&
              parts.is_contiguous() && parts.size(1) * sizeof(int64_t) == sizeof(Part),
              "expected rows without gaps and parts [M, 8]");
  TORCH_CHECK(x.scalar_type() == dtype && y.scalar_type() == dtype,
              "expected inputs and outputs in the factors' dtype ", dtype, ", got ",
              x.scalar_type(), " and ", y.scalar_type());
  TORCH_CHECK(places.numel() == x.size(0), "expected routing for ", x.size(0),
              " tokens, got it for ", places.numel());
  with_products<VectorProduct, TileProduct>(dtype, [&]<typename Value, typename Product>() {
    KroneckerAdd<Value, Product>(y, x, states, parts, places.const_data_ptr<int64_t>()).run();
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrex, library) {
  library.def(
      "kronecker_add_(Tensor(a!) y, Tensor x, Tensor states, Tensor parts, Tensor places) -> ()",
      &kronecker_add_);
}
