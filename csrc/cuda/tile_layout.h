// The device layout of packed codes: index arithmetic for host and device, nothing here touches memory.
//
// y = x W runs on mma.m16n8k16 with the weights as operand A, 16 output channels by 16 input channels, and the tokens
// as its 8 columns. A warp owns a *tile*: 32 packed rows (a unit, common/layout.h) by 128 columns. With lane = 4 g + q:
//
//                      columns 0..15   16..31  ...  112..127
//     rows  0..7      | g=0, q=0     | g=1, q=0 | ... | g=7, q=0 |     a lane owns 8 rows by 16 columns: the 8 rows are
//     rows  8..15     | g=0, q=1     | g=1, q=1 | ... | g=7, q=1 |     16 bytes of one token's activations, and the
//     rows 16..23     | g=0, q=2     | g=1, q=2 | ... | g=7, q=2 |     scale codes of the 16 columns are 8 bytes
//     rows 24..31     | g=0, q=3     | g=1, q=3 | ... | g=7, q=3 |
//
// Its columns fall into 4 *subtiles* of 4: column 4 s + c. A subtile of b bits takes b words of each lane, and the
// words of the 4 subtiles lie side by side, so that one 16-byte load brings word i of all four, 512 bytes a warp:
//
//     word row r + i (r the first of the unit), columns 128 j ..      | lane 0: s0 s1 s2 s3 | lane 1: s0 s1 s2 s3 | ...
//
// So a tile fills the same b word rows by 128 columns as in the file; only the bits within it move. N is a multiple of
// 32: a last tile of 32, 64 or 96 columns has 8, 16 or 24 lanes, and the whole takes what the file takes. A last unit
// of 16 rows is filled up to 32 with codes that stand for 0, a word row more.
//
// Inside a subtile, *pair* 4 c + p holds rows 2 p (low half of the word) and 2 p + 1 (high half) of column c, at the
// same place of both halves: one shift and one mask give both codes as the low bits of a half2. In one half, from bit
// 15 down to bit 0:
//
//     2 bits   word i   |p7|p6|p5|p4|p3|p2|p1|p0| of pairs 8 i ..        4 bits   | p3 | p2 | p1 | p0 | of pairs 4 i ..
//     8 bits   word i   |       p1      |       p0      | of pairs 2 i ..
//     3 bits   word i   |x| p4| p3| p2| p1| p0|           of pairs 5 i .., x = bit i of pair 15
//     5 bits   word i   |x|   p2|   p1|   p0|             of pairs 3 i .., x = bit i of pair 15
//     6 bits   word i   |  x |    p1|    p0|              of pairs 2 i .., x = i < 4: low four bits of pair 12 + i;
//                                                         word 4: top two of pairs 13, 12; word 5: of pairs 15, 14
#pragma once
#include "layout.h"

namespace dbrxq {
namespace tile {

constexpr int kColumns = 128;
constexpr int kLaneColumns = 16;
constexpr int kSubtiles = 4;
constexpr int kSubtileColumns = 4;
constexpr int kLaneRows = 8;
constexpr int kPairs = kSubtileColumns * kLaneRows / 2;

constexpr int kWidthCount = 6;
DBRXQ_HD static constexpr int width(int index) {
  return index == 0 ? 8 : index == 1 ? 6 : index == 2 ? 5 : index == 3 ? 4 : index == 4 ? 3 : 2;
}

// `count` bits of the codes of a pair, from their bit `at`, stand at bit `shift` of each half of word `word`.
struct Piece {
  int word, shift, at, count;
};

DBRXQ_HD static constexpr int pairs_a_word(int bits) { return 16 / bits; }
DBRXQ_HD static constexpr bool in_one_piece(int bits, int pair) { return pair < bits * pairs_a_word(bits); }
DBRXQ_HD static constexpr int piece_count(int bits, int pair) {
  return in_one_piece(bits, pair) ? 1 : bits == 6 ? 2 : bits;
}
DBRXQ_HD static constexpr Piece piece(int bits, int pair, int index) {
  if (in_one_piece(bits, pair)) return {pair / pairs_a_word(bits), pair % pairs_a_word(bits) * bits, 0, bits};
  if (bits != 6) return {index, 15, index, 1};
  if (index == 0) return {pair - 12, 12, 0, 4};
  return {4 + (pair - 12) / 2, 12 + pair % 2 * 2, 4, 2};
}

// What the picture promises: every bit of every word is used once.
static constexpr bool fills_its_words(int bits) {
  uint32_t used[8] = {};
  for (int pair = 0; pair < kPairs; ++pair)
    for (int i = 0; i < piece_count(bits, pair); ++i) {
      const Piece part = piece(bits, pair, i);
      const uint32_t mask = ((1u << part.count) - 1u) << part.shift;
      if (part.shift + part.count > 16 || (used[part.word] & mask)) return false;
      used[part.word] |= mask;
    }
  for (int i = 0; i < bits; ++i)
    if (used[i] != 0xffffu) return false;
  return true;
}
static_assert(fills_its_words(2) && fills_its_words(3) && fills_its_words(4), "the picture");
static_assert(fills_its_words(5) && fills_its_words(6) && fills_its_words(8), "the picture");
static_assert(32 * kLaneColumns * kLaneRows == layout::kUnitRows * kColumns, "32 lanes own a tile");
static_assert(kLaneColumns / layout::kColumnsPerScaleWord == 2, "a lane's scale codes are two words");

}  // namespace tile
}  // namespace dbrxq
