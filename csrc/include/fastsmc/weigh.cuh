// weigh: for a row of logits and a row of log twists, in one streaming pass,
//
//   z_v = logit_v / T            x_v = α z_v + log_psi_v       (float32; log_psi −inf where a mask bit is not set)
//   lse = log Σ_v exp(z_v)       lse_psi = log Σ_v exp(x_v)    (float64)
//   tile_mass[k] = Σ_{v in tile k} exp(x_v − max_v x_v)        (float64)
//
// A row is read in tiles of kTile tokens. The scores of a tile are rounded to float32 into a buffer in the first-level
// cache and their maximum is found; then their exponentials are summed relative to it, in float32 lanes; tiles are
// joined in float64. `draw` later reads one tile again. Scores are held in units of log 2: powers of two need no range
// reduction by multiples of log 2, and the conversion is part of the scaling by 1/T. A score beyond ±2.3e38 counts as
// infinite.
//
// −inf is zero mass. NaN or +inf anywhere in a tile makes its sum NaN without a test per element: exp2_nonpositive
// passes NaN on, and +inf is its own maximum, so that the subtraction gives inf − inf = NaN.
//
// Dead end: no buffer, and the subtraction of the maximum fused into the scaling. The maximum is rounded to float32,
// the fused product is not; with logits of −1e9 (masked tokens) scores then exceed their maximum by more than an
// exponent holds. cpu_weigh.hpp does fuse them, for AVX-512, but only in tiles whose scores lie near a frame.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hd.cuh"

