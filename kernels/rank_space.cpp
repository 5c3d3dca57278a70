// The CPU path of the routed low-rank product; the contract of each operator is in
// kernels/rank_space_layer.py, the twin in kernels/rank_space.py.
//
// Matrices [depth, columns] are packed in panels of 16 columns: [panels, depth, 16] in float32,
// [panels, depth / 2, 16, 2] in bfloat16, which is what AMX tiles and bf16 dot products read. An
// expert's rank is padded to whole panels, so that its part of a matrix is contiguous.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "vectors.h"

namespace {

using namespace polyrex;
using at::Tensor;

// Tokens, and panels, of one piece of work: what it reads again and again stays in the L2 cache.
constexpr int64_t CHUNK = 256, MOST_PANELS = 32;

// x [T, n] in the dtype that a block reads, each row padded with zeros to `depth`.
template <typename Input>
Tensor rows_of(const Tensor& x, int64_t depth) {
  const auto dtype = c10::CppTypeToScalarType<Input>::value;
  Tensor rows = x.to(dtype);
  if (rows.stride(1) == 1 && x.size(1) == depth) return rows;
  Tensor padded = at::zeros({x.size(0), depth}, x.options().dtype(dtype));
  padded.narrow(1, 0, x.size(1)).copy_(rows);
  return padded;
}

// A row of routing weights for each token: weights[rows[t], offset + e]; 1 where offset is below 0.
struct Routing {
  const float* weights;
  const int64_t* rows;
  int64_t width;

  Routing(const Tensor& weights, const Tensor& rows)
      : weights(weights.const_data_ptr<float>()),
        rows(rows.const_data_ptr<int64_t>()),
        width(weights.numel() / std::max<int64_t>(weights.size(0), 1)) {
    TORCH_CHECK(weights.is_contiguous() && rows.is_contiguous(), "expected contiguous routing");
  }
  float operator()(int64_t token, int64_t offset, int64_t expert) const {
    return offset < 0 ? 1.f : weights[rows[token] * width + offset + expert];
  }
};

struct Part {
  int64_t begin;   // where its inputs, or outputs, begin
  int64_t length;  // how many there are
  int64_t hidden;  // which h it belongs to
  int64_t offset;  // where its routing weights begin in a row
};

const Part* parts_of(const Tensor& parts) {
  TORCH_CHECK(parts.is_contiguous() && parts.size(1) == 4, "expected parts [P, 4]");
  return reinterpret_cast<const Part*>(parts.const_data_ptr<int64_t>());
}

// One panel pair of one part of a shrink; pieces that share an h add up in `scratch`.
struct Piece {
  int64_t part, panel, panels, expert, hidden_panel;
};

Tensor shrink(const Tensor& x, at::TensorList a, const Tensor& parts, int64_t hiddens,
              int64_t experts, const Tensor& weights, const Tensor& rows) {
  const int64_t tokens = x.size(0), panels = a[0].size(0) / experts;  // panels of one expert
  const Part* part = parts_of(parts);
  const Routing routing(weights, rows);
  Tensor h = at::zeros({tokens, hiddens, panels * LANES}, x.options().dtype(at::kFloat));
  // Two experts at a time where each is one panel, else panel by panel.
  std::vector<Piece> pieces;
  for (int64_t p = 0; p < static_cast<int64_t>(a.size()); ++p)
    for (int64_t rank = 0; rank < panels; ++rank)
      for (int64_t e = 0; e < experts; e += panels == 1 ? 2 : 1)
        pieces.push_back({p, e * panels + rank, panels == 1 ? std::min<int64_t>(2, experts - e) : 1,
                          e, part[p].hidden * panels + rank});
  const int64_t count = pieces.size(), chunks = (tokens + CHUNK - 1) / CHUNK;
  Tensor scratch = at::empty({count, tokens, LANES}, h.options());
  float* sums = scratch.data_ptr<float>();
  with_block(a[0].scalar_type(), [&]<typename Block, typename Weight>() {
    using Input = typename Block::Input;
    std::vector<Tensor> inputs;
    for (size_t p = 0; p < a.size(); ++p) {
      const int64_t depth = a[p].numel() / (a[p].size(0) * LANES);
      const bool again = p && part[p].begin == part[p - 1].begin && part[p].length == part[p - 1].length;
      inputs.push_back(again ? inputs.back()
                             : rows_of<Input>(x.narrow(1, part[p].begin, part[p].length), depth));
    }
    at::parallel_for(0, chunks * count, 1, [&](int64_t from, int64_t to) {
      alignas(64) float out[Block::ROWS * 2 * LANES];
      for (int64_t item = from; item < to; ++item) {
        const Piece& piece = pieces[item % count];
        const Tensor& packed = a[piece.part];
        const Tensor& input = inputs[piece.part];
        const int64_t size = packed.numel() / packed.size(0), depth = size / LANES;
        const Weight* w = packed.const_data_ptr<Weight>() + piece.panel * size;
        const int64_t first = item / count * CHUNK, last = std::min(tokens, first + CHUNK);
        const int64_t offset = part[piece.part].offset;
        Block block(depth);
        for (int64_t t = first; t < last; t += Block::ROWS) {
          const int64_t n = std::min<int64_t>(Block::ROWS, last - t);
          block(input.const_data_ptr<Input>() + t * input.stride(0), input.stride(0), n, w, size,
                piece.panels, depth, out);
          for (int64_t i = 0; i < n; ++i) {
            const float* found = out + i * piece.panels * LANES;
            Floats sum = routing(t + i, offset, piece.expert) * load(found);
            if (piece.panels == 2)
              sum += routing(t + i, offset, piece.expert + 1) * load(found + LANES);
            store(sums + ((item % count) * tokens + t + i) * LANES, sum);
          }
        }
      }
    });
  });
  float* hidden = h.data_ptr<float>();
  for (int64_t i = 0; i < count; ++i)
    for (int64_t t = 0; t < tokens; ++t) {
      float* at = hidden + (t * hiddens * panels + pieces[i].hidden_panel) * LANES;
      store(at, load(at) + load(sums + (i * tokens + t) * LANES));
    }
  return h;
}

// For each token, what the part's matrix is applied to: w_te h, expert slowest.
template <typename Input>
Tensor spread(const Tensor& h, const Part& part, int64_t experts, int64_t depth,
              const Routing& routing) {
  const int64_t tokens = h.size(0), rank = h.size(2);
  Tensor result = at::empty({tokens, depth},
                            h.options().dtype(c10::CppTypeToScalarType<Input>::value));
  Input* at = result.template data_ptr<Input>();
  const float* hidden = h.const_data_ptr<float>() + part.hidden * rank;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t e = 0; e < experts; ++e) {
      const float weight = routing(t, part.offset, e);
      for (int64_t k = 0; k < rank; k += LANES)
        store(at + t * depth + e * rank + k, weight * load(hidden + t * h.stride(0) + k));
    }
  return result;
}

