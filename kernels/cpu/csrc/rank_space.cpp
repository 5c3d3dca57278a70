// The CPU path of the routed low-rank product. kernels/cpu/rank_space.py documents the operators;
// their twin is kernels/rank_space.py.
//
// Matrices [depth, columns] are packed in panels of 16 columns: [panels, depth, 16] in float32,
// [panels, depth / 2, 16, 2] in bfloat16, which is what AMX tiles and bf16 dot products read. An
// expert's rank is padded to whole panels, so that its part of a matrix is contiguous.
//
// A layer is one parallel region. With few tokens, threads share the panels of both sides, and wait
// for each other once, between the sides. With many tokens, each thread takes some of them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "tiles.h"
#include "mixers.h"
#include "scratch.h"
#include "simd.h"

namespace {

using namespace polyrex;
using at::Tensor;

// From this many tokens on, each thread has tokens of its own, and takes this many at a time.
constexpr int64_t OWN_TOKENS = 128;
// This many values of the B side, which stay in the L2 cache, meet all tokens before the next do.
constexpr int64_t CACHED_VALUES = 256 << 10;

// The pieces of a part go to this many sums, which are then added, always in the same order: a
// token's result depends neither on the batch nor on the number of threads.
constexpr int64_t SUMS = 4;

// Some consecutive panels of one part.
struct Piece {
  int64_t part, panel, panels;
};

// Consecutive pieces of one part, which one thread multiplies with every token, and their sum.
struct Share {
  int64_t first, last, sum;
};

// Where a thread's share of `count` things begins; it ends where that of `member + 1` begins.
int64_t share(int64_t count, int64_t member, int64_t members) { return count * member / members; }

// The sums of h for some consecutive tokens, [sums, tokens, size], initially 0.
struct Hidden {
  int64_t first, tokens, sums, size;
  float* values;

  Hidden(int64_t first, int64_t tokens, int64_t sums, int64_t size)
      : first(first), tokens(tokens), sums(sums), size(size),
        values(scratch<HIDDEN, float>(sums * tokens * size)) {
    std::fill_n(values, sums * tokens * size, 0.f);
  }
  float* of(int64_t sum, int64_t token) const {
    return values + (sum * tokens + token - first) * size;
  }
};

template <typename Block, typename Weight, typename Mix>
class AddToRows {
 public:
  using Input = typename Block::Input;
  using Pieces = c10::SmallVector<Piece, 128>;

  AddToRows(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts, const Tensor& b,
            const Tensor& b_parts, int64_t hidden_size, const Mix& mix)
      : y(y.data_ptr<Weight>()), y_stride(y.stride(0)), x(x.const_data_ptr<Weight>()),
        x_stride(x.stride(0)), tokens(x.size(0)), mix(mix), a(a.const_data_ptr<Weight>()),
        b(b.const_data_ptr<Weight>()), a_parts(a_parts), b_parts(b_parts), hidden_size(hidden_size),
        a_pieces(pieces(this->a_parts)), b_pieces(pieces(this->b_parts)) {
    for (int64_t first = 0, last; first < count(a_pieces); first = last) {
      const int64_t part = a_pieces[first].part;
      for (last = first; last < count(a_pieces) && a_pieces[last].part == part;) ++last;
      // Parts that add to the same h have separate sums.
      int64_t sum = 0;
      for (int64_t p = 0; p < part; ++p)
        if (this->a_parts[p].hidden == this->a_parts[part].hidden) sum += SUMS;
      const int64_t here = std::min(SUMS, last - first);
      for (int64_t i = 0; i < here; ++i)
        shares.push_back({first + share(last - first, i, here),
                          first + share(last - first, i + 1, here), sum + i});
      sums = std::max(sums, sum + here);
    }
  }

  void run() {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    std::optional<Hidden> all;
    if (tokens < threads * OWN_TOKENS) all.emplace(0, tokens, sums, hidden_size);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
      const int64_t groups = std::clamp<int64_t>(tokens / OWN_TOKENS, 1, team);
      const int64_t members = team / groups, group = thread / members, member = thread % members;
      const int64_t blocks = (tokens + Block::ROWS - 1) / Block::ROWS;
      const int64_t begin = share(blocks, group, groups) * Block::ROWS;
      const int64_t end = std::min(share(blocks, group + 1, groups) * Block::ROWS, tokens);
      if (all) {
        if (group < groups) shrink(begin, end, member, members, *all);
#pragma omp barrier
        if (group < groups) expand(begin, end, member, members, *all);
      } else {
        for (int64_t t = begin, until; t < end; t = until) {
          until = std::min(t + OWN_TOKENS, end);
          const Hidden own(t, until - t, sums, hidden_size);
          shrink(t, until, 0, 1, own);
          expand(t, until, 0, 1, own);
        }
      }
    }
  }

