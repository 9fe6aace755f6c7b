// Index arithmetic of the packed EXL2 layout, for host and device compilers alike: where a code sits in the words of
// its column, and where a scale code sits in its word. Nothing here touches memory.
//
// q_weight [R, N] uint32, row-major. The codes of one group run down each column as one little-endian bit stream.
// 32 codes of b bits fill b words exactly, so 32 rows (a *unit*) are decoded on their own:
//
//   2 bits, 16 codes a word    word 0   |c15|c14| ... |c2|c1|c0|                     word 1 holds c16..c31
//   4 bits,  8 codes a word    word 0   | c7 | c6 | c5 | c4 | c3 | c2 | c1 | c0 |
//   8 bits,  4 codes a word    word 0   |   c3   |   c2   |   c1   |   c0   |
//
//   3 bits, 32 codes in three words, least significant bit on the right
//     word 0   bits 31..0   | c10 lo:2 | c9 | c8 | ... | c1 | c0 |
//     word 1                | c21 lo:1 | c20 | ...   | c11 | c10 hi:1 |
//     word 2                | c31 | c30 | ...        | c22 | c21 hi:2 |
//
//   5 bits, 32 codes in five words
//     word 0                | c6 lo:2  | c5  | ... | c0 |
//     word 1                | c12 lo:4 | c11 | ... | c7  | c6 hi:3 |
//     word 2                | c19 lo:1 | c18 | ... | c13 | c12 hi:1 |
//     word 3                | c25 lo:3 | c24 | ... | c20 | c19 hi:4 |
//     word 4                | c31 | c30 | ...      | c26 | c25 hi:2 |
//
//   6 bits, 16 codes in three words, twice a unit
//     word 0                | c5 lo:2  | c4  | ... | c0 |
//     word 1                | c10 lo:4 | c9  | ... | c6  | c5 hi:4 |
//     word 2                | c15 | c14 | ...      | c11 | c10 hi:2 |
//
// A code that straddles two words has its low bits in the earlier one. A code q stands for q - 2^(b-1).
//
// q_scale [G, N/8] uint32: eight columns a word, column 0 in the lowest nibble; the nibble is s - 1, s in 1..16.
//
//   word 0   bits 31..0   | n7 | n6 | n5 | n4 | n3 | n2 | n1 | n0 |
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define DBRXQ_HD __host__ __device__
#else
#define DBRXQ_HD
#endif

namespace dbrxq {
namespace layout {

constexpr int kUnitRows = 32;        // codes of one column that fill whole words at every width
constexpr int kTailRows = 16;        // a last group of 2 bits may end on half a unit: 16 codes fill one word
constexpr int kColumnMultiple = 32;  // stored N
constexpr int kColumnsPerScaleWord = 8;

DBRXQ_HD static constexpr bool is_width(int bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8;
}

DBRXQ_HD static constexpr uint32_t code_mask(int bits) { return (1u << bits) - 1u; }
DBRXQ_HD static constexpr int zero_point(int bits) { return 1 << (bits - 1); }

// Word, counted from the start of the unit, and bit where the code of `row` of the unit begins.
DBRXQ_HD static constexpr int code_word(int bits, int row) { return (row * bits) >> 5; }
DBRXQ_HD static constexpr int code_shift(int bits, int row) { return (row * bits) & 31; }
DBRXQ_HD static constexpr bool code_straddles(int bits, int row) { return code_shift(bits, row) + bits > 32; }
DBRXQ_HD static constexpr int unit_words(int bits, int rows) { return rows * bits / 32; }

// The code of `row` from its word and, where it straddles, the next word (any value where it does not).
DBRXQ_HD static constexpr uint32_t extract_code(int bits, int row, uint32_t word, uint32_t next) {
  return ((word >> code_shift(bits, row)) | (code_straddles(bits, row) ? next << (32 - code_shift(bits, row)) : 0u)) &
         code_mask(bits);
}

DBRXQ_HD static constexpr int64_t scale_word(int64_t column) { return column / kColumnsPerScaleWord; }
DBRXQ_HD static constexpr int scale_shift(int64_t column) {
  return static_cast<int>(column % kColumnsPerScaleWord) * 4;
}

// What the pictures promise.
static_assert(code_straddles(3, 10) && code_straddles(3, 21) && !code_straddles(3, 20), "3-bit picture");
static_assert(code_straddles(5, 6) && code_straddles(5, 12) && code_straddles(5, 19) && code_straddles(5, 25),
              "5-bit picture");
static_assert(code_straddles(6, 5) && code_straddles(6, 10) && code_word(6, 16) == 3, "6-bit picture");
static_assert(unit_words(2, kTailRows) == 1 && unit_words(3, kUnitRows) == 3 && unit_words(8, kUnitRows) == 8,
              "a unit fills whole words");
static_assert(extract_code(3, 10, 0x40000000u, 1u) == 5u, "low bits come from the earlier word");

}  // namespace layout
}  // namespace dbrxq
