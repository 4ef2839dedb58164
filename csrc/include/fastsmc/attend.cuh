// attend: decode attention of R rows over paged keys and values, in which rows that share a block read it together.
//
//   out[r, h] = Σ_t p_t v_t,   p = softmax_t(scale · q[r, h] · k_t),   t < length of row r, k and v through row r of
//                                                                      the table
//
// The table is a forest. Rows that name the same block in a column (and in all columns before it) are particles with
// the same history there, so the sorted rows of the table fall into nested runs. A *node* is such a run of rows with
// the columns over which it stays together: the root holds the prompt and whatever else all rows share, a leaf the tail
// that a row has for itself. `plan_nodes` finds the nodes once per table; every layer of the model reuses them.
//
//   table                   order      nodes (rows of the order, columns)
//   0: 7 8 3                0 2 1      [0, 3) × [0, 1)   block 7, three rows together
//   1: 7 9 5                           [0, 2) × [1, 2)   block 8, rows 0 and 2 together
//   2: 7 8 4                           [0, 1) × [2, 3)   block 3;  [1, 2) × [2, 3)  block 4;  [2, 3) × [1, 3)  9 and 5
//
// Rows may have lengths of their own. A row's columns end with its last token; what the table holds beyond is not looked
// at. Two rows that name the same block with unequal numbers of tokens in it, at the end of one of them, part there: so
// all rows of a node have the same tokens in its columns. Rows may be those of several groups.
//
// A task is a head of the keys and a run of rows. It walks the nodes from the root, kSpan tokens at a time: their keys
// and values are packed once, for the products of all queries of the node (rows × query heads of one key head). Each
// query carries a base, sums and its output along: weights are 2^(score − base).
//
// Arithmetic: bfloat16 is multiplied as it is where the CPU does so in pairs (AVX-512 BF16) or in tiles (AMX), with
// weights p rounded to bfloat16; anything else is widened to float32. Sums and exponentials are always float32.
//
// The bits of a row depend on that row alone: not on which rows share its blocks, on how its columns fall into nodes
// and spans, on other groups of the plan, or on the number of threads. For that, everything is a sum over tokens in
// order, one after the other (the sum of weights in 16 of them, by token % 16), which goes on from span to span. And
// the base is a whole number, the floor of the largest score so far: when it rises, sums are multiplied by a power of
// two, which is exact, and a weight's digits come from the fraction of its score, whatever the base. (So the largest
// weight is in [1, 2). Only where a float32 underflows, 2^-126 of the largest weight and below, does the order in which
// bases rose show.) Tiles add 32 tokens at a time: there it holds for blocks of multiples of 32.
//
// Tiles have only run in an emulation so far (tests/ops/tiles.hpp); their kSpan and kQueries are derived, not measured.
//
// Dead ends, on Zen 4: PyTorch's flash attention for CPUs on the gathered prefix is half as fast as this; and where the
// product is inlined its sums are spilled to memory, which halves the speed too.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define FASTSMC_BF16_PAIRS 1
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define FASTSMC_BF16_TILES 1
#endif
#ifdef FASTSMC_BF16_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "weigh.cuh"

namespace fastsmc {

// How the B tokens × D dimensions of one block and head lie in memory. vLLM's CPU backend uses the last two.
enum KVLayout {
  kPlain = 0,   // keys and values [B][D]
  kVector = 1,  // keys [D][B], values [B][D]
  kTiled = 2,   // keys [B / 16][D / 2][16][2], values [D / 16][B / 2][16][2]: what kernels that multiply pairs read
};

// Block b of head h starts at key (value) + b · block_stride + h · head_stride, in elements.
struct PagedKV {
  const void* key;
  const void* value;
  int64_t block_stride, head_stride, block_size, head_dim;
  int layout;
};

// ---------------------------------------------------------------------------------------------------------------- plan
// A table (R, C) of block ids. Without lengths all rows have as many tokens, in all of its columns.
struct Table {
  const int32_t* blocks;
  int64_t stride, n_rows, n_columns;
  const int32_t* lengths;  // (R,) tokens, at least 1 and at most C · block_size, or null
  int64_t block_size;      // of rows with lengths

