// resample: offspring counts with E[counts_i] = N W_i, and ancestors from counts.
//
// Weights are integers: q_i = llrint(exp(lw_i − max)·2^40), so that sums are associative and monotone and the answer
// does not depend on who adds what first. With N <= 2^20: Σq = Q <= 2^60, N·Q <= 2^80 (needs 128 bits). A uniform
// becomes an integer below a total by floor(u·total). All that follows is exact, reference.py does the same.
// An offspring function: (q, n, total, u, scratch of n, counts). Sources: Douc & Cappé 2005 (systematic, stratified,
// multinomial, residual); Gerber, Chopin & Whiteley 2019, algorithm 3 (SSP), after nchopin/particles.
#pragma once
#include <cmath>
#include <cstdint>

#include "hd.cuh"

namespace fastsmc {

using u64 = uint64_t;
using u128 = unsigned __int128;

FASTSMC_HD inline u64 fixed_point_weight(double log_weight, double max) {
  return static_cast<u64>(llrint(exp(log_weight - max) * 0x1p40));
}

// floor(u · total) for u in [0, 1), a multiple of 2^-53, and total <= 2^62; always below total.
FASTSMC_HD inline u64 scale_uniform(double u, u64 total) {
  return static_cast<u64>((static_cast<u128>(static_cast<u64>(u * 0x1p53)) * total) >> 53);
}

// Offspring of particles 0..i when `prefix` = q_0 + … + q_i: stratum j holds the point (j + 1 − u_j)·Q/N, counted when
// it is <= prefix. Strata below N·prefix/Q are full, the one at it is partly covered, hence no search. Systematic
// resampling is the case of one common u: then this is floor(N·C_i/C_N + u).
FASTSMC_HD inline int64_t offspring_until(u64 prefix, u64 total, int64_t n, const double* u, int stride) {
  const u128 scaled = static_cast<u128>(prefix) * static_cast<u64>(n);
  const u64 full = static_cast<u64>(scaled / total), rest = static_cast<u64>(scaled - static_cast<u128>(full) * total);
  if (rest == 0) return static_cast<int64_t>(full);
  return static_cast<int64_t>(full) + (rest + scale_uniform(u[full * stride], total) >= total);
}

FASTSMC_HD inline void offspring_by_strata(const u64* q, int64_t n, u64 total, const double* u, int stride,
                                           int64_t* counts) {
  u64 prefix = 0;
  int64_t before = 0;
  for (int64_t i = 0; i < n; ++i) {
    prefix += q[i];
    const int64_t until = offspring_until(prefix, total, n, u, stride);
    counts[i] = until - before;
    before = until;
  }
}
FASTSMC_HD inline void systematic(const u64* q, int64_t n, u64 total, const double* u, u64*, int64_t* counts) {
  offspring_by_strata(q, n, total, u, 0, counts);
}
FASTSMC_HD inline void stratified(const u64* q, int64_t n, u64 total, const double* u, u64*, int64_t* counts) {
  offspring_by_strata(q, n, total, u, 1, counts);
}

// First i with prefix[i] > point: cells of zero width are never chosen.
FASTSMC_HD inline int64_t find_cell(const u64* prefix, int64_t n, u64 point) {
  int64_t low = 0;
  for (int64_t length = n; length > 0;) {
    const int64_t half = length / 2;
    const bool right = prefix[low + half] <= point;
    low = right ? low + half + 1 : low;
    length = right ? length - half - 1 : half;
  }
  return low;
}

// Adds `draws` independent draws from `prefix` (sums, total last) to counts.
FASTSMC_HD inline void add_draws(const u64* prefix, int64_t n, int64_t draws, const double* u, int64_t* counts) {
  for (int64_t j = 0; j < draws; ++j) ++counts[find_cell(prefix, n, scale_uniform(u[j], prefix[n - 1]))];
}

FASTSMC_HD inline void multinomial(const u64* q, int64_t n, u64, const double* u, u64* prefix, int64_t* counts) {
  u64 sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    prefix[i] = sum += q[i];
    counts[i] = 0;
  }
  add_draws(prefix, n, n, u, counts);
}

