// The CPU path of the routed low-rank product; the contract of each operator is in
// kernels/rank_space_layer.py, the twin in kernels/rank_space.py.
//
// Matrices [depth, columns] are packed in panels of 16 columns: [panels, depth, 16] in float32,
// [panels, depth / 2, 16, 2] in bfloat16, which is what AMX tiles and bf16 dot products read. An
// expert's rank is padded to whole panels, so that its part of a matrix is contiguous.
//
// All of a layer is one parallel region. Few tokens: threads share the panels of both sides, and
// wait for each other once, between them. Many tokens: each thread takes some of them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "vectors.h"

namespace {

using namespace polyrex;
using at::Tensor;

// From so many tokens a thread is better off with tokens of its own.
constexpr int64_t OWN_TOKENS = 128;
// So many values of the B side meet all tokens before the next do: they stay in the L2 cache.
constexpr int64_t CACHED_VALUES = 256 << 10;

// A row of `parts`: one matrix of a side, and what it is for.
struct Part {
  int64_t begin;   // where its inputs, or outputs, begin
  int64_t length;  // how many there are
  int64_t hidden;  // which h it belongs to
  int64_t offset;  // where its routing weights begin in a row; below 0: it has none
  int64_t start;   // where it lies in the side's values
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

// Some consecutive panels of one part.
struct Piece {
  int64_t part, panel, panels;
};

// Room for `size` inputs of the calling thread, kept for its next call.
template <typename Input>
Input* room(int64_t size) {
  static thread_local std::vector<Input> kept;
  if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
  return kept.data();
}

// Where a thread's share of `count` things begins, and with `member + 1` ends.
int64_t share(int64_t count, int64_t member, int64_t members) { return count * member / members; }

template <typename Block, typename Weight>
class AddToRows {
 public:
  using Input = typename Block::Input;

  AddToRows(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts, const Tensor& b,
            const Tensor& b_parts, int64_t hiddens, int64_t experts, int64_t inner, int64_t outer,
            const Tensor& weights, const Tensor& rows)
      : y(y.data_ptr<Weight>()), y_stride(y.stride(0)), x(x.const_data_ptr<Weight>()),
        x_stride(x.stride(0)), tokens(x.size(0)), experts(experts),
        inner(inner), outer(outer), weights(weights.const_data_ptr<float>()),
        rows(rows.const_data_ptr<int64_t>()),
        row_size(weights.numel() / std::max<int64_t>(weights.size(0), 1)),
        a(a.const_data_ptr<Weight>()), b(b.const_data_ptr<Weight>()), a_parts(a_parts),
        b_parts(b_parts), expert_panels(this->a_parts[0].panels / experts),
        rank(expert_panels * LANES), hidden_size(hiddens * rank),
        // Two experts at a time where each is one panel, else panel by panel.
        a_pieces(pieces(this->a_parts, expert_panels == 1 ? 2 : 1)),
        b_pieces(pieces(this->b_parts, 2)) {}

  void run() {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t most = std::min<int64_t>(threads, a_pieces.size());
    const Tensor scratch = at::empty({most * tokens * hidden_size}, at::kFloat);
    hidden = scratch.data_ptr<float>();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int64_t there = omp_get_num_threads(), thread = omp_get_thread_num();
      const int64_t groups = std::clamp<int64_t>(tokens / OWN_TOKENS, 1, there);
      const int64_t members = there / groups, group = thread / members, member = thread % members;
      const int64_t blocks = (tokens + Block::ROWS - 1) / Block::ROWS;
      const int64_t begin = share(blocks, group, groups) * Block::ROWS;
      const int64_t end = std::min(share(blocks, group + 1, groups) * Block::ROWS, tokens);
      const int64_t sums = std::min<int64_t>(members, a_pieces.size());
      if (group < groups && member < sums) shrink(begin, end, member, sums);
#pragma omp barrier
      if (group < groups) expand(begin, end, member, members, sums);
    }
  }

 private:
  static std::vector<Piece> pieces(const Parts& parts, int64_t most) {
    std::vector<Piece> found;
    for (int64_t p = 0; p < parts.count; ++p)
      for (int64_t panel = 0; panel < parts[p].panels; panel += most)
        found.push_back({p, panel, std::min(most, parts[p].panels - panel)});
    return found;
  }
  static const Weight* panel(const Weight* side, const Part& part, int64_t number) {
    return side + part.start + number * part.depth * LANES;
  }
  float weight(int64_t token, int64_t offset, int64_t expert) const {
    return offset < 0 ? 1.f : weights[rows[token] * row_size + offset + expert];
  }
  float* hidden_of(int64_t member, int64_t token) const {
    return hidden + (member * tokens + token) * hidden_size;
  }