  const int32_t* row(int64_t r) const { return blocks + r * stride; }
  int32_t columns(int64_t r) const {
    return static_cast<int32_t>(lengths ? (lengths[r] + block_size - 1) / block_size : n_columns);
  }
  // Tokens of row r in one of its columns.
  int64_t tokens(int64_t r, int64_t column) const { return std::min(block_size, lengths[r] - column * block_size); }

  // The first column in [column, limit) in which rows a and b are not the same, be it that one has ended; else limit.
  // They are the same before `column`.
  int32_t parting(int64_t a, int64_t b, int32_t column, int32_t limit) const {
    const int32_t both = std::min(limit, std::min(columns(a), columns(b)));
    const int32_t* x = row(a);
    const int32_t at = static_cast<int32_t>(std::mismatch(x + column, x + both, row(b) + column).first - x);
    const bool part_inside = lengths && column < both && at == both && tokens(a, at - 1) != tokens(b, at - 1);
    return part_inside ? at - 1 : at;
  }
};

struct Node {
  int32_t row_begin, row_end, column_begin, column_end;
};

// Appends the nodes of sorted rows [begin, end) from `column` on, depth first: a node comes before those below it.
inline void add_nodes(const Table& table, const int32_t* order, int32_t begin, int32_t end, int32_t column,
                      std::vector<Node>& nodes) {
  while (begin < end && table.columns(order[begin]) == column) ++begin;  // these have ended: they come first
  while (begin < end) {
    int32_t stop = begin + 1, until = table.columns(order[begin]);  // rows [begin, stop) agree in [column, until)
    for (; stop < end; ++stop) {
      const int32_t at = table.parting(order[begin], order[stop], column, until);
      if (at == column) break;
      until = at;
    }
    nodes.push_back({begin, stop, column, until});
    add_nodes(table, order, begin, stop, until, nodes);
    begin = stop;
  }
}

inline std::vector<Node> nodes_of(const Table& table, const int32_t* order, int64_t n_rows) {
  std::vector<Node> nodes;
  add_nodes(table, order, 0, static_cast<int32_t>(n_rows), 0, nodes);
  return nodes;
}

// Writes order (R,), the rows sorted by their blocks, and returns the nodes of a table.
inline std::vector<Node> plan_nodes(const Table& table, int32_t* order) {
  std::iota(order, order + table.n_rows, 0);
  std::stable_sort(order, order + table.n_rows, [&](int32_t a, int32_t b) {
    const int32_t until_a = table.columns(a), until_b = table.columns(b);
    const int32_t at = table.parting(a, b, 0, until_a);
    if (at == until_a || at == until_b) return until_a < until_b;
    const int32_t x = table.row(a)[at], y = table.row(b)[at];
    return x != y ? x < y : table.tokens(a, at) < table.tokens(b, at);
  });
  return nodes_of(table, order, table.n_rows);
}

// What one group reads: nodes, and the columns of all nodes together.
struct Reads {
  int64_t nodes, columns;
};

// What each group would read if its rows, [offsets[g], offsets[g + 1]), were alone.
inline std::vector<Reads> count_reads(const Table& table, const int32_t* order, const int32_t* offsets,
                                      int64_t n_groups) {
  std::vector<std::vector<int32_t>> rows(n_groups);
  for (int64_t i = 0; i < table.n_rows; ++i)
    rows[std::upper_bound(offsets, offsets + n_groups + 1, order[i]) - offsets - 1].push_back(order[i]);
  std::vector<Reads> reads;
  for (const std::vector<int32_t>& sorted : rows) {
    Reads sum{};
    for (const Node& n : nodes_of(table, sorted.data(), sorted.size()))
      ++sum.nodes, sum.columns += n.column_end - n.column_begin;
    reads.push_back(sum);
  }
  return reads;
}

// ------------------------------------------------------------------------------------------------------------- packing
// Operands of a product of MR rows and 16-wide groups of columns: element (i, j) of the right one, i in [0, K) summed
// over, lies at [j / 16][i / P][j % 16][i % P], with P elements of a 32-bit lane: 2 bf16 or 1 float.
constexpr int kLanes = 16;
using Floats = float __attribute__((vector_size(64)));

// kSpan: tokens packed at a time. With a task's queries they fill half of the second-level cache.
// kQueries: queries whose scores are held at a time. With their weights they fit the first-level cache.
struct PairMath {
  using Packed = bf16;
  static constexpr int kPair = 2;
  static constexpr int64_t kSpan = 512, kQueries = 12;
};
struct FloatMath {
  using Packed = float;
  static constexpr int kPair = 1;
  static constexpr int64_t kSpan = 512, kQueries = 12;
};
// Two rows of tiles, so that each tile of keys or values that is loaded serves 32 queries; the span is shorter to make
// room for them.
struct TileMath {
  using Packed = bf16;
  static constexpr int kPair = 2;
  static constexpr int64_t kSpan = 256, kQueries = 32;
};

#ifdef FASTSMC_BF16_PAIRS
using NarrowMath = PairMath;
#else
using NarrowMath = FloatMath;
#endif

inline bf16 to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline fp16 to_fp16(float x) {
  const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u)  // subnormal: the addition rounds to a multiple of 2^-24
    return {static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u))};
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}
template <typename Packed, typename T>
inline Packed pack_as(const T* p, int64_t i) {
  if constexpr (std::is_same_v<Packed, T>) return p[i];
  else if constexpr (std::is_same_v<Packed, float>) return load(p, i);
  else return to_bf16(load(p, i));
}

