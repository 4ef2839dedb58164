// resample: normalisers, offspring counts with E[counts_i] = N W_i, and ancestors from counts, for any number of
// groups.
//
// Weights are integers: q_i = llrint(exp(lw_i − max)·2^40), so that sums are associative and monotone and the answer
// does not depend on who adds what first. With N <= 2^20: Σq = Q <= 2^60, N·Q <= 2^80 (needs 128 bits). A uniform
// becomes an integer below a total by floor(u·total). All that follows is exact, and reference.py does the same. Only
// exp() may differ in its last place between two machines' libraries, and with it a q.
//
// A group is resampled by a team (team.cuh) in phases: maximum; weights and their sums; ESS, log-mean weight and the
// decision; counts; one scan of dead slots and surplus children; where each slot's parent is found.
//
// Sources: Douc & Cappé 2005 (systematic, stratified, multinomial, residual); Gerber, Chopin & Whiteley 2019,
// algorithm 3 (SSP), after nchopin/particles; Murray, Lee & Jacob 2016 (in-place ancestors).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "hd.cuh"
#include "team.cuh"

namespace fastsmc {

using u128 = unsigned __int128;

// A sixth scheme: a name here, a case in count_offspring, and one line each in reference.py, ops/_torch.py, params.py.
enum class Scheme { kSystematic, kStratified, kMultinomial, kResidual, kSsp };
constexpr const char* kSchemeNames[] = {"systematic", "stratified", "multinomial", "residual", "ssp"};

// One group: (N,) each but for the last three. Log weights may hold anything, see resample().
struct Resampling {
  const double *log_weights, *u;
  int64_t n;
  Scheme scheme;
  double threshold;  // resamples if >= 1, or if ESS < threshold·N
  int64_t *ancestors, *counts, *rank;
  double *ess, *log_mean;
  bool* resampled;
  int64_t base = 0;  // what the group's first particle is called among the ancestors
};

// Groups laid flat, all of n particles; or, with offsets, group g at [offsets[g], offsets[g + 1]), of n particles at
// most, and ancestors then count from the first group's first particle.
struct ResamplingGroups {
  Resampling first;           // begins where all groups do
  int64_t groups, particles;  // in all groups
  const int64_t* offsets;     // (groups + 1), or null
  const double* thresholds;   // (groups), or null: first.threshold for all