  // h_t = sum_e w_te (A_e x_t), this member's part of the sum.
  void shrink(int64_t begin, int64_t end, int64_t member, int64_t members) {
    const int64_t first = share(a_pieces.size(), member, members);
    const int64_t last = share(a_pieces.size(), member + 1, members);
    std::fill(hidden_of(member, begin), hidden_of(member, end), 0.f);
    Input* packed = nullptr;
    alignas(64) float out[Block::ROWS * 2 * LANES];
    for (int64_t t = begin; t < end; t += Block::ROWS) {
      const int64_t n = std::min<int64_t>(Block::ROWS, end - t);
      const Part* before = nullptr;
      for (int64_t p = first; p < last;) {
        const Part& part = a_parts[a_pieces[p].part];
        Block block(part.depth);
        if (!before || before->begin != part.begin || before->length != part.length)
          packed = pack(block, t, n, part);
        before = &part;
        for (; p < last && &a_parts[a_pieces[p].part] == &part; ++p) {
          const Piece& piece = a_pieces[p];
          const Piece& next = a_pieces[p + 1 < last ? p + 1 : first];
          block(packed, n, panel(a, part, piece.panel), piece.panels,
                panel(a, a_parts[next.part], next.panel), out);
          gather(part, piece, t, n, member, out);
        }
      }
    }
  }

  Input* pack(const Block& block, int64_t first, int64_t n, const Part& part) const {
    Input* packed = room<Input>(n * part.depth);
    for (int64_t i = 0; i < n; ++i) {
      const Weight* from = x + (first + i) * x_stride + part.begin;
      int64_t k = 0;
      for (; k + LANES <= part.length; k += LANES)
        copy(block.at(packed, n, i, k), from + k);
      if (k < part.depth) {
        Input* to = block.at(packed, n, i, k);
        for (int64_t j = 0; j < LANES; ++j) to[j] = k + j < part.length ? Input(from[k + j]) : Input(0);
      }
    }
    return packed;
  }

  void gather(const Part& part, const Piece& piece, int64_t first, int64_t n,
              int64_t member, const float* out) const {
    const int64_t expert = piece.panel / expert_panels;
    const int64_t column = part.hidden * rank + piece.panel % expert_panels * LANES;
    for (int64_t i = 0; i < n; ++i) {
      float* to = hidden_of(member, first + i) + column;
      Floats sum = load(to);
      for (int64_t p = 0; p < piece.panels; ++p)
        sum += weight(first + i, part.offset, expert + p) *
               load(out + (i * piece.panels + p) * LANES);
      store(to, sum);
    }
  }

  // y_t += sum_e w_te (B_e h_t), or B G_t^T h_t, this member's columns.
  void expand(int64_t begin, int64_t end, int64_t member, int64_t members, int64_t sums) {
    const int64_t last = share(b_pieces.size(), member + 1, members);
    alignas(64) float out[Block::ROWS * 2 * LANES];
    for (int64_t first = share(b_pieces.size(), member, members), until; first < last; first = until) {
      const Part& part = b_parts[b_pieces[first].part];
      const int64_t most = std::max<int64_t>(1, CACHED_VALUES / (2 * LANES * part.depth));
      for (until = first; until < std::min(last, first + most); ++until)
        if (&b_parts[b_pieces[until].part] != &part) break;
      Block block(part.depth);
      for (int64_t t = begin; t < end; t += Block::ROWS) {
        const int64_t n = std::min<int64_t>(Block::ROWS, end - t);
        const Input* packed = spread(block, t, n, part, sums);
        for (int64_t p = first; p < until; ++p) {
          const Piece& piece = b_pieces[p];
          const Piece& next = b_pieces[p + 1 < last ? p + 1 : first];
          block(packed, n, panel(b, part, piece.panel), piece.panels,
                panel(b, b_parts[next.part], next.panel), out);
          const int64_t column = piece.panel * LANES;
          const int64_t width = std::min(piece.panels * LANES, part.length - column);
          for (int64_t i = 0; i < n; ++i)
            add_row(y + (t + i) * y_stride + part.begin + column, out + i * piece.panels * LANES,
                    width);
        }
      }
    }
  }

