// The CPU path of adapters whose sides are tensor products of a task's own leaves; the contract is
// in kernels/factored_layer.py, the twin in adapters/tensor_product.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

using namespace polyrex;
using at::Tensor;

// A side of a task's adapter that is never built: row k is first_k (x) second_k - shift_k, cut.
// Its leaves lie one after the other: first [p, R], second [q, R] or its transpose, shift [R].
struct Leaves {
  const float *first, *second, *shift;

  Leaves(const float* at, int64_t p, int64_t q, int64_t rank)
      : first(at), second(at + p * rank), shift(at + (p + q) * rank) {}
};

// h = first^T X second - shift sum(X) for one token, X = x laid out in rows of q; R is 16.
Floats factored_shrink(const float* x, int64_t length, int64_t q, const Leaves& side) {
  Floats hidden = {};
  for (int64_t begin = 0, i = 0; begin < length; begin += q, ++i) {
    const float* row = x + begin;
    const int64_t end = std::min(q, length - begin);
    Floats sums[4] = {};  // independent, so that one need not wait for another
    int64_t j = 0;
    for (; j + 4 <= end; j += 4)
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) sums[k] += row[j + k] * load(side.second + (j + k) * LANES);
    for (; j < end; ++j) sums[0] += row[j] * load(side.second + j * LANES);
    hidden += load(side.first + i * LANES) * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  Floats total = {};
  for (int64_t i = 0; i < length; i += LANES) total += load(x + i);  // zeros follow x
  float whole = 0;
  for (int64_t k = 0; k < LANES; ++k) whole += total[k];
  return hidden - load(side.shift) * whole;
}

// out = sum_k h_k (first_k (x) second_k - shift_k) for one token; second is [16, width].
// A row of out is written in whole vectors, over the beginning of the next, which comes after it.
void factored_expand(float* out, int64_t length, int64_t q, int64_t width, const Leaves& side,
                     Floats hidden) {
  const Floats shifts = hidden * load(side.shift);
  float level = 0;
  for (int64_t k = 0; k < LANES; ++k) level -= shifts[k];
  for (int64_t begin = 0, i = 0; begin < length; begin += q, ++i) {
    float weights[LANES];
    store(weights, hidden * load(side.first + i * LANES));
    for (int64_t j = 0; j < q; j += LANES) {
      Floats sums[4] = {Floats{} + level};
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; ++k)
        sums[k % 4] += weights[k] * load(side.second + k * width + j);
      store(out + begin + j, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }
}

// A row of `parts`: one module of a layer.
struct Part {
  int64_t start;         // where its leaves lie in a task's row
  int64_t column;        // where its outputs begin
  int64_t length;        // how many there are
  int64_t p, q;          // the sizes of the A side's leaves
  int64_t p_out, q_out;  // of the B side's
};

void factored_add_(Tensor& y, const Tensor& x, const Tensor& leaves, const Tensor& parts,
                   const Tensor& entries) {
  TORCH_CHECK(x.stride(1) == 1 && y.stride(1) == 1 && leaves.is_contiguous() &&
              parts.is_contiguous() && parts.size(1) * sizeof(int64_t) == sizeof(Part),
              "expected rows without gaps and parts [M, 7]");
  const Part* part = reinterpret_cast<const Part*>(parts.const_data_ptr<int64_t>());
  const int64_t modules = parts.size(0), size = leaves.size(1), d_in = x.size(1);
  int64_t most = 0;
  for (int64_t m = 0; m < modules; ++m) most = std::max(most, part[m].length + part[m].q_out);
  const int64_t* entry = entries.const_data_ptr<int64_t>();
  auto add = [&]<typename Value>() {
    at::parallel_for(0, x.size(0), 1, [&](int64_t from, int64_t to) {
      std::vector<float> in(d_in + LANES), out(most + LANES);
      for (int64_t t = from; t < to; ++t) {
        if (entry[t] < 0) continue;
        const Value* own = x.const_data_ptr<Value>() + t * x.stride(0);
        int64_t i = 0;
        for (; i + LANES <= d_in; i += LANES) store(in.data() + i, load(own + i));
        for (; i < d_in; ++i) in[i] = float(own[i]);
        for (int64_t m = 0; m < modules; ++m) {
          const auto [start, column, length, p, q, p_out, q_out] = part[m];
          const int64_t width = (q_out + LANES - 1) / LANES * LANES;
          const float* at = leaves.const_data_ptr<float>() + entry[t] * size + start;
          // Tasks' leaves lie far apart: ask for what the next token reads.
          if (t + 1 < to && entry[t + 1] >= 0)
            for (int64_t k = 0; k < (p + q + p_out + width + 2) * LANES; k += LANES)
              __builtin_prefetch(at + (entry[t + 1] - entry[t]) * size + k);
          const Leaves a(at, p, q, LANES), b(at + (p + q + 1) * LANES, p_out, width, LANES);
          const Floats hidden = factored_shrink(in.data(), d_in, q, a);
          factored_expand(out.data(), length, q_out, width, b, hidden);
          add_row(y.data_ptr<Value>() + t * y.stride(0) + column, out.data(), length);
        }
      }
    });
  };
  y.scalar_type() == at::kFloat ? add.operator()<float>() : add.operator()<BFloat16>();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrex, library) {
  library.def(
      "factored_add_(Tensor(a!) y, Tensor x, Tensor leaves, Tensor parts, Tensor entries) -> ()",
      &factored_add_);
}
