// reindex: rewrites block tables after a resampling. Rows hold `position` tokens in blocks of `block_size`, all of them
// as many, or each its own number. Ancestors are in place (a[a[i]] == a[i]). A moved row (a[i] != i) takes over its
// parent's full blocks, the first position / block_size columns of the parent. If the parent has a tail, the partly
// filled block of the next column, its used slots are copied into the row's own block of that column. Survivors are read and never written, moved rows are
// written and never read: so rows and caches may be done in any order, in place. Ancestors may be noted in a genealogy.
//
// Example: table [[7, 1], [8, 2]], ancestors [1, 1], position 6, block_size 4 -> table [[8, 1], [8, 2]], and slots 0
// and 1 of block 2 copied to block 1.
#pragma once
#include <cstdint>
#include <cstring>

#include "hd.cuh"

namespace fastsmc {

// A cache of blocks: block b starts at base + b·stride, in bytes, and consists of `pieces` runs of piece_size bytes,
// one behind the other; each slot has slot_size bytes in every run. With slot_size 0 a block is copied whole.
struct BlockCache {
  char* base;
  int64_t stride, n_blocks;
  int64_t pieces, piece_size, slot_size;  // pieces·piece_size < 2^31
  int width;  // bytes of the widest access that every address and size above is a multiple of: 16, 8, 4, 2 or 1

  // Whether `from` and `to` are two different blocks of the cache.
  FASTSMC_HD bool copies(int64_t from, int64_t to) const {
    return from >= 0 && from < n_blocks && to >= 0 && to < n_blocks && from != to;
  }
  // Bytes of each piece that `slots` slots take.
  FASTSMC_HD int64_t used(int64_t slots) const { return slot_size > 0 ? slots * slot_size : piece_size; }
};

// What is rewritten. Positions and step are read from memory if given there: replays of a captured graph go on.
struct Reindexing {
  int32_t* table;  // (n, columns), rows `stride` elements apart
  int64_t stride, columns;
  const int64_t* ancestors;  // (n,)
  int64_t n, position;
  const int64_t* position_at;
  const int32_t* positions;  // (n,), one per row; null: all rows hold as many tokens
  int64_t block_size;
  int32_t* genealogy;  // (steps, n), or null
  int64_t steps, step;
  const int64_t* step_at;

  FASTSMC_HD int64_t tokens(int64_t row) const {
    return positions ? positions[row] : position_at ? *position_at : position;
  }
  // The genealogy's row for these ancestors; null: none.
  FASTSMC_HD int32_t* generation() const {
    const int64_t t = step_at ? *step_at : step;
    return genealogy && t >= 0 && t < steps ? genealogy + t * n : nullptr;
  }
};

// Whether row i follows the in-place form.
FASTSMC_HD inline bool in_place(const int64_t* ancestors, int64_t n, int64_t i) {
  const int64_t a = ancestors[i];
  return a >= 0 && a < n && ancestors[a] == a;
}

struct alignas(16) Word16 {
  uint64_t half[2];
};

// Thread `thread` of `threads` that copy `pieces` runs of `words` words, `pitch` words from start to start; fewer than
// 2^31 in all (a 64-bit division would cost more than the access). Four loads are in flight before the first store.
template <typename Word>
FASTSMC_HD inline void copy_words(const char* from, char* to, int64_t pieces, int64_t pitch, int64_t words, int thread,
                                  int threads) {
  constexpr int kFlight = 4;
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  const uint32_t run = static_cast<uint32_t>(words), gap = static_cast<uint32_t>(pitch - words);
  const uint32_t total = static_cast<uint32_t>(pieces * words);
  for (uint32_t i = thread; i < total; i += kFlight * threads) {
    Word word[kFlight] = {};
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      const uint32_t j = i + k * threads;
      if (j < total) word[k] = source[j + j / run * gap];
    }
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      const uint32_t j = i + k * threads;
      if (j < total) target[j + j / run * gap] = word[k];
    }
  }
}

// The used bytes of block `from` to block `to`, nothing if there is no such block.
FASTSMC_HD inline void copy_block(const BlockCache& cache, int64_t from, int64_t to, int64_t slots, int thread,
                                  int threads) {
  if (!cache.copies(from, to)) return;
  const char* source = cache.base + from * cache.stride;
  char* target = cache.base + to * cache.stride;
  const int64_t bytes = cache.used(slots);
  if (cache.width == 16)
    copy_words<Word16>(source, target, cache.pieces, cache.piece_size / 16, bytes / 16, thread, threads);
  else if (cache.width >= 4)
    copy_words<uint32_t>(source, target, cache.pieces, cache.piece_size / 4, bytes / 4, thread, threads);
  else
    copy_words<uint8_t>(source, target, cache.pieces, cache.piece_size, bytes, thread, threads);
}

// What one thread does: row `row`, caches part, part + parts, …; part 0 also sees to the table and the genealogy.
// Rows that break the in-place form and blocks outside a cache are left alone: on a device nobody has checked them.
FASTSMC_HD inline void reindex_row(const Reindexing& r, const BlockCache* caches, int n_caches, int64_t row, int part,
                                   int parts, int thread, int threads) {
  const int64_t parent = r.ancestors[row];
  if (part == 0 && thread == 0)
    if (int32_t* generation = r.generation()) generation[row] = static_cast<int32_t>(parent);
  if (parent == row || !in_place(r.ancestors, r.n, row)) return;
  const int64_t tokens = r.tokens(parent);
  const int64_t tail = tokens / r.block_size, slots = tokens % r.block_size;
  if (tokens < 0 || tokens > r.columns * r.block_size) return;
  const int32_t* source = r.table + parent * r.stride;
  int32_t* target = r.table + row * r.stride;
  if (part == 0)
    for (int64_t column = thread; column < tail; column += threads) target[column] = source[column];
  if (slots == 0) return;
  const int64_t from = source[tail], to = target[tail];
  for (int c = part; c < n_caches; c += parts) copy_block(caches[c], from, to, slots, thread, threads);
}

}  // namespace fastsmc
