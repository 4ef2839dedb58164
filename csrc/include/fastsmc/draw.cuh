// draw: one token from one weighed row by a two-level inverse CDF with one uniform.
//
//   1. target = u · Σ_k tile_mass[k] (float64, sequential); the first tile whose cumulative mass exceeds it.
//   2. The fraction of that tile's mass that is left of the target is carried into the tile, whose exponentials are
//      computed again (the same function as in weigh) and accumulated in float64 until they exceed that fraction.
//
// Example: tile masses 1, 0, 3 and u = 0.5: target 2 lies in tile 2, at the fraction (2 − 1)/3 of its mass.
// A fraction, not a residual, so that the tile may be summed relative to its own maximum and cannot run off its end.
// A token of zero mass is never returned: cumulative sums only exceed a target >= 0 where mass is added.
#pragma once
#include "weigh.cuh"

namespace fastsmc {

constexpr int64_t kNoToken = -1;

// First k with mass[0] + … + mass[k] > u · total, and in *u the fraction of mass[k] left of the target, in [0, 1].
// Rounding past the end (u next to 1) gives the last k with mass; no mass at all gives −1.
template <typename Mass>
FASTSMC_HD inline int64_t invert_cdf(const Mass* mass, int64_t n, double* u) {
  double total = 0.0;
  for (int64_t k = 0; k < n; ++k) total += mass[k];
  const double target = *u * total;
  int64_t last = -1;
  double before = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    if (!(mass[k] > Mass(0))) continue;
    last = k;
    if (before + mass[k] > target) {
      *u = (target - before) / mass[k];
      return k;
    }
    before += mass[k];
  }
  *u = 1.0;
  return last;
}

// Token of a row given its tile masses; kNoToken for a row without mass (weigh leaves NaN rows without mass).
template <typename Logit, typename Psi, typename Mask>
FASTSMC_HD inline int64_t draw_row(const Logit* logits, const Psi* psi, const Mask* mask, int64_t vocab, Scale scale,
                                   const double* tile_mass, double u) {
  const int64_t tile = invert_cdf(tile_mass, (vocab + kTile - 1) / kTile, &u);
  if (tile < 0) return kNoToken;
  const int64_t first = tile * kTile;
  const int n = static_cast<int>(vocab - first < kTile ? vocab - first : kTile);
  constexpr bool reweighs = kReweighs<Psi, Mask>;
  alignas(64) float z[kTile], x[reweighs ? kTile : 1];
  const TileMax max = load_tile(tile_of(logits, tile), tile_of(psi, tile), tile_of(mask, tile), n, scale, z, x);
  float* mass = reweighs ? x : z;
#pragma omp simd
  for (int i = 0; i < kTile; ++i) mass[i] = exp2_nonpositive(mass[i] - max.x);
  return first + invert_cdf(mass, n, &u);
}

}  // namespace fastsmc
