// AMX in software, for tests on CPUs without it: the intrinsics that attend.cuh uses, with the shapes, roundings and
// faults of Intel's manual (SDM vol. 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS). Where the
// CPU would raise a fault it throws.
//
// It takes the place of the compiler's: to be included before attend.cuh.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace tiles {

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t bytes[16][64] = {};
};

struct State {
  bool configured = false;
  Tile tile[8];
  int64_t products = 0;  // TDPBF16PS so far
};
inline thread_local State state;

inline void check(bool good, const char* what) {
  if (!good) throw std::runtime_error(what);
}

inline Tile& tile(int i) {
  check(state.configured, "#UD: tiles are not configured");
  check(i >= 0 && i < 8 && state.tile[i].rows > 0, "#UD: a tile without a shape");
  return state.tile[i];
}

inline void load_config(const void* memory) {
  const auto* bytes = static_cast<const uint8_t*>(memory);
  check(bytes[0] == 1 && bytes[1] == 0, "#GP: palette 1 from row 0");
  for (int i = 2; i < 16; ++i) check(bytes[i] == 0, "#GP: a reserved byte");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const uint8_t rows = bytes[48 + i];
    if (i >= 8) {
      check(row_bytes == 0 && rows == 0, "#GP: there are 8 tiles");
      continue;
    }
    check(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0), "#GP: a shape beyond 16 rows of 64 bytes");
    state.tile[i] = {rows, row_bytes, {}};
  }
  state.configured = true;
}

inline void release() {
  const int64_t products = state.products;
  state = State{};
  state.products = products;
}

inline void zero(int i) { memset(tile(i).bytes, 0, sizeof tile(i).bytes); }

inline void load(int i, const void* base, int64_t stride) {
  Tile& t = tile(i);
  memset(t.bytes, 0, sizeof t.bytes);
  for (int r = 0; r < t.rows; ++r) memcpy(t.bytes[r], static_cast<const char*>(base) + r * stride, t.row_bytes);
}

inline void store(int i, void* base, int64_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; ++r) memcpy(static_cast<char*>(base) + r * stride, t.bytes[r], t.row_bytes);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float widen(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}

// Even and odd elements of the pairs have sums of their own, from zero; these two are added, then the old sum.
inline void multiply(int to, int left, int right) {
  check(to != left && to != right && left != right, "#UD: a tile twice");
  Tile &c = tile(to), &a = tile(left), &b = tile(right);
  check(a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes == 4 * b.rows && c.row_bytes % 4 == 0,
        "#UD: shapes that do not fit");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float part[2] = {}, old;
      for (int k = 0; k < b.rows; ++k)
        for (int p = 0; p < 2; ++p)
          part[p] = flushed(std::fma(widen(a.bytes[m] + 4 * k + 2 * p), widen(b.bytes[k] + 4 * n + 2 * p), part[p]));
      memcpy(&old, c.bytes[m] + 4 * n, 4);
      const float sum = flushed(flushed(old) + flushed(part[0] + part[1]));
      memcpy(c.bytes[m] + 4 * n, &sum, 4);
    }
  ++state.products;
}

}  // namespace tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) tiles::load_config(memory)
#define _tile_release() tiles::release()
#define _tile_loadd(i, base, stride) tiles::load(i, base, stride)
#define _tile_stored(i, base, stride) tiles::store(i, base, stride)
#define _tile_zero(i) tiles::zero(i)
#define _tile_dpbf16ps(to, left, right) tiles::multiply(to, left, right)