 private:
  static int64_t count(const Pieces& pieces) { return pieces.size(); }
  // All panels of a side, two at a time.
  static Pieces pieces(const Parts& parts) {
    Pieces found;
    for (int64_t p = 0; p < parts.count; ++p)
      for (int64_t panel = 0; panel < parts[p].panels; panel += 2)
        found.push_back({p, panel, std::min<int64_t>(2, parts[p].panels - panel)});
    return found;
  }
  static const Weight* panel(const Weight* side, const Part& part, int64_t number) {
    return side + part.start + number * part.depth * LANES;
  }

  // h_t = sum_e w_te (A_e x_t): this member's shares of the sum.
  void shrink(int64_t begin, int64_t end, int64_t member, int64_t members, const Hidden& hidden) {
    const int64_t first = share(shares.size(), member, members);
    const int64_t last = share(shares.size(), member + 1, members);
    if (first == last) return;
    alignas(64) float out[Block::ROWS * 2 * LANES];
    for (int64_t t = begin; t < end; t += Block::ROWS) {
      const int64_t n = std::min<int64_t>(Block::ROWS, end - t);
      Input* packed = nullptr;
      const Part* before = nullptr;
      for (int64_t own = first; own < last; ++own) {
        const Part& part = a_parts[a_pieces[shares[own].first].part];
        Block block(part.depth);
        if (!before || before->begin != part.begin || before->length != part.length) {
          packed = scratch<INPUTS, Input>(n * part.depth);
          for (int64_t i = 0; i < n; ++i)
            block.pack(packed, n, i, x + (t + i) * x_stride + part.begin, part.length);
        }
        before = &part;
        for (int64_t p = shares[own].first; p < shares[own].last; ++p) {
          const Piece& piece = a_pieces[p];
          const Piece& next = a_pieces[p + 1 < shares[last - 1].last ? p + 1 : shares[first].first];
          block(packed, n, panel(a, part, piece.panel), piece.panels,
                panel(a, a_parts[next.part], next.panel), out);
          for (int64_t i = 0; i < n; ++i)
            gather(part, piece, t + i, hidden.of(shares[own].sum, t + i),
                   out + i * piece.panels * LANES);
        }
      }
    }
  }

  // Adds one token's product with a piece of the A side to its h.
  void gather(const Part& part, const Piece& piece, int64_t token, float* h,
              const float* out) const {
    const int64_t each = part.panels / mix.experts;  // panels of one expert
    const float* weights = part.offset < 0 ? nullptr : mix.routing.of(token, part.offset);
    for (int64_t p = 0; p < piece.panels; ++p) {
      const int64_t panel = piece.panel + p;
      float* to = h + part.hidden + panel % each * LANES;
      const Floats found = load(out + p * LANES);
      store(to, load(to) + (weights ? weights[panel / each] * found : found));
    }
  }

  // y_t += B mix(h_t): this member's columns.
  void expand(int64_t begin, int64_t end, int64_t member, int64_t members, const Hidden& hidden) {
    const int64_t last = share(b_pieces.size(), member + 1, members);
    alignas(64) float out[Block::ROWS * 2 * LANES];
    int64_t first = share(b_pieces.size(), member, members);
    for (int64_t until; first < last; first = until) {
      const Part& part = b_parts[b_pieces[first].part];
      const int64_t most = std::max<int64_t>(1, CACHED_VALUES / (2 * LANES * part.depth));
      for (until = first; until < std::min(last, first + most); ++until)
        if (&b_parts[b_pieces[until].part] != &part) break;
      Block block(part.depth);
      for (int64_t t = begin; t < end; t += Block::ROWS) {
        const int64_t n = std::min<int64_t>(Block::ROWS, end - t);
        const Input* packed = spread(block, t, n, b_pieces[first].part, hidden);
        for (int64_t p = first; p < until; ++p) {
          const Piece& piece = b_pieces[p];
          const Piece& next = b_pieces[p + 1 < last ? p + 1 : first];
          const Part& after = b_parts[next.part];
          // The rows of y are far apart: no hardware prefetches where the next piece is added.
          for (int64_t i = 0; i < n; ++i)
            __builtin_prefetch(y + (t + i) * y_stride + after.begin + next.panel * LANES);
          block(packed, n, panel(b, part, piece.panel), piece.panels, panel(b, after, next.panel),
                out);
          const int64_t column = piece.panel * LANES;
          const int64_t width = std::min(piece.panels * LANES, part.length - column);
          for (int64_t i = 0; i < n; ++i)
            add_row(y + (t + i) * y_stride + part.begin + column, out + i * piece.panels * LANES,
                    width);
        }
      }
    }
  }