// One piece of work of an expand: panels of one part.
struct Columns {
  size_t part;
  int64_t begin, end;
};

void expand_(Tensor& y, const Tensor& h, at::TensorList b, const Tensor& parts, int64_t experts,
             const Tensor& weights, const Tensor& rows) {
  const int64_t tokens = h.size(0), chunks = (tokens + CHUNK - 1) / CHUNK;
  TORCH_CHECK(y.stride(1) == 1 && y.scalar_type() == b[0].scalar_type(),
              "expected outputs in the weights' dtype, got ", y.scalar_type());
  const Part* part = parts_of(parts);
  const Routing routing(weights, rows);
  with_block(b[0].scalar_type(), [&]<typename Block, typename Weight>() {
    using Input = typename Block::Input;
    std::vector<Tensor> inputs;
    int64_t panels = 0;
    for (size_t p = 0; p < b.size(); ++p) {
      const int64_t depth = b[p].numel() / (b[p].size(0) * LANES);
      inputs.push_back(spread<Input>(h, part[p], experts, depth, routing));
      panels += b[p].size(0);
    }
    // Columns of one piece of work: as many as stay in the cache, and as much for every thread.
    const int64_t threads = at::get_num_threads();
    const int64_t turns = (panels + threads * MOST_PANELS - 1) / (threads * MOST_PANELS);
    const int64_t pairs = (panels + 2 * threads * turns - 1) / (2 * threads * turns);
    const int64_t group = 2 * pairs;
    std::vector<Columns> pieces;
    for (size_t p = 0; p < b.size(); ++p)
      for (int64_t first = 0; first < b[p].size(0); first += group)
        pieces.push_back({p, first, std::min(first + group, b[p].size(0))});
    const int64_t count = pieces.size();
    at::parallel_for(0, chunks * count, 1, [&](int64_t from, int64_t to) {
      alignas(64) float out[Block::ROWS * 2 * LANES];
      for (int64_t item = from; item < to; ++item) {
        const auto [p, begin, end] = pieces[item % count];
        const int64_t size = b[p].numel() / b[p].size(0), depth = size / LANES;
        const Weight* w = b[p].const_data_ptr<Weight>();
        const Input* x = inputs[p].const_data_ptr<Input>();
        Weight* to_y = y.data_ptr<Weight>() + part[p].begin;
        const int64_t first = item / count * CHUNK, last = std::min(tokens, first + CHUNK);
        Block block(depth);
        for (int64_t t = first; t < last; t += Block::ROWS)
          for (int64_t panel = begin; panel < end; panel += 2) {
            const int64_t n = std::min<int64_t>(Block::ROWS, last - t);
            const int64_t wide = std::min<int64_t>(2, end - panel);
            block(x + t * depth, depth, n, w + panel * size, size, wide, depth, out);
            const int64_t width = std::min(wide * LANES, part[p].length - panel * LANES);
            for (int64_t i = 0; i < n; ++i)
              add_row(to_y + (t + i) * y.stride(0) + panel * LANES, out + i * wide * LANES, width);
          }
      }
    });
  });
}