// Element (token, dim) of a block's keys or values.
inline int64_t key_at(int layout, int64_t block_size, int64_t head_dim, int64_t token, int64_t dim) {
  if (layout == kPlain) return token * head_dim + dim;
  if (layout == kVector) return dim * block_size + token;
  return (token / 16) * 16 * head_dim + (dim / 2) * 32 + (token % 16) * 2 + dim % 2;
}
inline int64_t value_at(int layout, int64_t block_size, int64_t head_dim, int64_t token, int64_t dim) {
  if (layout != kTiled) return token * head_dim + dim;
  return (dim / 16) * 16 * block_size + (token / 2) * 32 + (dim % 16) * 2 + token % 2;
}

#ifdef FASTSMC_BF16_PAIRS
// Rows of 32 elements a and b as two registers of pairs (a_i, b_i), i in [0, 16) and [16, 32).
inline void interleave(const bf16* a, const bf16* b, bf16* low, bf16* high) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i pick = _mm512_load_si512(kLow), x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(x, pick, y));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16(x, _mm512_add_epi16(pick, _mm512_set1_epi16(16)), y));
}
#endif

// Packs the keys of the first `n_tokens` of a block, and up to 31 more: columns are tokens, summed over dims. `out`:
// its groups of 16 tokens, D · 16 elements each.
template <typename Math, typename T>
void pack_keys(const T* block, const PagedKV& kv, int64_t n_tokens, typename Math::Packed* out) {
  const int64_t B = kv.block_size, D = kv.head_dim;
  constexpr int P = Math::kPair;
  if constexpr (P == 2 && std::is_same_v<T, bf16>) {
    if (kv.layout == kTiled) {
      memcpy(out, block, sizeof(bf16) * n_tokens * D);
      return;
    }
#ifdef FASTSMC_BF16_PAIRS
    if (kv.layout == kVector && B % 32 == 0) {
      for (int64_t d = 0; d < D; d += 2)
        for (int64_t t = 0; t < n_tokens; t += 32) {
          bf16* group = out + t * D + d * kLanes;
          interleave(block + d * B + t, block + (d + 1) * B + t, group, group + kLanes * D);
        }
      return;
    }
#endif
  }
  if (P == 1 && kv.layout == kVector) {  // the same loops as below, contiguous
    for (int64_t t = 0; t < n_tokens; t += kLanes)
      for (int64_t d = 0; d < D; ++d)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          out[t * D + d * kLanes + lane] = pack_as<typename Math::Packed>(block, d * B + t + lane);
    return;
  }
  for (int64_t t = 0; t < n_tokens; t += kLanes)
    for (int64_t d = 0; d < D; d += P)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t p = 0; p < P; ++p)
          out[t * D + d * kLanes + lane * P + p] =
              pack_as<typename Math::Packed>(block, key_at(kv.layout, B, D, t + lane, d + p));
}