  // On a device nobody has checked the offsets: a group that is not as it should be counts as empty.
  FASTSMC_HD Resampling group(int64_t g) const {
    Resampling r = first;
    int64_t begin = g * r.n;
    if (offsets) {
      const int64_t end = offsets[g + 1];
      begin = offsets[g];
      const bool valid = 0 <= begin && begin <= end && end <= particles && end - begin <= r.n;
      begin = valid ? begin : 0;
      r.n = valid ? end - begin : 0;
      r.base = begin;
    }
    if (thresholds) r.threshold = thresholds[g];
    r.log_weights += begin, r.u += begin, r.ancestors += begin, r.counts += begin, r.rank += begin;
    r.ess += g, r.log_mean += g, r.resampled += g;
    return r;
  }
};

FASTSMC_HD inline u64 fixed_point(double weight) { return static_cast<u64>(llrint(weight * 0x1p40)); }

// floor(u · total) for u in [0, 1), a multiple of 2^-53, and total <= 2^62; always below total. Any other u counts as
// 0: on a device nobody has checked it, and an index must not leave its array.
FASTSMC_HD inline u64 scale_uniform(double u, u64 total) {
  const u64 bits = u > 0.0 && u < 1.0 ? static_cast<u64>(u * 0x1p53) : 0;
  return static_cast<u64>((static_cast<u128>(bits) * total) >> 53);
}

// Offspring of particles 0..i when `prefix` = q_0 + … + q_i: stratum j holds the point (j + 1 − u_j)·Q/N, counted when
// it is <= prefix. Strata below N·prefix/Q are full, the one at it is partly covered, hence no search. Systematic
// resampling is the case of one common u: then this is floor(N·C_i/C_N + u).
//
// scaled_u(j) = floor(u_j·Q); scale = N/Q. The quotient is at most 2^20, so floating point misses it by one at most;
// and the remainder, which then is between −Q and 2Q, is right modulo 2^64: no division, nothing with 128 bits.
template <typename ScaledUniform>
FASTSMC_HD inline int64_t offspring_until(u64 prefix, u64 total, u64 n, double scale, ScaledUniform scaled_u) {
  int64_t full = static_cast<int64_t>(static_cast<double>(prefix) * scale);
  int64_t rest = static_cast<int64_t>(prefix * n - static_cast<u64>(full) * total);
  if (rest < 0) {
    --full;
    rest += static_cast<int64_t>(total);
  } else if (static_cast<u64>(rest) >= total) {
    ++full;
    rest -= static_cast<int64_t>(total);
  }
  return rest == 0 ? full : full + (static_cast<u64>(rest) + scaled_u(full) >= total);
}

// counts of the strata, from integer weights in cells and their scan.
template <typename Team, typename ScaledUniform>
FASTSMC_HD inline void count_by_strata(Team& team, const Resampling& r, const Scan& scan, const u64* cells,
                                       ScaledUniform scaled_u) {
  const Lanes& lanes = scan.lanes;
  const u64 total = scan.total(), n = static_cast<u64>(r.n);
  const double scale = static_cast<double>(n) / static_cast<double>(total);
  team.each(lanes.count, [&](int lane) {
    u64 prefix = scan.before(lane);
    int64_t before = offspring_until(prefix, total, n, scale, scaled_u);
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
      prefix += cells[i];
      const int64_t until = offspring_until(prefix, total, n, scale, scaled_u);
      r.counts[i] = until - before;
      before = until;
    }
  });
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

// The same, known to be at or after `from`: steps double until they are beyond it.
FASTSMC_HD inline int64_t find_cell_after(const u64* prefix, int64_t n, int64_t from, u64 point) {
  int64_t step = 1;
  for (; from + step <= n && prefix[from + step - 1] <= point; step *= 2) from += step;
  return from + find_cell(prefix + from, from + step <= n ? step : n - from, point);
}

// Srinivasan sampling process: two particles at a time pool their fractional parts until one part is 0 or 1; which of
// them grows is random, so that expectations stay. u[k] serves the k-th of n − 1 such meetings. Each needs the outcome
// of the one before, so one thread does them all. part: the integer weights, overwritten.
FASTSMC_HD inline void ssp(u64* part, int64_t n, u64 total, const double* u, int64_t* counts) {
  for (int64_t i = 0; i < n; ++i) {
    const u64 expected = part[i] * static_cast<u64>(n);
    counts[i] = static_cast<int64_t>(expected / total);
    part[i] = expected % total;
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

// The team's memory, 8-byte words: shared memory of a block, or global memory. Floating-point and integer words apart.
struct ResampleScratch {
  u64* cells;              // (n) integer weights, then prefix sums that are searched
  u64 *values, *totals;    // of the scan
  double *sum, *squares;   // a value per lane; sum holds maxima first
  double *group_sum, *group_squares;
  double* max;             // of the log weights
  bool* resampled;

  FASTSMC_HD ResampleScratch(u64* memory, const Lanes& lanes) {
    cells = memory;
    values = cells + lanes.n;
    totals = values + lanes.size();
    sum = reinterpret_cast<double*>(totals + 2 * lanes.groups + 1);
    squares = sum + lanes.size();
    group_sum = squares + lanes.size();
    group_squares = group_sum + lanes.groups;
    max = group_squares + lanes.groups;
    resampled = reinterpret_cast<bool*>(max + 1);
  }
  // What a group of n particles, or fewer, needs. Fewer may be in more lanes, and as many in more groups of lanes.
  FASTSMC_HD static size_t words(int64_t n) {
    const int lanes = Lanes::most(n), groups = lanes > 8192 ? (lanes + 255) / 256 : 32;
    return n + 3 * (lanes + lanes / 32) + 4 * groups + 3;
  }
};

// ess, log_mean, resampled; leaves integer weights in cells and their scan. Whether the group is to be resampled.
template <typename Team>
FASTSMC_HD inline bool summarise(Team& team, const Resampling& r, const Scan& scan, const ResampleScratch& s) {
  constexpr double kInfinity = __builtin_huge_val();
  const Lanes& lanes = scan.lanes;
  team.each(lanes.count, [&](int lane) {
    double top = -kInfinity;  // +inf, once there is a NaN or +inf
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
      const double lw = r.log_weights[i];
      top = !(lw < kInfinity) ? kInfinity : lw > top ? lw : top;
    }
    s.sum[lanes.at(lane)] = top;
  });
  team.each(lanes.groups, [&](int group) {
    double top = -kInfinity;
    for (int lane = group * lanes.span; lane < lanes.count && lane < (group + 1) * lanes.span; ++lane) {
      const double value = s.sum[lanes.at(lane)];
      top = value > top ? value : top;
    }
    s.group_sum[group] = top;
  });
  team.each(1, [&](int) {
    double top = -kInfinity;
    for (int group = 0; group < lanes.groups; ++group) top = s.group_sum[group] > top ? s.group_sum[group] : top;
    *s.max = top;
    if (top - top == 0.0) return;
    *r.ess = top < kInfinity ? 0.0 : __builtin_nan("");
    *r.log_mean = top < kInfinity ? top : __builtin_nan("");
    *r.resampled = false;
  });
  const double max = *s.max;
  if (!(max - max == 0.0)) return false;  // infinite
  team.each(lanes.count, [&](int lane) {
    double sum = 0.0, squares = 0.0;
    u64 mass = 0;
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
      const double w = exp(r.log_weights[i] - max);
      sum += w;
      squares += w * w;
      mass += s.cells[i] = fixed_point(w);
    }
    s.sum[lanes.at(lane)] = sum;
    s.squares[lanes.at(lane)] = squares;
    s.values[lanes.at(lane)] = mass;
  });
  team.each(lanes.groups, [&](int group) {
    scan.within(group);
    double sum = 0.0, squares = 0.0;
    for (int lane = group * lanes.span; lane < lanes.count && lane < (group + 1) * lanes.span; ++lane) {
      sum += s.sum[lanes.at(lane)];
      squares += s.squares[lanes.at(lane)];
    }
    s.group_sum[group] = sum;
    s.group_squares[group] = squares;
  });
  team.each(lanes.groups + 1, [&](int group) {
    scan.across(group);
    if (group < lanes.groups) return;
    double sum = 0.0, squares = 0.0;
    for (int g = 0; g < lanes.groups; ++g) {
      sum += s.group_sum[g];
      squares += s.group_squares[g];
    }
    *r.ess = sum * sum / squares;
    *r.log_mean = max + log(sum / static_cast<double>(r.n));
    *s.resampled = r.threshold >= 1.0 || *r.ess < r.threshold * static_cast<double>(r.n);
    *r.resampled = *s.resampled;
  });
  return *s.resampled;
}

// `draws` independent draws from the scanned values, prefix sums of which go to cells[i] from mass(cells[i]).
template <typename Team, typename Mass>
FASTSMC_HD inline void add_draws(Team& team, const Resampling& r, const Scan& scan, u64* cells, int64_t draws,
                                 Mass mass) {
  const Lanes& lanes = scan.lanes;
  const u64 total = scan.total();
  team.each(lanes.count, [&](int lane) {
    u64 prefix = scan.before(lane);
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) cells[i] = prefix += mass(cells[i]);
  });
  team.each(static_cast<int>(draws), [&](int j) {
    count_one(r.counts + find_cell(cells, r.n, scale_uniform(r.u[j], total)));
  });
}

