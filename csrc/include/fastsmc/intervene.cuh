// intervene: a low-rank affine map of each row's own, in place: x ← x + U_s (V_sᵀ y) + c_s for a row of slot s.
//
//   slots     (R,)      the slot of each row; −1: the row is left as it is, bit for bit
//   offsets   (S + 1,)  slot s has the factors [offsets[s], offsets[s + 1])
//   down, up  (F, K), (F, H)   factor f's column of V and of U, as rows
//   shift     (S, H)    c
//   y         (R, K)    what V reads: x itself, or another tensor
//
// Example, H = 2: slot 0 has no factor and c = (1, 0), slot 1 has down = up = (0, 2) and c = 0. Of rows (3, 4) with slots
// 0, 1, −1 come (4, 4), (3, 4 + 2·8) and (3, 4). All arithmetic is float32; x is rounded once, where it is stored.
//
// Rows of one slot that are neighbours go in blocks of kRows: a factor is then read once for all of them, which is what
// a full-rank map costs. `finite[s]` is cleared where a row of slot s comes out infinite or NaN.
#pragma once
#include <algorithm>

#include "attend.cuh"

namespace fastsmc {

constexpr int kInterveneRows = 8;

template <typename T>
inline void store(T* p, int64_t i, float x) {
  if constexpr (std::is_same_v<T, float>) p[i] = x;
  else if constexpr (std::is_same_v<T, bf16>) p[i] = to_bf16(x);
  else p[i] = to_fp16(x);
}

// Addresses and row strides in elements; finite may be null.
struct Intervention {
  int64_t width, source_width;
  const int64_t* offsets;
  const float *down, *up, *shift;
  bool* finite;
};

// n <= kInterveneRows rows of slot s: x[j] reads source[j]. `y` holds n·source_width floats, `sum` n·width.
template <typename T>
inline void intervene_rows(const Intervention& of, int64_t s, int n, T* const* x, const T* const* source, float* y,
                           float* sum) {
  const int64_t H = of.width, K = of.source_width;
  for (int j = 0; j < n; ++j) {
    std::copy_n(of.shift + s * H, H, sum + j * H);
    if (of.offsets[s] < of.offsets[s + 1])
      for (int64_t k = 0; k < K; ++k) y[j * K + k] = load(source[j], k);
  }
  for (int64_t f = of.offsets[s]; f < of.offsets[s + 1]; ++f) {
    const float *down = of.down + f * K, *up = of.up + f * H;
    for (int j = 0; j < n; ++j) {
      const float* row = y + j * K;
      float* to = sum + j * H;
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t k = 0; k < K; ++k) dot += row[k] * down[k];
#pragma omp simd
      for (int64_t h = 0; h < H; ++h) to[h] += dot * up[h];
    }
  }
  for (int j = 0; j < n; ++j) {
    T* row = x[j];
    const float* change = sum + j * H;
    uint32_t most = 0;  // magnitude of the largest value as stored; that of an infinity or NaN has all bits of exponent
#pragma omp simd reduction(max : most)
    for (int64_t h = 0; h < H; ++h) {
      store(row, h, load(row, h) + change[h]);
      const uint32_t magnitude = as_bits(load(row, h)) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    if (of.finite && most >= 0x7f800000u) of.finite[s] = false;
  }
}

}  // namespace fastsmc