  // The packed inputs of a matrix of the B side, for n tokens.
  const Input* spread(const Block& block, int64_t first, int64_t n, int64_t number,
                      const Hidden& hidden) const {
    const Part& part = b_parts[number];
    Input* packed = scratch<INPUTS, Input>(n * part.depth);
    const int64_t reads = mix.reads(part);
    float* h = scratch<MIXED, float>(reads + part.depth);
    float* mixed = h + reads;
    for (int64_t i = 0; i < n; ++i) {
      mix.fetch(first + std::min(i + 2, n - 1), part);
      for (int64_t k = 0; k < reads; k += LANES) {
        Floats total = {};
        for (int64_t sum = 0; sum < hidden.sums; ++sum)
          total += load(hidden.of(sum, first + i) + part.hidden + k);
        store(h + k, total);
      }
      mix(h, first + i, part, number, mixed);
      block.pack(packed, n, i, mixed, part.depth);
    }
    return packed;
  }

  Weight* const y;
  const int64_t y_stride;
  const Weight* const x;
  const int64_t x_stride, tokens;
  const Mix& mix;
  const Weight *const a, *const b;
  const Parts a_parts, b_parts;
  const int64_t hidden_size;
  const Pieces a_pieces, b_pieces;
  c10::SmallVector<Share, 32> shares;  // of the A side
  int64_t sums = 0;
};

template <typename Mix>
void add(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts, const Tensor& b,
         const Tensor& b_parts, int64_t hidden_size, const Mix& mix) {
  const auto dtype = a.scalar_type();
  TORCH_CHECK(y.scalar_type() == dtype && x.scalar_type() == dtype,
              "expected inputs and outputs in the weights' dtype ", dtype, ", got ",
              x.scalar_type(), " and ", y.scalar_type());
  TORCH_CHECK(y.stride(1) == 1 && x.stride(1) == 1, "expected rows without gaps");
  // A composed run is a part of its step's tokens.
  TORCH_CHECK(mix.routing.tokens >= x.size(0), "expected routing for ", x.size(0),
              " tokens, got it for ", mix.routing.tokens);
  if (x.size(0) == 0) return;
  with_products<VectorBlock, TileBlock>(dtype, [&]<typename Weight, typename Block>() {
    AddToRows<Block, Weight, Mix>(y, x, a, a_parts, b, b_parts, hidden_size, mix).run();
  });
}

void add_(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts, const Tensor& b,
          const Tensor& b_parts, int64_t hidden_size, int64_t experts, const Tensor& weights,
          const Tensor& rows) {
  add(y, x, a, a_parts, b, b_parts, hidden_size, MixExperts{{weights, rows}, experts});
}

void add_pairs_(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts,
                const Tensor& b, const Tensor& b_parts, int64_t hidden_size, int64_t inner,
                int64_t outer, const Tensor& weights, const Tensor& rows) {
  add(y, x, a, a_parts, b, b_parts, hidden_size, MixPairs{{weights, rows}, inner, outer});
}

void add_by_token_(Tensor& y, const Tensor& x, const Tensor& a, const Tensor& a_parts,
                   const Tensor& b, const Tensor& b_parts, int64_t hidden_size, int64_t inner,
                   int64_t outer, int64_t gates, int64_t most, const Tensor& scales,
                   const Tensor& weights, const Tensor& rows) {
  const MixByToken mix{{weights, rows}, inner, outer, gates, most, scales.const_data_ptr<float>()};
  add(y, x, a, a_parts, b, b_parts, hidden_size, mix);
}

// The values of a side whose matrices are weighted sums of their experts: [groups, experts, size]
// -> [groups, size]. On the A side an expert is whole panels, on the B side a part of every panel.
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
      "int hidden_size, int experts, Tensor weights, Tensor rows) -> ()",
      &add_);
  library.def(
      "add_pairs_(Tensor(a!) y, Tensor x, Tensor a, Tensor a_parts, Tensor b, Tensor b_parts, "
      "int hidden_size, int inner, int outer, Tensor weights, Tensor rows) -> ()",
      &add_pairs_);
  library.def(
      "add_by_token_(Tensor(a!) y, Tensor x, Tensor a, Tensor a_parts, Tensor b, Tensor b_parts, "
      "int hidden_size, int inner, int outer, int gates, int most, Tensor scales, "
      "Tensor weights, Tensor rows) -> ()",
      &add_by_token_);
  library.def(
      "compose(Tensor side, Tensor parts, int experts, bool in_panels, Tensor weights) -> Tensor",
      &compose);
}