// counts, from integer weights in cells and their scan.
template <typename Team>
FASTSMC_HD inline void count_offspring(Team& team, const Resampling& r, const Scan& scan, u64* cells) {
  const Lanes& lanes = scan.lanes;
  const u64 total = scan.total(), n = static_cast<u64>(r.n);
  switch (r.scheme) {
    case Scheme::kSystematic: {
      const u64 common = scale_uniform(r.u[0], total);
      return count_by_strata(team, r, scan, cells, [=](int64_t) { return common; });
    }
    case Scheme::kStratified:
      return count_by_strata(team, r, scan, cells, [&](int64_t j) { return scale_uniform(r.u[j], total); });
    case Scheme::kMultinomial:
      team.each(lanes.count, [&](int lane) {
        for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) r.counts[i] = 0;
      });
      add_draws(team, r, scan, cells, r.n, [](u64 q) { return q; });
      return;
    case Scheme::kResidual: {
      // floor(N W_i) copies, the rest multinomial on the remainders r_i = N q_i mod Q. Σr_i = rest·Q may need 80 bits:
      // the remainders are shifted until the sum fits 62, a relative change below 2^-40.
      team.each(lanes.count, [&](int lane) {
        u64 whole = 0;
        for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
          const u64 copies = cells[i] * n / total;
          r.counts[i] = static_cast<int64_t>(copies);
          whole += copies;
        }
        scan.values[lanes.at(lane)] = whole;
      });
      scan.run(team);
      const u64 rest = n - scan.total();
      int shift = 0;
      while ((static_cast<u128>(total) * rest) >> shift >= (static_cast<u128>(1) << 62)) ++shift;
      const auto remainder = [=](u64 q) { return (q * n % total) >> shift; };
      team.each(lanes.count, [&](int lane) {
        u64 mass = 0;
        for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) mass += remainder(cells[i]);
        scan.values[lanes.at(lane)] = mass;
      });
      scan.run(team);
      add_draws(team, r, scan, cells, static_cast<int64_t>(rest), remainder);
      return;
    }
    case Scheme::kSsp:
      team.each(1, [&](int) { ssp(cells, r.n, total, r.u, r.counts); });
      return;
  }
}

