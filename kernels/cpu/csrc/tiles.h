// Products of a block of tokens with one or two panels of a packed matrix.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "simd.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace polyrex {

// sum [rows][panels] = x [rows, depth] @ one or two panels of a packed matrix, of `size` elements.
// The inputs are float32, whatever the weights are.
#ifdef __AVX512F__
constexpr int VECTOR_ROWS = 12;  // 24 accumulators in 32 registers
#else
constexpr int VECTOR_ROWS = 4;
#endif

template <int ROWS, int PANELS>
void multiply(
    const float* const* x, const float* w, int64_t size, int64_t depth, Floats (*sum)[2]) {
  Floats part[ROWS][PANELS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) columns[p] = load(w + p * size + k * LANES);
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) part[row][p] += x[row][k] * columns[p];
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int p = 0; p < PANELS; ++p) sum[row][p] = part[row][p];
}

template <int ROWS, int PANELS>
void multiply(
    const float* const* x, const BFloat16* w, int64_t size, int64_t depth, Floats (*sum)[2]) {
  Floats part[ROWS][PANELS] = {};
  for (int64_t k = 0; k < depth; k += 2) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      Words pairs = *reinterpret_cast<const Words*>(w + p * size + k * LANES);
      Words even = pairs << 16, odd = pairs & 0xffff0000;
#pragma GCC unroll 12
      for (int row = 0; row < ROWS; ++row)
        part[row][p] += x[row][k] * reinterpret_cast<Floats&>(even) +
                        x[row][k + 1] * reinterpret_cast<Floats&>(odd);
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int p = 0; p < PANELS; ++p) sum[row][p] = part[row][p];
}

// A block multiplies up to ROWS rows of `depth` inputs with one or two panels. Its inputs are
// packed once for all panels, row by row, and padded with zeros to a multiple of 16.
template <typename Weight>
struct VectorBlock {
  using Input = float;
  static constexpr int64_t ROWS = VECTOR_ROWS;
  const int64_t depth;

  explicit VectorBlock(int64_t depth) : depth(depth) {}

  template <typename From>
  void pack(Input* packed, int64_t /*rows*/, int64_t row, const From* from, int64_t length) const {
    copy_row(packed + row * depth, depth, from, length);
  }

  void operator()(const float* packed, int64_t rows, const Weight* w, int64_t panels,
                  const Weight* /*next*/, float* out) const {
    const float* row[ROWS];
    for (int64_t i = 0; i < ROWS; ++i) row[i] = packed + std::min(i, rows - 1) * depth;
    Floats sum[ROWS][2];
    const int64_t size = depth * LANES;
    if (panels == 2) {
      rows > 8   ? multiply<VECTOR_ROWS, 2>(row, w, size, depth, sum)
      : rows > 4 ? multiply<std::min(8, VECTOR_ROWS), 2>(row, w, size, depth, sum)
                 : multiply<4, 2>(row, w, size, depth, sum);
    } else {
      multiply<VECTOR_ROWS, 1>(row, w, size, depth, sum);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t p = 0; p < panels; ++p) store(out + (i * panels + p) * LANES, sum[i][p]);
  }
};

struct TileBlock;

#ifdef __AMX_BF16__
// Linux lets a process use the tiles only after a request.
inline bool tiles_allowed() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}

// The processor's eight tiles, which are released at the end.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

  // The processor's layout of a configuration: the rows of each tile, and the bytes in a row.
  struct Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static void configure(const Shapes& shapes) { _tile_loadconfig(&shapes); }
};

struct TileBlock : Tiles {
  using Input = BFloat16;
  static constexpr int64_t ROWS = 32;
  const int64_t depth;

  // A tile holds 32 of the depth, or 16 if the depth is an odd multiple of 16.
  explicit TileBlock(int64_t depth) : depth(depth), step(depth % 32 == 0 ? 32 : 16) {}

  // The rows of a tile are contiguous.
  template <typename From>
  void pack(Input* packed, int64_t rows, int64_t row, const From* from, int64_t length) const {
    for (int64_t k = 0; k < depth; k += step)
      copy_row(packed + k * rows + row * step, step, from + k, length - k);
  }

  void operator()(const BFloat16* packed, int64_t rows, const BFloat16* w, int64_t panels,
                  const BFloat16* next, float* out) {
    shape(rows);
    const bool two = rows > 16;
    const int64_t size = depth * LANES;
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += step) {
      const BFloat16* x = packed + k * rows;
      for (int64_t line = 0; line < panels * step / 2; ++line)
        __builtin_prefetch(next + (k * panels + line * 2) * LANES, 0, 2);
      _tile_loadd(4, x, step * 2);
      _tile_loadd(6, w + k * LANES, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (panels == 2) {
        _tile_loadd(7, w + size + k * LANES, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (two) {
        _tile_loadd(5, x + 16 * step, step * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (panels == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    const int64_t line = panels * LANES;
    _tile_stored(0, out, line * 4);
    if (panels == 2) _tile_stored(1, out + LANES, line * 4);
    if (two) {
      _tile_stored(2, out + 16 * line, line * 4);
      if (panels == 2) _tile_stored(3, out + 16 * line + LANES, line * 4);
    }
  }

 private:
  void shape(int64_t rows) {
    if (rows == shaped) return;
    shaped = rows;
    Shapes tiles;
    const int64_t upper = std::min<int64_t>(rows, 16), lower = std::max<int64_t>(rows - 16, 1);
    for (int tile = 0; tile < 8; ++tile) {
      const bool of_x = tile == 4 || tile == 5, of_w = tile > 5;
      tiles.bytes[tile] = of_x ? step * 2 : 64;
      tiles.rows[tile] = of_w ? step / 2 : (tile == 2 || tile == 3 || tile == 5) ? lower : upper;
    }
    configure(tiles);
  }

  const int64_t step;
  int64_t shaped = 0;
};
#endif

// Calls `work` with the type of the weights, and with the products that are the best for it on this
// processor: `InTiles` for bfloat16 with AMX, `InVectors` otherwise.
template <template <typename> typename InVectors, typename InTiles, typename Work>
void with_products(at::ScalarType dtype, Work work) {
  if (dtype == at::kFloat) return work.template operator()<float, InVectors<float>>();
  TORCH_CHECK(dtype == at::kBFloat16, "expected float32 or bfloat16, got ", dtype);
#ifdef __AMX_BF16__
  if (tiles_allowed()) return work.template operator()<BFloat16, InTiles>();
#endif
  work.template operator()<BFloat16, InVectors<BFloat16>>();
}

}  // namespace polyrex
