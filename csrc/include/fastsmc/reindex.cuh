// reindex: a resampling of particles as a rewrite of their block tables. With in-place ancestors (a[a[i]] == a[i]) a
// moved row (a[i] != i) takes its parent's first `n_shared` block ids, and the used bytes of the parent's partly
// filled tail block are copied into its own tail block. Survivors are read and never written, moved rows are written
// and never read: rows and caches may be done in any order, in place.
//
// Example: table [[7, 1], [8, 2]], ancestors [1, 1], n_shared 1, tail 1 -> table [[8, 1], [8, 2]], block 2 copied to 1.
#pragma once
#include <cstdint>
#include <cstring>

#include "hd.cuh"

namespace fastsmc {

// A cache of blocks: block b starts at base + b·stride; its bytes are contiguous.
struct BlockCache {
  char* base;
  int64_t stride;
  int64_t n_blocks;
};
// Bytes [offset, offset + size) of a block.
struct Span {
  int64_t offset, size;
};

// Whether row i follows the in-place form.
FASTSMC_HD inline bool in_place(const int64_t* ancestors, int64_t n, int64_t i) {
  const int64_t a = ancestors[i];
  return a >= 0 && a < n && ancestors[a] == a;
}

FASTSMC_HD inline void share_row(int32_t* table, int64_t stride, int64_t parent, int64_t row, int64_t n_shared) {
  memcpy(table + row * stride, table + parent * stride, sizeof(int32_t) * n_shared);
}

FASTSMC_HD inline void copy_block(const BlockCache& cache, int64_t from, int64_t to, const Span* spans,
                                 int64_t n_spans) {
  for (int64_t s = 0; s < n_spans; ++s)
    memcpy(cache.base + to * cache.stride + spans[s].offset, cache.base + from * cache.stride + spans[s].offset,
           spans[s].size);
}

}  // namespace fastsmc
