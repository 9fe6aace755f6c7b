// What the solver's two drivers share (solver_search.cpp, solver_block.cpp): matrices in tiles, and the choice of a
// group's maximum.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "solver.h"

namespace dbrxq {
namespace solver {

const Kernels& kernels();  // of the instruction set in use

// Widths that a byte holds; which of them a file may have is the format's business.
inline bool legal_bits(int64_t bits) { return bits >= 2 && bits <= 8; }

// Nearest half of a float, as a float.
float round_half(float x);

inline int64_t tile_count(int64_t n) { return (n + kTile - 1) / kTile; }

// [tiles][rows][kTile], uninitialised; each tile on a cache line boundary. Throws std::bad_alloc.
template <class T>
class Tiles {
 public:
  explicit Tiles(int64_t tiles, int64_t rows = 1) : rows_(rows), values_(tiles * rows * kTile) {}
  T* operator[](int64_t tile) { return values_.get() + tile * rows_ * kTile; }
  const T* operator[](int64_t tile) const { return values_.get() + tile * rows_ * kTile; }

 private:
  int64_t rows_;
  Buffer<T> values_;
};

// Columns of a tile out of a row-major matrix of `n`, zeros beyond them.
inline void load_tile(float* to, const float* matrix, int64_t rows, int64_t n, int64_t tile) {
  const int64_t width = std::min(kTile, n - tile * kTile);
  for (int64_t r = 0; r < rows; ++r, to += kTile) {
    std::copy_n(matrix + r * n + tile * kTile, width, to);
    std::fill(to + width, to + kTile, 0.0f);
  }
}

// And back, each value by `convert`.
template <class From, class To, class Convert>
void store_tile(To* matrix, const From* from, int64_t rows, int64_t n, int64_t tile, Convert convert) {
  const int64_t width = std::min(kTile, n - tile * kTile);
  for (int64_t r = 0; r < rows; ++r, from += kTile)
    std::transform(from, from + width, matrix + r * n + tile * kTile, convert);
}

template <class T>
void store_tile(T* matrix, const T* from, int64_t rows, int64_t n, int64_t tile) {
  store_tile(matrix, from, rows, n, tile, [](T value) { return value; });
}

// Weights of the columns, zeros beyond N; `column_weights` null means 1 everywhere.
void load_weights(Tiles<float>& weights, const float* column_weights, int64_t n);

// A group's maximum: the half value that is stored, and half(stored / 256), which dequantization starts from.
struct Maximum {
  float stored = 0.0f, multiplier = 0.0f;
};

// Candidates for the maximum of a group whose largest nominal scale is `largest`.
struct Maxima {
  explicit Maxima(float largest);
  // The candidate with the least error; sums [tiles, kMaxima] are added in order of the tiles.
  Maximum best(const double* sums, int64_t tiles) const;

  float stored[kMaxima], multiplier[kMaxima];
};

}  // namespace solver
}  // namespace dbrxq
