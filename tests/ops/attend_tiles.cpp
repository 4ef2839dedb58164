// attend in tiles, as C functions for tests/ops/test_attend.py: with -DEMULATE on tiles in software, without it (to be
// compiled, not run) on the CPU's. They return 0, or 1 where a tile was misused.
#ifdef EMULATE
#include "tiles.hpp"
#define FASTSMC_BF16_TILES 1
#endif
#include "fastsmc/attend.cuh"

#include <exception>

using namespace fastsmc;

template <typename F>
static int status(F f) {
  try {
    TileRegisters registers;
    f();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// attend of bfloat16 for all heads, each head in `runs` tasks. Strides in elements; scale of log 2 units.
extern "C" int attend_in_tiles(const bf16* query, bf16* out, const bf16* key, const bf16* value, int64_t block_stride,
                               int64_t head_stride, int64_t block_size, int64_t head_dim, int layout,
                               const int32_t* blocks, int64_t n_rows, int64_t n_columns, const int32_t* lengths,
                               int64_t length, const int32_t* order, const Node* nodes, int64_t n_nodes, int64_t n_key_heads,
                               int64_t group, float scale, int64_t runs) {
  const PagedKV kv{key, value, block_stride, head_stride, block_size, head_dim, layout};
  const Table table{blocks, n_columns, n_rows, n_columns, lengths, block_size};
  const int64_t stride = n_key_heads * group * head_dim;
  return status([&] {
    for (int64_t head = 0; head < n_key_heads; ++head)
      for (int64_t run = 0; run < runs; ++run)
        attend_task<TileMath>(query, stride, out, stride, kv, table, length, order, nodes, n_nodes,
                              n_rows * run / runs, n_rows * (run + 1) / runs, head, group, scale);
  });
}

extern "C" int product_in_tiles(const bf16* a, int64_t a_stride, int64_t n_rows, const bf16* b, int64_t b_step,
                                int64_t depth, const float* keep, float factor, float* out, int64_t out_stride,
                                int64_t n_groups) {
  return status(
      [&] { product<TileMath>(a, a_stride, n_rows, b, b_step, depth, keep, factor, out, out_stride, n_groups); });
}

#ifdef EMULATE
// TDPBF16PS that ran in this thread so far.
extern "C" int64_t tile_products() { return tiles::state.products; }

// sum (16, 16) += left (16, pairs · 2) right (pairs · 2, 16) of tiles so shaped: what the emulated CPU does with them.
extern "C" int tile_step(float* sum, const bf16* left, const bf16* right, int left_bytes, int right_rows) {
  return status([&] {
    TileShapes shapes;
    shapes.row_bytes[1] = static_cast<uint16_t>(left_bytes), shapes.rows[2] = static_cast<uint8_t>(right_rows);
    _tile_loadconfig(&shapes);
    _tile_loadd(0, sum, 64);
    _tile_loadd(1, left, left_bytes);
    _tile_loadd(2, right, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, sum, 64);
  });
}
#endif