// ancestors and rank from counts. rank: index of a slot among the children of its parent, in slot order.
//
// In place: i stays where it has a child, the r-th dead slot takes the r-th surplus child (slot order).
// Example: counts 2 0 0 1 3 0 -> ancestors 0 0 4 3 4 4, rank 0 1 0 0 1 2.
//
// Slots are looked up among the prefix sums, not written by their parents: then no thread has more to do than others
// when one particle has all children.
template <typename Team>
FASTSMC_HD inline void place_children(Team& team, const Resampling& r, const Scan& scan, u64* cells) {
  const Lanes& lanes = scan.lanes;
  constexpr u64 kLow32 = 0xffffffffu;
  const auto surplus_of = [&](int64_t i) { return static_cast<u64>(r.counts[i] > 0 ? r.counts[i] - 1 : 0); };
  team.each(lanes.count, [&](int lane) {
    u64 dead = 0, surplus = 0;
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
      dead += r.counts[i] == 0;
      surplus += surplus_of(i);
    }
    scan.values[lanes.at(lane)] = surplus << 32 | dead;
  });
  scan.run(team);
  team.each(lanes.count, [&](int lane) {  // cells: surplus children up to and with i
    u64 dead = scan.before(lane) & kLow32, surplus = scan.before(lane) >> 32;
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
      const u64 more = surplus_of(i);
      if (r.counts[i] > 0) {
        r.ancestors[i] = r.base + i;
        const u64 own = dead < surplus ? 0 : dead - surplus;  // its children in dead slots before it
        r.rank[i] = static_cast<int64_t>(own < more ? own : more);
      }
      dead += r.counts[i] == 0;
      surplus += more;
      cells[i] = surplus;
    }
  });
  team.each(lanes.count, [&](int lane) {
    u64 child = scan.before(lane) & kLow32;
    int64_t parent = -1;
    for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
      if (r.counts[i] > 0) continue;
      parent = parent < 0 ? find_cell(cells, r.n, child) : find_cell_after(cells, r.n, parent, child);
      r.ancestors[i] = r.base + parent;
      // The dead slots of one parent come in slot order; its own slot is one before those behind it.
      r.rank[i] = static_cast<int64_t>(child - (cells[parent] - surplus_of(parent))) + (i > parent);
      ++child;
    }
  });
}

// One group. No mass at all, or no particle: ESS 0, log_mean −inf. NaN or +inf among the log weights: both NaN. Either way, or with an
// ESS that is large enough, nothing moves: ancestors are the identity, counts 1, ranks 0, resampled false.
template <typename Team>
FASTSMC_HD inline void resample(Team& team, const Resampling& r, u64* memory) {
  const Lanes lanes(r.n);
  const ResampleScratch s(memory, lanes);
  const Scan scan{lanes, s.values, s.totals};
  if (!summarise(team, r, scan, s)) {
    team.each(lanes.count, [&](int lane) {
      for (int64_t i = lanes.first(lane); i < lanes.last(lane); ++i) {
        r.ancestors[i] = r.base + i;
        r.counts[i] = 1;
        r.rank[i] = 0;
      }
    });
    return;
  }
  count_offspring(team, r, scan, s.cells);
  place_children(team, r, scan, s.cells);
}

}  // namespace fastsmc
