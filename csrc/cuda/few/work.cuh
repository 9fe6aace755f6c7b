// The work of a launch in equal shares: blocks as many as fit at once, each with the same number of words to read.
//
// Work is laid out on one line, measured in word rows of a column tile. A *group* is what makes 128 columns of a result;
// its *pieces* are the matrices that go into it, one after another:
//
//     linears    | q, tile 0 | q, tile 1 | ... | k, tile 0 | ...              a group is a tile of a linear
//     gate, up   | gate 3, tile 0; up 3, tile 0 | gate 3, tile 1; up 3 ...    ... a tile of both, of an expert's 8 rows
//     down       | down 3, tile 0; down 7, tile 0 | down 3, tile 1; ...       ... a tile of all experts in use
//     shares     |  block 0   |  block 1   |  block 2   | ...                 cut anywhere, at whole units
//
// Blocks that share a group leave their sums, of rows in use, in memory; the last to come (a ticket) adds them in their
// order. A block starts in the midst of one group at most and ends in the midst of one, so it has two places for sums; and
// the block where a shared group begins is that of no other, so it lends the group its ticket.
#pragma once
#include "few.cuh"

namespace dbrxq {

constexpr int kMostPieces = 2 * kFewSlots;
constexpr int kLeastWords = 48;  // of a block: less is not worth its sums and tickets

// One matrix in a group, and the rows that meet it.
struct Piece {
  int32_t linear;  // expert, or which linear
  int32_t words;   // word rows
  int32_t offset;  // word rows before it in its group
  int16_t first;   // of its rows: place in Work::sorted
  int16_t rows;    // tokens
};

// Groups alike but for their column tile.
struct Item {
  int64_t start;  // on the line
  int32_t words;  // of a group
  int32_t tiles;
  int32_t first_piece, pieces;
};

// In shared memory.
struct Work {
  Piece pieces[kMostPieces];
  Item items[kFewSlots];
  int64_t total;  // length of the line
  int item_count, piece_count;
  int expert[kFewSlots];  // of each slot, -1 for none
  int sorted[kFewSlots];  // slots by expert
  int heads[kFewSlots];   // 1 where a piece begins in `sorted`
};

// Puts the slots of each expert together, in pieces of at most `most` rows. `chosen`: work.expert is set. All threads of the
// block, one a slot at least; ends with a barrier.
__device__ inline void sort_slots(const FewRouting& routing, int most, bool chosen, Work& work) {
  const int slots = routing.tokens * routing.active, i = threadIdx.x;
  if (i < slots) {
    int64_t expert = chosen ? work.expert[i] : 0;
    if (routing.top_k_index && !chosen)
      expert = routing.index_bytes == 8 ? static_cast<const int64_t*>(routing.top_k_index)[i]
                                        : static_cast<const int32_t*>(routing.top_k_index)[i];
    work.expert[i] = expert >= 0 && expert < routing.experts ? static_cast<int>(expert) : -1;
    work.heads[i] = 0;
  }
  __syncthreads();
  int place = 0, before = 0, count = 0;
  const int own = i < slots ? work.expert[i] : -1;
  for (int j = 0; j < slots; ++j) {
    const int other = work.expert[j];
    place += other >= 0 && (other < own || (other == own && j < i));
    before += other == own && j < i;
    count += other == own;
  }
  const bool head = own >= 0 && before % most == 0;
  if (own >= 0) work.sorted[place] = i;
  if (head) work.heads[place] = 1;
  __syncthreads();
  if (head) {
    int number = 0;
    for (int j = 0; j < place; ++j) number += work.heads[j];
    const int left = count - before;
    work.pieces[number] = {own, 0, 0, static_cast<int16_t>(place), static_cast<int16_t>(left < most ? left : most)};
  }
  if (i == 0) {
    int pieces = 0;
    for (int j = 0; j < slots; ++j) pieces += work.heads[j];
    work.piece_count = pieces;
  }
  __syncthreads();
}

// The line in equal shares.
struct Shares {
  int64_t total;
  int blocks;

  __device__ __forceinline__ int64_t begin(int block) const { return total * block / blocks; }
  // The block that has a place of the line.
  __device__ __forceinline__ int block_at(int64_t place) const {
    return static_cast<int>(((place + 1) * blocks - 1) / total);
  }
};

__host__ __device__ inline int blocks_for(int64_t total, int most) {
  const int64_t useful = total / kLeastWords;
  return useful < 1 ? 1 : useful < most ? static_cast<int>(useful) : most;
}

// Where a block is, in shared memory: registers are for the sums.
struct Group {
  int64_t begin, end;  // on the line
  Item item;
  int tile;
  int from, to;      // word rows of the block's share, in the group; equal: there is no more
  int first, count;  // blocks that have parts of it
  int place;         // of the two of block `first`
};

// The group at a place of the line, for a share that ends at `end`. One thread.
__device__ inline void find_group(const Work& work, const Shares& shares, int64_t at, int64_t end, Group& group) {
  group.from = group.to = 0;
  if (at >= end) return;
  int number = 0;
  while (number + 1 < work.item_count && at >= work.items[number + 1].start) ++number;
  const Item item = work.items[number];
  group.item = item;
  group.tile = static_cast<int>((at - item.start) / item.words);
  group.begin = item.start + static_cast<int64_t>(group.tile) * item.words;
  group.end = group.begin + item.words;
  group.from = static_cast<int>(at - group.begin);
  group.to = static_cast<int>((end < group.end ? end : group.end) - group.begin);
  group.first = shares.block_at(group.begin);
  group.count = shares.block_at(group.end - 1) - group.first + 1;
  group.place = shares.begin(group.first) < group.begin ? 1 : 0;
}

}  // namespace dbrxq
