// Inside of the solver: what its drivers (solver_search.cpp, solver_block.cpp) ask of the kernels (solver_impl.h,
// compiled once per instruction set). The C functions themselves are described in dbrxq.h.
//
// All kernels work on a tile: some rows of kTile columns, row after row without gaps, 64-byte aligned, columns beyond
// N filled with zeros. A tile is what one thread owns; nothing is added up across its columns except in
// `maximum_errors`, in column order, so that no result depends on the instruction set or the number of threads.
#pragma once
#include <cstdint>

namespace dbrxq {
namespace solver {

constexpr int64_t kTile = 64;  // columns of a tile: four AVX-512 vectors
constexpr int kMaxima = 16;    // group maxima tried per group
constexpr int kNominals = 12;  // clip factors tried per column to find its scale on an unlimited grid
constexpr float kHalfMax = 65504.0f;

// One group of rows within one tile.
struct Tile {
  const float* x;  // [rows, kTile] values to be rounded
  int64_t rows;
  int bits;                  // 2 to 8; codes run from -2^(bits-1) to 2^(bits-1) - 1
  const float* row_weights;  // [rows]
};

// What a group needs for the feedback among its own rows: the coefficient with which the error of row j enters the
// target of row r > j is incoming[r, j] and outgoing[j, r].
struct Feedback {
  const float* weight;    // [rows, kTile]
  const float* incoming;  // [rows, stride]
  int64_t stride;
  const float* outgoing;  // [rows, rows]
};

struct Kernels {
  // target[r] += sum over j < from of coefficients[r, j] * errors[j], j ascending.
  void (*feedback)(float* target,  // [rows, kTile]
                   int64_t rows,
                   const float* errors,  // [from, kTile]
                   int64_t from,
                   const float* coefficients,  // [rows, stride]
                   int64_t stride);

  // For each column the scale with the least weighted squared error among kNominals clip factors; 0 where the
  // column is all zero.
  void (*nominal_scales)(const Tile& tile, float* nominal /* [kTile] */);

  // sums[m] = sum over columns of column_weight * least error over the two stored scales around the nominal one,
  // if the group maximum / 256 were multipliers[m].
  void (*maximum_errors)(const Tile& tile, const float* nominal,
                         const float* column_weights,  // [kTile], 0 beyond N
                         const float* multipliers,     // [kMaxima] half values
                         double* sums);                // [kMaxima]

  // The best of four stored scales around the nominal one, for each column.
  void (*choose_codes)(const Tile& tile, const float* nominal, float multiplier,
                       uint8_t* scale_codes,  // [kTile], 0 to 15
                       float* scales,         // [kTile] half values
                       float* errors);        // [kTile] weighted squared error

  // Tries the stored scales up to two steps from the ones chosen, each by rounding the whole group with feedback,
  // and keeps for each column the one with the least loss. `scratch` [rows, kTile].
  void (*refine_codes)(const Tile& targets, const Feedback& within, float multiplier, float* scratch,
                       uint8_t* scale_codes,  // [kTile], in and out
                       float* scales);        // [kTile]

  // Rounds a group row by row, each target to its nearest grid value. `errors` may be the targets' memory.
  void (*round_rows)(const Tile& targets, const Feedback& within,
                     const float* scales,  // [kTile]
                     float* errors,        // [rows, kTile] weight - dequantized
                     uint8_t* codes,       // [rows, kTile]
                     float* values,        // [rows, kTile] dequantized, half values
                     float* loss);         // [kTile] pivot-weighted squared distance of the targets

  // Rounds a group, looking for the codes of least loss along several paths. `errors` may be the targets' memory.
  void (*search_paths)(const Tile& targets, const Feedback& within,
                       const float* scales,  // [kTile]
                       float* scratch,       // [rows, kTile]
                       float* errors,        // [rows, kTile] weight - dequantized
                       uint8_t* codes,       // [rows, kTile]
                       float* values,        // [rows, kTile] dequantized, half values
                       float* loss);         // [kTile] pivot-weighted squared distance of the targets
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The kNominals clip factors tried at a bit width: what the scale that just avoids clipping is multiplied with.
void nominal_factors(int bits, float* factors);

}  // namespace solver
}  // namespace dbrxq
