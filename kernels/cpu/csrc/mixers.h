// The matrices of a layer as the operators take them, and the routing between its two sides.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "scratch.h"
#include "simd.h"

namespace polyrex {

using at::Tensor;

// A row of `parts`: one matrix of a side, and its place in the layer.
struct Part {
  int64_t begin;   // where its inputs, or outputs, begin
  int64_t length;  // how many there are
  int64_t hidden;  // where its h begins in that of the layer
  int64_t offset;  // where its routing weights begin in a row; negative if it has none
  int64_t start;   // where it begins in the side's values
  int64_t panels, depth;
};

struct Parts {
  const Part* first;
  int64_t count;

  explicit Parts(const Tensor& parts) : count(parts.size(0)) {
    TORCH_CHECK(parts.is_contiguous() && parts.size(1) * sizeof(int64_t) == sizeof(Part),
                "expected parts [P, 7]");
    first = reinterpret_cast<const Part*>(parts.const_data_ptr<int64_t>());
  }
  const Part* begin() const { return first; }
  const Part* end() const { return first + count; }
  const Part& operator[](int64_t number) const { return first[number]; }
};

// A row of routing weights for each token, [D, M * W].
struct Routing {
  const float* weights;
  const int64_t* rows;
  int64_t tokens;
  int64_t size;

  Routing(const Tensor& weights, const Tensor& rows)
      : weights(weights.const_data_ptr<float>()),
        rows(rows.const_data_ptr<int64_t>()),
        tokens(rows.numel()),
        size(weights.numel() / std::max<int64_t>(weights.size(0), 1)) {
    TORCH_CHECK(weights.is_contiguous() && rows.is_contiguous(), "expected contiguous routing");
  }
  const float* of(int64_t token, int64_t offset) const {
    return weights + rows[token] * size + offset;
  }
  // Prefetches `count` weights: the rows of consecutive tokens are far apart in memory.
  void fetch(int64_t token, int64_t offset, int64_t count) const {
    for (int64_t k = 0; k < count; k += LANES) __builtin_prefetch(of(token, offset) + k);
  }
};

// A mixer turns a token's h_t, `reads` floats, into the input of a matrix of the B side,
// `part.depth` floats.

// w_te h_t, expert slowest. The A side is summed with the same weights.
struct MixExperts {
  Routing routing;
  int64_t experts;

  int64_t reads(const Part& part) const { return part.depth / experts; }
  void fetch(int64_t token, const Part& part) const {
    if (part.offset >= 0) routing.fetch(token, part.offset, experts);
  }
  void operator()(const float* h, int64_t token, const Part& part, int64_t, float* mixed) const {
    const int64_t rank = reads(part);
    for (int64_t e = 0; e < experts; ++e) {
      const float weight = part.offset < 0 ? 1.f : routing.of(token, part.offset)[e];
      for (int64_t k = 0; k < rank; k += LANES) store(mixed + e * rank + k, weight * load(h + k));
    }
  }
};

// mixed = G^T h, with G [inner, outer], padded with zeros to `depth`, a number of whole vectors.
inline void mix_pairs(const float* h, const float* g, int64_t inner, int64_t outer, float* mixed,
                      int64_t depth) {
  int64_t j = 0;
  for (; j + LANES <= outer; j += LANES) {
    Floats sums[2] = {};
    for (int64_t i = 0; i < inner; ++i) sums[i % 2] += h[i] * load(g + i * outer + j);
    store(mixed + j, sums[0] + sums[1]);
  }
  std::fill(mixed + j, mixed + depth, 0.f);
  for (int64_t i = 0; i < inner && j < outer; ++i)
    for (int64_t k = j; k < outer; ++k) mixed[k] += h[i] * g[i * outer + k];
}

// G_t^T h_t, where the token's weights are G_t [inner, outer].
struct MixPairs {
  Routing routing;
  int64_t inner, outer;
  static constexpr int64_t experts = 1;

  int64_t reads(const Part&) const { return rounded(inner, LANES); }
  void fetch(int64_t token, const Part& part) const {
    routing.fetch(token, part.offset, inner * outer);
  }
  void operator()(const float* h, int64_t token, const Part& part, int64_t, float* mixed) const {
    mix_pairs(h, routing.of(token, part.offset), inner, outer, mixed, part.depth);
  }
};

// The same with gates that the token itself chooses: the softmax of the logits that follow h_t,
// times `scales[0]` and the switch in front of the token's weights, plus `scales[1]` times those
// weights. If `outer` is 0, h_tk has gate k mod `gates`; otherwise every pair has its own gate.
struct MixByToken {
  Routing routing;
  int64_t inner, outer, gates, most;  // the `most` largest gates are kept
  const float* scales;                // [P, 2]
  static constexpr int64_t experts = 1;

  int64_t hidden() const { return rounded(inner, LANES); }
  int64_t reads(const Part&) const { return hidden() + rounded(gates, LANES); }
  void fetch(int64_t token, const Part& part) const {
    routing.fetch(token, part.offset, 1 + gates);
  }
  void operator()(const float* h, int64_t token, const Part& part, int64_t number,
                  float* mixed) const {
    const float* row = routing.of(token, part.offset);
    const float by_token = scales[2 * number] * row[0], by_task = scales[2 * number + 1];
    float* g = scratch<GATES, float>(std::max(part.depth, rounded(gates, LANES)));
    choose(h + hidden(), by_token, g);
    if (by_task)
      for (int64_t k = 0; k < gates; ++k) g[k] += by_task * row[1 + k];
    if (outer) return mix_pairs(h, g, inner, outer, mixed, part.depth);
    for (int64_t k = gates; k < part.depth; ++k) g[k] = g[k - gates];
    for (int64_t k = 0; k < part.depth; k += LANES) store(mixed + k, load(g + k) * load(h + k));
  }

  // g = scale * softmax(logits), 0 but for the `most` largest; among equals the first is kept.
  void choose(const float* logits, float scale, float* g) const {
    const int64_t size = rounded(gates, LANES);
    float* powers = scratch<POWERS, float>(size);
    std::copy_n(logits, gates, powers);
    std::fill(powers + gates, powers + size, -INFINITY);
    Floats highest = load(powers);
    for (int64_t k = LANES; k < size; k += LANES) {
      const Floats other = load(powers + k);
      highest = other > highest ? other : highest;
    }
    const float shift = largest(highest);
    Floats sums = {};
    for (int64_t k = 0; k < size; k += LANES) {
      const Floats power = exp_of(load(powers + k) - shift);
      sums += power;
      store(powers + k, power);
    }
    const float factor = scale / sum(sums);
    for (int64_t k = 0; k < size; k += LANES) {
      const Floats own = load(powers + k);
      Integers before = {};  // how many gates are larger
      if (most < gates)
        for (int32_t j = 0; j < gates; ++j)
          before -= (powers[j] > own) | ((powers[j] == own) & (NUMBERS + int32_t(k) > j));
      store(g + k, before < int32_t(most) ? own * factor : Floats{});
    }
  }
};

}  // namespace polyrex