// Packs the values of the first `n_tokens` (even) of a block: columns are dims, summed over tokens. `out`: the block's
// place in the first group of 16 dims, whose groups are `group_step` elements apart.
template <typename Math, typename T>
void pack_values(const T* block, const PagedKV& kv, int64_t n_tokens, int64_t group_step, typename Math::Packed* out) {
  const int64_t B = kv.block_size, D = kv.head_dim;
  constexpr int P = Math::kPair;
  if constexpr (P == 2 && std::is_same_v<T, bf16>) {
    if (kv.layout == kTiled) {
      for (int64_t d = 0; d < D; d += kLanes)
        memcpy(out + (d / kLanes) * group_step, block + d * B, sizeof(bf16) * kLanes * n_tokens);
      return;
    }
#ifdef FASTSMC_BF16_PAIRS
    if (D % 32 == 0) {
      for (int64_t t = 0; t < n_tokens; t += 2)
        for (int64_t d = 0; d < D; d += 32) {
          bf16* group = out + (d / kLanes) * group_step + t * kLanes;
          interleave(block + t * D + d, block + (t + 1) * D + d, group, group + group_step);
        }
      return;
    }
#endif
  }
  if (P == 1 && kv.layout != kTiled) {  // the same loops as below, contiguous
    for (int64_t t = 0; t < n_tokens; ++t)
      for (int64_t d = 0; d < D; d += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          out[(d / kLanes) * group_step + t * kLanes + lane] = pack_as<typename Math::Packed>(block, t * D + d + lane);
    return;
  }
  for (int64_t t = 0; t < n_tokens; t += P)
    for (int64_t d = 0; d < D; ++d)
      for (int64_t p = 0; p < P; ++p)
        out[(d / kLanes) * group_step + t * kLanes + (d % kLanes) * P + p] =
            pack_as<typename Math::Packed>(block, value_at(kv.layout, B, D, t + p, d));
}

// Zeros for packed values of tokens [begin, end): no one wrote them, they may be NaN, and 0 · NaN is not 0.
template <typename Math>
void blank_values(int64_t begin, int64_t end, int64_t head_dim, int64_t group_step, typename Math::Packed* out) {
  constexpr int P = Math::kPair;
  for (int64_t d = 0; d < head_dim; d += kLanes, out += group_step) {
    int64_t t = begin;
    if (t % P != 0) {
      for (int64_t lane = 0; lane < kLanes; ++lane) out[(t - t % P) * kLanes + lane * P + t % P] = {};
      ++t;
    }
    std::fill(out + t * kLanes, out + end * kLanes, typename Math::Packed{});
  }
}

// ------------------------------------------------------------------------------------------------------------ products
// Whether this process may use tiles: the kernel wants to be asked once. The CPU was known when this was compiled.
inline bool may_use_tiles() {
#ifdef FASTSMC_BF16_TILES
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// sum[m][n] += Σ_k a[m][k] · b[k][16 n : 16 n + 16], `depth` elements k; `b` packed, its groups b_step apart.
template <int MR, int NR>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_step, int64_t depth,
                     Floats (&sum)[MR][NR]) {
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[NR];
    for (int n = 0; n < NR; ++n) memcpy(&right[n], b + n * b_step + k * kLanes, sizeof(Floats));
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NR; ++n) sum[m][n] += a[m * a_stride + k] * right[n];
  }
}
#ifdef FASTSMC_BF16_PAIRS
template <int MR, int NR>
inline void multiply(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_step, int64_t depth,
                     Floats (&sum)[MR][NR]) {
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[NR];
    for (int n = 0; n < NR; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + n * b_step + k * kLanes);
    for (int m = 0; m < MR; ++m) {
      int32_t pair;
      memcpy(&pair, a + m * a_stride + k, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < NR; ++n) sum[m][n] = (Floats)_mm512_dpbf16_ps((__m512)sum[m][n], left, right[n]);
    }
  }
}
#endif

constexpr int kRowBlock = 6, kColumnBlock = 4;  // 24 sums in registers

// out[m][16 n ...] = keep[m] · out[m][16 n ...] + a b, or, with keep null, factor · a b: MR rows and NR groups.
// Not inlined: within a larger function its sums would not stay in registers.
template <int MR, int NR, typename Packed>
__attribute__((noinline)) void product_block(const Packed* a, int64_t a_stride, const Packed* b, int64_t b_step,
                                             int64_t depth, const float* keep, float factor, float* out,
                                             int64_t out_stride) {
  Floats sum[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) {
      if (keep) {
        memcpy(&sum[m][n], out + m * out_stride + n * kLanes, sizeof(Floats));
        sum[m][n] *= keep[m];
      } else {
        sum[m][n] = Floats{};
      }
    }
  multiply<MR, NR>(a, a_stride, b, b_step, depth, sum);
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) {
      if (!keep) sum[m][n] *= factor;
      memcpy(out + m * out_stride + n * kLanes, &sum[m][n], sizeof(Floats));
    }
}