// floor(N W_i) copies, the rest multinomial on the remainders r_i = N q_i mod Q. Σr_i = rest·Q may need 80 bits: the
// remainders are shifted until the sum fits 62, a relative change below 2^-40.
FASTSMC_HD inline void residual(const u64* q, int64_t n, u64 total, const double* u, u64* prefix, int64_t* counts) {
  int64_t rest = n;
  for (int64_t i = 0; i < n; ++i) {
    counts[i] = static_cast<int64_t>(q[i] * static_cast<u64>(n) / total);
    rest -= counts[i];
  }
  int shift = 0;
  while ((static_cast<u128>(total) * static_cast<u64>(rest)) >> shift >= (static_cast<u128>(1) << 62)) ++shift;
  u64 sum = 0;
  for (int64_t i = 0; i < n; ++i) prefix[i] = sum += (q[i] * static_cast<u64>(n) % total) >> shift;
  add_draws(prefix, n, rest, u, counts);
}

// Srinivasan sampling process: the fractional parts of two particles at a time meet until one of them is 0 or 1; the
// winner is random so that expectations stay. u[k] serves the k-th meeting, n − 1 in all.
FASTSMC_HD inline void ssp(const u64* q, int64_t n, u64 total, const double* u, u64* part, int64_t* counts) {
  for (int64_t i = 0; i < n; ++i) {
    counts[i] = static_cast<int64_t>(q[i] * static_cast<u64>(n) / total);
    part[i] = q[i] * static_cast<u64>(n) % total;
  }
  int64_t i = 0, j = 1;
  for (int64_t k = 0; k + 1 < n; ++k) {
    const u64 i_grows = part[j] < total - part[i] ? part[j] : total - part[i];
    const u64 j_grows = part[i] < total - part[j] ? part[i] : total - part[j];
    if (scale_uniform(u[k], i_grows + j_grows) < i_grows) {  // j grows, with probability i_grows/(i_grows + j_grows)
      const int64_t swap = i;
      i = j;
      j = swap;
    }
    if (part[j] < total - part[i]) {  // i takes all of j
      part[i] += part[j];
      j = k + 2;
    } else {  // i becomes a whole child
      part[j] -= total - part[i];
      ++counts[i];
      i = k + 2;
    }
  }
}

// In-place ancestors: i stays where it has a child, the r-th dead slot takes the r-th surplus child (slot order).
// rank: index of a slot among the children of its parent, in slot order.
// Example: counts 0 3 0 1 0 2 -> ancestors 1 1 1 3 5 5, rank 0 1 2 0 0 1.
FASTSMC_HD inline void ancestors_inplace(const int64_t* counts, int64_t n, int64_t* ancestors, int64_t* rank) {
  int64_t parent = 0, left = counts[0] - 1;  // surplus children of `parent` not placed yet
  for (int64_t i = 0; i < n; ++i) {
    if (counts[i] > 0) {
      ancestors[i] = i;
      continue;
    }
    while (left <= 0) left = counts[++parent] - 1;
    ancestors[i] = parent;
    --left;
  }
  // The dead slots of one parent come in slot order. So a child's rank is its index among them, plus one if it lies
  // behind the parent; the parent's rank is the number of its children before it.
  for (int64_t i = 0; i < n; ++i)
    if (ancestors[i] == i) rank[i] = 0;
  int64_t previous = -1, index = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = ancestors[i];
    if (a == i) continue;
    index = a == previous ? index + 1 : 0;
    previous = a;
    rank[i] = index + (i > a);
    rank[a] += i < a;
  }
}

// Sorted ancestors: repeat(i, counts[i]).
FASTSMC_HD inline void ancestors_sorted(const int64_t* counts, int64_t n, int64_t* ancestors, int64_t* rank) {
  for (int64_t i = 0, slot = 0; i < n; ++i)
    for (int64_t r = 0; r < counts[i]; ++r, ++slot) {
      ancestors[slot] = i;
      rank[slot] = r;
    }
}

}  // namespace fastsmc