void add_(Tensor& y, const Tensor& x, at::TensorList a, const Tensor& a_parts, at::TensorList b,
          const Tensor& b_parts, int64_t hiddens, int64_t experts, const Tensor& weights,
          const Tensor& rows) {
  const Tensor h = shrink(x, a, a_parts, hiddens, experts, weights, rows);
  expand_(y, h, b, b_parts, experts, weights, rows);
}

// [groups, experts, size] -> [groups, size]: the sum over experts, weighted.
Tensor compose(const Tensor& packed, const Tensor& weights) {
  const int64_t groups = packed.size(0), experts = packed.size(1), size = packed.size(2);
  const float* weight = weights.const_data_ptr<float>();
  Tensor result = at::empty({groups, size}, packed.options());
  auto sum = [&]<typename Value>() {
    const Value* from = packed.const_data_ptr<Value>();
    Value* to = result.data_ptr<Value>();
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        for (int64_t i = 0; i < size; i += LANES) {
          Floats total = {};
          for (int64_t e = 0; e < experts; ++e)
            total += weight[e] * load(from + (g * experts + e) * size + i);
          store(to + g * size + i, total);
        }
    });
  };
  packed.scalar_type() == at::kFloat ? sum.operator()<float>() : sum.operator()<BFloat16>();
  return result;
}

// h [T, n, I] -> [T, n, J]: hidden i gives pairs[i, j] of itself to j, pairs of each token and part.
Tensor mix_pairs(const Tensor& h, const Tensor& offsets, int64_t inner, int64_t outer,
                 const Tensor& weights, const Tensor& rows) {
  const int64_t tokens = h.size(0), parts = h.size(1), width = h.size(2);
  const int64_t padded = (outer + LANES - 1) / LANES * LANES;
  const Routing routing(weights, rows);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  Tensor mixed = at::zeros({tokens, parts, padded}, h.options());
  const float* from = h.const_data_ptr<float>();
  float* to = mixed.data_ptr<float>();
  for (int64_t i = 0; i < tokens * parts; ++i)
    for (int64_t k = 0; k < inner; ++k) {
      const float* row =
          routing.weights + rows.const_data_ptr<int64_t>()[i / parts] * routing.width;
      const float* pairs = row + offset[i % parts] + k * outer;
      for (int64_t j = 0; j < outer; ++j) to[i * padded + j] += from[i * width + k] * pairs[j];
    }
  return mixed;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrex, library) {
  library.def(
      "shrink(Tensor x, Tensor[] a, Tensor parts, int hiddens, int experts, Tensor weights, "
      "Tensor rows) -> Tensor",
      &shrink);
  library.def(
      "expand_(Tensor(a!) y, Tensor h, Tensor[] b, Tensor parts, int experts, Tensor weights, "
      "Tensor rows) -> ()",
      &expand_);
  library.def(
      "add_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor a_parts, Tensor[] b, Tensor b_parts, "
      "int hiddens, int experts, Tensor weights, Tensor rows) -> ()",
      &add_);
  library.def("compose(Tensor packed, Tensor weights) -> Tensor", &compose);
  library.def(
      "mix_pairs(Tensor h, Tensor offsets, int inner, int outer, Tensor weights, Tensor rows) "
      "-> Tensor",
      &mix_pairs);
}