template <int MR, typename Packed>
inline void product_rows(const Packed* a, int64_t a_stride, const Packed* b, int64_t b_step, int64_t depth,
                         const float* keep, float factor, float* out, int64_t out_stride, int64_t n_groups) {
  int64_t n = 0;
  for (; n + kColumnBlock <= n_groups; n += kColumnBlock)
    product_block<MR, kColumnBlock>(a, a_stride, b + n * b_step, b_step, depth, keep, factor, out + n * kLanes,
                                    out_stride);
  for (; n + 2 <= n_groups; n += 2)
    product_block<MR, 2>(a, a_stride, b + n * b_step, b_step, depth, keep, factor, out + n * kLanes, out_stride);
  if (n < n_groups)
    product_block<MR, 1>(a, a_stride, b + n * b_step, b_step, depth, keep, factor, out + n * kLanes, out_stride);
}

#ifdef FASTSMC_BF16_TILES
// The same in tiles (AMX): a register holds 16 rows of 64 bytes, and one instruction adds the product of 16 rows of 32
// elements a with 16 pairs × 16 columns of b to 16 × 16 sums. Packed operands are such tiles as they lie: a group of b
// is 64 bytes a pair, `depth` / 2 pairs long.
//
//   registers   0 1   sums of 2 × 2 tiles     4  a     6  the last 16 of a depth that is no multiple of 32: its a,
//               2 3                           5  b     7  and its b
//
// All shapes are of one configuration, so that nothing is set up within a task. Rows beyond n_rows are read (n_rows
// rounded up to 16 must be readable) and not written: sums go through a buffer, from which the real rows are taken.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};