namespace fastsmc {

constexpr int kTile = 1024;
constexpr double kLog2 = 0.6931471805599453;
constexpr float kNegInf = -__builtin_huge_valf();

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct NoTwist {};
struct ZeroTwist {};  // log ψ is 0 everywhere, and yet x is not z: there is a power α
struct NoMask {};  // else a mask is uint32_t words: token v is allowed where bit v % 32 of word v / 32 is set

template <typename Psi, typename Mask>
constexpr bool kReweighs = !std::is_same<Psi, NoTwist>::value || !std::is_same<Mask, NoMask>::value;
// Whether log ψ lies in memory.
template <typename Psi>
constexpr bool kTwists = !std::is_same<Psi, NoTwist>::value && !std::is_same<Psi, ZeroTwist>::value;

// What logits are multiplied by, in units of log 2: 1/T for z, α/T for x.
struct Scale {
  float z, x;
};

FASTSMC_HD inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FASTSMC_HD inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTSMC_HD inline float load(const float* p, int64_t i) { return p[i]; }
FASTSMC_HD inline float load(const bf16* p, int64_t i) { return as_float(static_cast<uint32_t>(p[i].bits) << 16); }
FASTSMC_HD inline float load(const fp16* p, int64_t i) {
  // Exponent rebiased by a multiplication with 2^112, which also makes subnormals right; 31 (inf, NaN) needs a hand.
  const uint32_t h = p[i].bits, magnitude = (h & 0x7fffu) << 13;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  return as_float(((h & 0x8000u) << 16) | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}
FASTSMC_HD inline float load(const NoTwist*, int64_t) { return 0.0f; }
FASTSMC_HD inline float load(const ZeroTwist*, int64_t) { return 0.0f; }

// 2^t for t <= 0, below 2 ulp and exactly 1 at 0: 2^round(t) · polynomial(t − round(t)), minimax of degree 5 on ±1/2.
// Branch-free, so that loops over it vectorise. Below 2^-126.5 the result is 0; NaN gives NaN (hence the product, where
// an addition to the exponent would do: it could turn NaN into a number).
FASTSMC_HD inline float exp2_nonpositive(float t) {
  const float magic = 12582912.0f + 127.0f;  // 1.5·2^23 rounds to an integer in the low bits; 127: the exponent's bias
  const float c = t < -127.0f ? -127.0f : t;
  const float shifted = c + magic;
  const float f = c - (shifted - magic);
  float p = 1.326472731307149e-3f;
  p = p * f + 9.671512991189957e-3f;
  p = p * f + 5.550733581185341e-2f;
  p = p * f + 2.4022242426872253e-1f;
  p = p * f + 6.931470036506653e-1f;
  p = p * f + 1.0f;
  return p * as_float(as_bits(shifted) << 23);  // the shift drops all but round(t) + 127; 0 is the number 0
}

// What logits are multiplied by: 1/T, in units of log 2, in which all elements are held.
FASTSMC_HD inline float logit_scale(double temperature) { return static_cast<float>(1.4426950408889634 / temperature); }

// 0 for the allowed of n tokens, −inf for the others.
FASTSMC_HD inline void unpack_mask(const uint32_t* mask, int n, float* x) {
  for (int w = 0; w < (n + 31) / 32; ++w) {
    const uint32_t word = mask[w];
    for (int bit = 0; bit < 32; ++bit) x[32 * w + bit] = word >> bit & 1 ? 0.0f : kNegInf;
  }
}

// Tile k of a row; null if the row is null.
template <typename T>
FASTSMC_HD inline const T* tile_of(const T* row, int64_t k) {
  return row + k * kTile;
}
FASTSMC_HD inline const NoTwist* tile_of(const NoTwist* row, int64_t) { return row; }
FASTSMC_HD inline const ZeroTwist* tile_of(const ZeroTwist* row, int64_t) { return row; }
FASTSMC_HD inline const NoMask* tile_of(const NoMask* row, int64_t) { return row; }
FASTSMC_HD inline const uint32_t* tile_of(const uint32_t* row, int64_t k) { return row + k * (kTile / 32); }

// a·b + c, rounded once where that is fast. Left to itself a compiler may fuse either product of two, here and there
// differently; scores of a power of 1 have the bits of those without a power.
FASTSMC_HD inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Scaled scores of n tokens, padded with −inf to kTile: z = logit·scale.z and x = logit·scale.x + log_psi/log 2 (only if
// kReweighs); returns their maxima, without NaN.
struct TileMax {
  float z, x;
};
template <typename Logit, typename Psi, typename Mask>
FASTSMC_HD inline TileMax load_tile(const Logit* logits, const Psi* psi, const Mask* mask, int n, Scale scale, float* z,
                                    float* x) {
  constexpr bool masked = !std::is_same<Mask, NoMask>::value, reweighs = kReweighs<Psi, Mask>;
  float z_max = kNegInf, x_max = kNegInf;
  if constexpr (masked) unpack_mask(mask, n, x);
#pragma omp simd reduction(max : z_max, x_max)
  for (int i = 0; i < n; ++i) {
    const float score = load(logits, i) * scale.z;
    z[i] = score;
    z_max = score > z_max ? score : z_max;
    if (reweighs) {
      const float powered = load(logits, i) * scale.x;
      float sum = multiply_add(load(psi, i), 1.44269504f, powered);
      if (masked) sum = x[i] < 0.0f ? powered + kNegInf : sum;
      x[i] = sum;
      x_max = sum > x_max ? sum : x_max;
    }
  }
  for (int i = n; i < kTile; ++i) z[i] = kNegInf;
  if (reweighs)
    for (int i = n; i < kTile; ++i) x[i] = kNegInf;
  return {z_max, reweighs ? x_max : z_max};
}

// Σ 2^(x_i − max) over a tile; NaN if it holds NaN or +inf, 0 if it holds no mass.
FASTSMC_HD inline float sum_tile(const float* x, float max) {
  const float shift = max == kNegInf ? 0.0f : max;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kTile; ++i) sum += exp2_nonpositive(x[i] - shift);
  return sum;
}

// log Σ over tiles. Turns sums[k], relative to shifts[k], into masses relative to `top`, the row's maximum; all in
// units of log 2. No mass: −inf, masses 0, *max −inf. NaN or +inf in the row: NaN, masses 0, *max NaN.
FASTSMC_HD inline double join_tiles(const float* shifts, double* sums, int64_t n_tiles, float top, float* max) {
  bool bad = false;
  for (int64_t k = 0; k < n_tiles; ++k) bad |= sums[k] != sums[k];
  double total = 0.0, factor = 0.0;
  float shift = __builtin_nanf("");  // the shift that `factor` is for: neighbours often share it, and exp2 is costly
  for (int64_t k = 0; k < n_tiles; ++k) {
    if (bad || !(sums[k] > 0.0)) {
      sums[k] = 0.0;
      continue;
    }
    if (!(shifts[k] == shift)) {
      shift = shifts[k];
      factor = exp2(static_cast<double>(shift) - top);
    }
    sums[k] *= factor;
    total += sums[k];
  }
  *max = bad ? __builtin_nanf("") : static_cast<float>(kLog2 * top);
  return bad ? __builtin_nan("") : total > 0.0 ? kLog2 * top + log(total) : -__builtin_huge_val();
}

// Asks for the next tile while this one is summed: hardware prefetchers stop at the end of a page, which a tile of
// float32 just fills. A prefetch past the end of a row is harmless.
template <typename T>
FASTSMC_HD inline void prefetch_tile(const T* p) {
#ifndef __CUDA_ARCH__
  const char* bytes = reinterpret_cast<const char*>(p);
  for (size_t i = 0; i < kTile * sizeof(T); i += 64) __builtin_prefetch(bytes + i);
#endif
}

// As prefetch_tile, for 64 elements while 64 others are summed: all of a tile asked for at once is more than can be on
// its way.
template <typename T>
FASTSMC_HD inline void prefetch64(const T* p) {
#ifndef __CUDA_ARCH__
  for (size_t i = 0; i < 64 * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
#endif
}

// A tile's maxima and Σ 2^(score − shift) of both scores, in units of log 2; x only if kReweighs.
struct TileSums {
  TileMax max, shift;
  float z, x;
};
template <typename Logit, typename Psi, typename Mask>
FASTSMC_HD inline TileSums weigh_tile(const Logit* logits, const Psi* psi, const Mask* mask, int n, Scale scale) {
  constexpr bool reweighs = kReweighs<Psi, Mask>;
  alignas(64) float z[kTile], x[reweighs ? kTile : 1];
  const TileMax max = load_tile(logits, psi, mask, n, scale, z, x);
  prefetch_tile(tile_of(logits, 1));
  if constexpr (kTwists<Psi>) prefetch_tile(tile_of(psi, 1));
  return {max, max, sum_tile(z, max.z), reweighs ? sum_tile(x, max.x) : 0.0f};
}

// One row, by a function as weigh_tile, called for tile after tile. Scratch, n_tiles each: shifts, and if kReweighs
// base_shifts and base_mass; if not, lse_psi = lse.
template <typename Tile, typename Logit, typename Psi, typename Mask>
FASTSMC_HD inline void weigh_row(Tile tile, const Logit* logits, const Psi* psi, const Mask* mask, int64_t vocab,
                                 Scale scale, float* base_shifts, double* base_mass, float* shifts, double* lse,
                                 double* lse_psi, double* tile_mass, float* max_psi) {
  constexpr bool reweighs = kReweighs<Psi, Mask>;
  const int64_t n_tiles = (vocab + kTile - 1) / kTile;
  float top = kNegInf, base_top = kNegInf;
  for (int64_t k = 0; k < n_tiles; ++k) {
    const int64_t first = k * kTile;
    const int n = static_cast<int>(vocab - first < kTile ? vocab - first : kTile);
    const TileSums sums = tile(tile_of(logits, k), tile_of(psi, k), tile_of(mask, k), n, scale);
    const float max = reweighs ? sums.max.x : sums.max.z;
    top = max > top ? max : top;
    shifts[k] = reweighs ? sums.shift.x : sums.shift.z;
    tile_mass[k] = reweighs ? sums.x : sums.z;
    if (reweighs) {
      base_top = sums.max.z > base_top ? sums.max.z : base_top;
      base_shifts[k] = sums.shift.z;
      base_mass[k] = sums.z;
    }
  }
  *lse_psi = *lse = join_tiles(shifts, tile_mass, n_tiles, top, max_psi);
  float base_max;
  if (reweighs) *lse = join_tiles(base_shifts, base_mass, n_tiles, base_top, &base_max);
}

}  // namespace fastsmc