  // What a matrix of the B side is applied to: w_te h_t for every expert, or G_t^T h_t.
  const Input* spread(const Block& block, int64_t first, int64_t n, const Part& part,
                      int64_t sums) const {
    Input* packed = room<Input>(n * part.depth);
    std::vector<float> h(rank), mixed(part.depth);
    for (int64_t i = 0; i < n; ++i) {
      std::fill(h.begin(), h.end(), 0.f);
      for (int64_t member = 0; member < sums; ++member)
        for (int64_t k = 0; k < rank; k += LANES)
          store(&h[k], load(&h[k]) + load(hidden_of(member, first + i) + part.hidden * rank + k));
      if (inner) {
        std::fill(mixed.begin(), mixed.end(), 0.f);
        const float* g = weights + rows[first + i] * row_size + part.offset;
        for (int64_t k = 0; k < inner; ++k)
          for (int64_t j = 0; j < outer; ++j) mixed[j] += h[k] * g[k * outer + j];
      } else {
        for (int64_t e = 0; e < experts; ++e)
          for (int64_t k = 0; k < rank; k += LANES)
            store(&mixed[e * rank + k], weight(first + i, part.offset, e) * load(&h[k]));
      }
      for (int64_t k = 0; k < part.depth; k += LANES)
        store(block.at(packed, n, i, k), load(&mixed[k]));
    }
    return packed;
  }

  Weight* const y;
  const int64_t y_stride;
  const Weight* const x;
  const int64_t x_stride, tokens, experts, inner, outer;
  const float* const weights;
  const int64_t* const rows;
  const int64_t row_size;
  const Weight *const a, *const b;
  const Parts a_parts, b_parts;
  const int64_t expert_panels, rank, hidden_size;
  const std::vector<Piece> a_pieces, b_pieces;
  float* hidden = nullptr;
};

void add_(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts, const Tensor& b,
          const Tensor& b_parts, int64_t hiddens, int64_t experts, int64_t inner, int64_t outer,
          const Tensor& weights, const Tensor& rows) {
  const auto dtype = a.scalar_type();
  TORCH_CHECK(y.scalar_type() == dtype && x.scalar_type() == dtype,
              "expected inputs and outputs in the weights' dtype ", dtype, ", got ",
              x.scalar_type(), " and ", y.scalar_type());
  TORCH_CHECK(y.stride(1) == 1 && x.stride(1) == 1, "expected rows without gaps");
  TORCH_CHECK(weights.is_contiguous() && rows.is_contiguous(), "expected contiguous routing");
  if (x.size(0) == 0) return;
  with_block(dtype, [&]<typename Block, typename Weight>() {
    AddToRows<Block, Weight>(y, x, a, a_parts, b, b_parts, hiddens, experts, inner, outer, weights,
                             rows)
        .run();
  });
}

// A side's values, every matrix the weighted sum of its experts: [groups, experts, size] -> [groups,
// size]. On the A side an expert is whole panels, on the B side a stretch of every panel.
Tensor compose(const Tensor& side, const Tensor& parts, int64_t experts, bool in_panels,
               const Tensor& weights) {
  TORCH_CHECK(weights.is_contiguous(), "expected contiguous routing");
  Tensor result = at::empty({side.numel() / experts}, side.options());
  auto sum = [&]<typename Value>() {
    for (const Part& part : Parts(parts)) {
      const float* weight = weights.const_data_ptr<float>() + part.offset;
      const Value* from = side.const_data_ptr<Value>() + part.start;
      Value* to = result.data_ptr<Value>() + part.start / experts;
      const int64_t vectors = part.panels * part.depth / experts;
      const int64_t group = in_panels ? vectors / part.panels : vectors;
      at::parallel_for(0, vectors, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i / group * experts * group + i % group;
          Floats total = {};
          for (int64_t e = 0; e < experts; ++e)
            total += weight[e] * load(from + (first + e * group) * LANES);
          store(to + i * LANES, total);
        }
      });
    }
  };
  side.scalar_type() == at::kFloat ? sum.operator()<float>() : sum.operator()<BFloat16>();
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polyrex, library) {
  library.def(
      "add_(Tensor(a!) y, Tensor x, Tensor a, Tensor a_parts, Tensor b, Tensor b_parts, "
      "int hiddens, int experts, int inner, int outer, Tensor weights, Tensor rows) -> ()",
      &add_);
  library.def(
      "compose(Tensor side, Tensor parts, int experts, bool in_panels, Tensor weights) -> Tensor",
      &compose);
}