// A thread's registers, as long as it lives. oneDNN and vLLM configure theirs anew before they use them.
struct TileRegisters {
  TileRegisters() {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
};

// sums of MT × NT tiles into out, rows of 32; with `more` added to what stands there, one step of 32 after the other.
template <int MT, int NT>
__attribute__((noinline)) void tile_block(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_step, int64_t depth,
                                          bool more, float* out) {
  constexpr int64_t kDepth = 32, kTileRows = 16;
  const int64_t a_bytes = a_stride * sizeof(bf16), b_bytes = 64, out_bytes = 2 * kLanes * sizeof(float);
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory: all is written by now
  if (more) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (NT == 2) _tile_loadd(1, out + kLanes, out_bytes);
    if constexpr (MT == 2) _tile_loadd(2, out + kTileRows * 2 * kLanes, out_bytes);
    if constexpr (MT == 2 && NT == 2) _tile_loadd(3, out + kTileRows * 2 * kLanes + kLanes, out_bytes);
  } else {
    _tile_zero(0);
    if constexpr (NT == 2) _tile_zero(1);
    if constexpr (MT == 2) _tile_zero(2);
    if constexpr (MT == 2 && NT == 2) _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) {
    const bf16 *left = a + k, *below = left + kTileRows * a_stride, *right = b + k * kLanes;
    _tile_loadd(4, left, a_bytes);
    _tile_loadd(5, right, b_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (MT == 2) {
      _tile_loadd(4, below, a_bytes);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (NT == 2) {
      _tile_loadd(5, right + b_step, b_bytes);
      if constexpr (MT == 2) {
        _tile_dpbf16ps(3, 4, 5);
        _tile_loadd(4, left, a_bytes);
      }
      _tile_dpbf16ps(1, 4, 5);
    }
  }
  if (k < depth) {
    const bf16 *left = a + k, *below = left + kTileRows * a_stride, *right = b + k * kLanes;
    _tile_loadd(6, left, a_bytes);
    _tile_loadd(7, right, b_bytes);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (MT == 2) {
      _tile_loadd(6, below, a_bytes);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (NT == 2) {
      _tile_loadd(7, right + b_step, b_bytes);
      if constexpr (MT == 2) {
        _tile_dpbf16ps(3, 6, 7);
        _tile_loadd(6, left, a_bytes);
      }
      _tile_dpbf16ps(1, 6, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (NT == 2) _tile_stored(1, out + kLanes, out_bytes);
  if constexpr (MT == 2) _tile_stored(2, out + kTileRows * 2 * kLanes, out_bytes);
  if constexpr (MT == 2 && NT == 2) _tile_stored(3, out + kTileRows * 2 * kLanes + kLanes, out_bytes);
}

// As `product` below; depth and n_groups · 16 are multiples of 16.
inline void tile_product(const bf16* a, int64_t a_stride, int64_t n_rows, const bf16* b, int64_t b_step, int64_t depth,
                         const float* keep, float factor, float* out, int64_t out_stride, int64_t n_groups) {
  alignas(64) float sums[32 * 2 * kLanes] = {};
  for (int64_t m = 0; m < n_rows; m += 32) {
    const int64_t n_here = std::min<int64_t>(32, n_rows - m);
    for (int64_t n = 0; n < n_groups; n += 2) {
      const bool two = n + 1 < n_groups;
      const auto block = n_here > 16 ? (two ? tile_block<2, 2> : tile_block<2, 1>)
                                     : (two ? tile_block<1, 2> : tile_block<1, 1>);
      const auto each = [&](auto f) {  // f(16 sums, where they belong, row)
        for (int64_t i = 0; i < n_here; ++i)
          for (int64_t j = 0; j < (two ? 2 : 1); ++j)
            f(sums + (2 * i + j) * kLanes, out + (m + i) * out_stride + (n + j) * kLanes, m + i);
      };
      const auto scale = [](const float* from, float by, float* to) {
        Floats x;
        memcpy(&x, from, sizeof x);
        x *= by;
        memcpy(to, &x, sizeof x);
      };
      if (keep) each([&](float* sum, float* to, int64_t row) { scale(to, keep[row], sum); });
      block(a + m * a_stride, a_stride, b + n * b_step, b_step, depth, keep != nullptr, sums);
      each([&](float* sum, float* to, int64_t) { scale(sum, keep ? 1.0f : factor, to); });
    }
  }
}
#endif

template <typename Packed>
inline void vector_product(const Packed* a, int64_t a_stride, int64_t n_rows, const Packed* b, int64_t b_step,
                           int64_t depth, const float* keep, float factor, float* out, int64_t out_stride,
                           int64_t n_groups) {
  const auto rows = [&](auto count, int64_t m) {
    product_rows<decltype(count)::value>(a + m * a_stride, a_stride, b, b_step, depth, keep ? keep + m : nullptr,
                                         factor, out + m * out_stride, out_stride, n_groups);
  };
  int64_t m = 0;
  for (; m + kRowBlock <= n_rows; m += kRowBlock) rows(std::integral_constant<int, kRowBlock>{}, m);
  switch (n_rows - m) {
    case 5: return rows(std::integral_constant<int, 5>{}, m);
    case 4: return rows(std::integral_constant<int, 4>{}, m);
    case 3: return rows(std::integral_constant<int, 3>{}, m);
    case 2: return rows(std::integral_constant<int, 2>{}, m);
    case 1: return rows(std::integral_constant<int, 1>{}, m);
    default: return;
  }
}

// n_rows rows and n_groups groups of the same: with keep and factor as in product_block.
template <typename Math, typename Packed>
inline void product(const Packed* a, int64_t a_stride, int64_t n_rows, const Packed* b, int64_t b_step, int64_t depth,
                    const float* keep, float factor, float* out, int64_t out_stride, int64_t n_groups) {
#ifdef FASTSMC_BF16_TILES
  if constexpr (std::is_same_v<Math, TileMath>)
    tile_product(a, a_stride, n_rows, b, b_step, depth, keep, factor, out, out_stride, n_groups);
  else
#endif
    vector_product(a, a_stride, n_rows, b, b_step, depth, keep, factor, out, out_stride, n_groups);
}

// ------------------------------------------------------------------------------------------------------------- softmax
inline void store_lanes(Floats x, float* out) { memcpy(out, &x, sizeof x); }
inline void store_lanes(Floats x, fp16* out) {
  for (int i = 0; i < kLanes; ++i) out[i] = to_fp16(x[i]);
}
inline void store_lanes(Floats x, bf16* out) {
#ifdef FASTSMC_BF16_PAIRS
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  for (int i = 0; i < kLanes; ++i) out[i] = to_bf16(x[i]);
#endif
}

// f over the 16 lanes, halves first.
template <typename F>
inline float fold(Floats x, F f) {
  using Ints = int32_t __attribute__((vector_size(64)));
  x = f(x, __builtin_shuffle(x, Ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  x = f(x, __builtin_shuffle(x, Ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  x = f(x, __builtin_shuffle(x, Ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  x = f(x, __builtin_shuffle(x, Ints{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return x[0];
}

// 2^(t − base) of 16 numbers, base a whole number >= floor(t): 2^(floor(t) − base) · polynomial, which is minimax for 2^x
// on [0, 1). So the digits do not depend on the base. Relative error 9e-8, and 7.5e-5 where `Packed` is bfloat16, which
// rounds by 2e-3. NaN and +inf (with a base of +inf) give NaN, −inf gives 0.
template <typename Packed>
inline Floats exp2_lanes(Floats t, float base) {
  const Floats lowest = Floats{} - 3.4028235e38f;
  t = lowest > t ? lowest : t;  // −inf − −inf would be NaN; NaN stays
#ifdef __AVX512DQ__
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)t, 0x09);  // (reducing to x instead takes twice as long)
  const Floats x = t - whole;
  Floats p;
  if constexpr (std::is_same_v<Packed, bf16>) {
    p = x * 7.802452147006989e-2f + 2.2606715559959412e-1f;
    p = p * x + 6.958335638046265e-1f;
    p = p * x + 9.999251961708069e-1f;
  } else {
    p = x * 1.877577742561698e-3f + 8.989337831735611e-3f;
    p = p * x + 5.582632124423981e-2f;
    p = p * x + 2.4015361070632935e-1f;
    p = p * x + 6.931530833244324e-1f;
    p = p * x + 9.999999403953552e-1f;
  }
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)(whole - base));
#else
  for (int i = 0; i < kLanes; ++i) {
    const float whole = std::floor(t[i]);
    t[i] = 2.0f * exp2_nonpositive((t[i] - whole) - 1.0f) * exp2_nonpositive(whole - base);
  }
  return t;
#endif
}

// Turns n scores of one query (a multiple of 16, in units of log 2, the first n_valid of them real) into weights
// 2^(score − base), and adds them to `sums`, 16 of them; raises the base to the floor of the largest score, and returns
// the power of two by which the output so far must be multiplied for that. (Scores come scaled: a scaling fused with
// the subtraction of the base could leave huge scores above it.)
template <typename Packed>
inline float soften(float* scores, int64_t n, int64_t n_valid, float* base, float* sums, Packed* weights) {
  for (int64_t t = n_valid; t < n; ++t) scores[t] = kNegInf;
  const auto larger = [](Floats a, Floats b) { return a > b ? a : b; };
  Floats x, part, lanes = Floats{} + kNegInf;
  for (int64_t t = 0; t < n; t += kLanes) {
    memcpy(&x, scores + t, sizeof x);
    lanes = larger(x, lanes);
  }
  const float top = std::max(*base, std::floor(fold(lanes, larger)));
  const float now = top == kNegInf ? 0.0f : top;  // no mass yet: weights 0, not NaN
  const float keep = exp2_nonpositive(*base - now);
  memcpy(&part, sums, sizeof part);
  part *= keep;
  for (int64_t t = 0; t < n; t += kLanes) {
    memcpy(&x, scores + t, sizeof x);
    x = exp2_lanes<Packed>(x, now);
    part += x;
    store_lanes(x, weights + t);
  }
  memcpy(sums, &part, sizeof part);
  *base = top;
  return keep;
}

// -------------------------------------------------------------------------------------------------------------- a task
// What a thread keeps between tasks: fresh memory for each task would cost page faults.
template <typename Math>
struct Scratch {
  static constexpr int64_t kQueries = Math::kQueries;
  std::vector<typename Math::Packed> queries, keys, values, weights;
  std::vector<float> sums, bases, outputs, scores, keep;

  void prepare(int64_t n, int64_t head_dim, int64_t span) {
    queries.resize((n + kQueries) * head_dim);  // tiles read whole
    keys.resize(span * head_dim), values.resize(span * head_dim);
    weights.resize(kQueries * span), scores.resize(kQueries * span), keep.resize(kQueries);
    sums.assign(n * kLanes, 0.0f), bases.assign(n, kNegInf), outputs.assign(n * head_dim, 0.0f);
  }
};

// Attends for rows order[row_begin : row_end), with the queries that belong to key head `head`. With TileMath the
// calling thread must hold TileRegisters.
//   query, out: (R, n_heads, D) with a stride per row in elements; table as in `plan_nodes`.
//   length: tokens of each row, where the table has no lengths.
template <typename Math, typename T>
void attend_task(const T* query, int64_t query_stride, T* out, int64_t out_stride, const PagedKV& kv,
                 const Table& table, int64_t length, const int32_t* order, const Node* nodes, int64_t n_nodes,
                 int64_t row_begin, int64_t row_end, int64_t head, int64_t heads_per_key, float scale) {
  using Packed = typename Math::Packed;
  const int64_t B = kv.block_size, D = kv.head_dim, G = heads_per_key, n = (row_end - row_begin) * G;
  constexpr int64_t kQueries = Math::kQueries;
  const int64_t span = std::max(B, Math::kSpan / B * B), n_groups = D / kLanes;
  static thread_local Scratch<Math> scratch;
  scratch.prepare(n, D, span);
  auto& [queries, keys, values, weights, sums, bases, outputs, scores, keep] = scratch;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* from = query + order[r] * query_stride + head * G * D;
    for (int64_t i = 0; i < G * D; ++i) queries[(r - row_begin) * G * D + i] = pack_as<Packed>(from, i);
  }
  for (int64_t k = 0; k < n_nodes; ++k) {
    const int64_t first = std::max<int64_t>(nodes[k].row_begin, row_begin);
    const int64_t last = std::min<int64_t>(nodes[k].row_end, row_end);
    if (first >= last) continue;
    const int32_t* blocks = table.row(order[first]);
    const int64_t tokens = table.lengths ? table.lengths[order[first]] : length;  // as far as these columns go
    for (int64_t c = nodes[k].column_begin; c < nodes[k].column_end; c += span / B) {
      const int64_t n_blocks = std::min<int64_t>(span / B, nodes[k].column_end - c);
      const int64_t n_valid = std::min(n_blocks * B, tokens - c * B);
      const int64_t n_tokens = (n_valid + kLanes - 1) / kLanes * kLanes;
      for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t at = blocks[c + b] * kv.block_stride + head * kv.head_stride;
        const int64_t n_here = std::min(B, n_tokens - b * B);
        pack_keys<Math>(static_cast<const T*>(kv.key) + at, kv, n_here, keys.data() + b * B * D);
        pack_values<Math>(static_cast<const T*>(kv.value) + at, kv, n_here, span * kLanes,
                          values.data() + b * B * kLanes);
      }
      blank_values<Math>(n_valid, n_tokens, D, span * kLanes, values.data());
      for (int64_t q = (first - row_begin) * G; q < (last - row_begin) * G; q += kQueries) {
        const int64_t m = std::min(kQueries, (last - row_begin) * G - q);
        for (int64_t t = 0; t < n_tokens; t += kColumnBlock * kLanes)  // keys of 64 tokens stay in the nearest cache
          product<Math>(queries.data() + q * D, D, m, keys.data() + t * D, D * kLanes, D, nullptr, scale,
                        scores.data() + t, span, std::min<int64_t>(kColumnBlock, (n_tokens - t) / kLanes));
        for (int64_t i = 0; i < m; ++i)
          keep[i] = soften(scores.data() + i * span, n_tokens, n_valid, &bases[q + i], &sums[(q + i) * kLanes],
                           weights.data() + i * span);
        product<Math>(weights.data(), span, m, values.data(), span * kLanes, n_tokens, keep.data(), 1.0f,
                      outputs.data() + q * D, D, n_groups);
      }
    }
  }
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t i = 0; i < G; ++i) {
      const int64_t q = (r - row_begin) * G + i;
      T* to = out + order[r] * out_stride + (head * G + i) * D;
      Floats x;
      memcpy(&x, sums.data() + q * kLanes, sizeof x);
      const float share = 1.0f / fold(x, [](Floats a, Floats b) { return a + b; });
      for (int64_t d = 0; d < D; d += kLanes) {
        memcpy(&x, outputs.data() + q * D + d, sizeof x);
        store_lanes(x * share, to + d);
      }
    }
  }
}

}  // namespace fastsmc
