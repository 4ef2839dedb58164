// redraw: what Gumbel-max noise that gave token k under p = softmax(ℓ/T) would have given under q = softmax(ℓ'/T').
//
// The noise integrates out (docs/mathematics.md §7). With H(τ) = Σ_{i≠k} (q_i τ − p_i)+ and τ_k = p_k/q_k,
//
//   P(k | k) = stay = 1/(1 + H(τ_k)),   P(j | k) = q_j ∫_{p_j/q_j}^{τ_k} dτ/(1 + H(τ))²  where q_j/p_j > q_k/p_k, else 0.
//
//   1. u0 < stay keeps k. Else H(τ*) = 1/u0 − 1 is solved for τ* <= τ_k: H is linear where the set of i with q_i τ > p_i
//      stays the same, so Newton from the right is (Σ p_i + 1/u0 − 1) / Σ q_i over that set, until it shrinks no more.
//   2. j ∝ q_j in that set, by the two-level inverse CDF of draw.cuh with u1.
//
// Both rows are exponentials relative to their maxima, e_i and f_i; the variable is α with q_i τ − p_i ∝ α f_i − e_i.
// They are made once and lie in the second-level cache; a pass of Newton's reads those. Tokens whose odds against k did
// not rise have f = 0 there, k among them. The odds are compared as (ℓ'_i − ℓ'_k)/T' > (ℓ_i − ℓ_k)/T in float32, where
// rounding is monotone: at one temperature nothing rises that does not in exact arithmetic, and equal rows keep k with
// certainty. log P(j | k) of a token that was drawn takes no sort: see Kinks.
//
// Example: p = (.5, .5), q = (.25, .75), k = 0: τ_k = 2, H(τ) = (.75 τ − .5)+, stay = 1/2, P(1 | 0) = .75·(2 − 2/3)/2 = 1/2.
#pragma once
#include "draw.cuh"

#if defined(__AVX512F__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace fastsmc {

constexpr uint32_t kNoiseStream = 0x80000000u;  // of token 0's noise; one stream per token
constexpr float kMostAlpha = 0x1p100f;  // so that α f stays within float32
// Kinks of H are put into kBins: 64 per octave of τ, 32 octaves, the rest into the last one.
constexpr int kBins = 2048, kBinShift = 17;

// A row of raw logits as float32, padded with −inf to whole tiles, and what its scores, in units of log 2, are made of.
struct Scores {
  const float* logit;
  float max;
  double temperature = 1.0;
  float scale = logit_scale(temperature);
  FASTSMC_HD float relative(float value, float to) const { return (value - to) * scale; }
  FASTSMC_HD double log2_over(int64_t i, float to) const {
    return (static_cast<double>(logit[i]) - to) / (temperature * kLog2);
  }
  FASTSMC_HD double log2(int64_t i) const { return log2_over(i, max); }
};

// Copies a row to `out`, n_tiles·kTile; −inf where masked; NaN and +inf stay. Returns its maximum, without NaN.
template <typename Logit, typename Mask>
FASTSMC_HD inline float load_row(const Logit* logits, const Mask* mask, int64_t vocab, float* out) {
  float max = kNegInf;
  for (int64_t first = 0; first < vocab; first += kTile) {
    const int n = static_cast<int>(vocab - first < kTile ? vocab - first : kTile);
    const Logit* tile = logits + first;
    float* to = out + first;
    if constexpr (!std::is_same<Mask, NoMask>::value) unpack_mask(mask + first / 32, n, to);
    for (int begin = 0; begin < n; begin += 64) {
      const int end = n - begin < 64 ? n : begin + 64;
      prefetch64(tile + kTile + begin);
#pragma omp simd reduction(max : max)
      for (int i = begin; i < end; ++i) {
        const float value = std::is_same<Mask, NoMask>::value ? load(tile, i) : to[i] + load(tile, i);
        to[i] = value;
        max = value > max ? value : max;
      }
    }
    for (int i = n; i < kTile; ++i) to[i] = kNegInf;
  }
  return max;
}

// So many are summed in float32 before float64 takes over: beside one large number, what is far below it would be lost.
constexpr int kSummed = 128;

// e_i of a row, and their sum: NaN if the row holds NaN or +inf.
FASTSMC_HD inline double exponentials(const Scores& row, int64_t n_tiles, float* e) {
  double total = 0.0;
  const Scores from = row;  // in registers, where a store to e cannot change it
  for (int64_t first = 0; first < n_tiles * kTile; first += kSummed) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kSummed; ++i)
      sum += e[first + i] = exp2_nonpositive(from.relative(from.logit[first + i], from.max));
    total += sum;
  }
  return total;
}

// The factual row with its token k, and the row that is drawn from, side by side.
struct Versus {
  Scores p, q;
  int64_t k, n_tiles;
  const float* e;  // of p
  double e_sum;
  float* f;  // of q where the odds rose, else 0; n_tiles·kTile, written by compare()
  // written by compare(): Σ of f over all of q; over tokens whose odds rose Σ f and Σ e; α at τ_k; 1/(1 + H(τ_k))
  double q_sum, f_sum, e_rising, alpha_k, stay;

  // False where there is nothing to draw: NaN or +inf in a row, no mass in q, or k without mass in p.
  FASTSMC_HD bool compare() {
    alpha_k = exp2(p.log2(k) - q.log2(k));  // inf where q_k is 0
    const float alpha = alpha_k < kMostAlpha ? static_cast<float>(alpha_k) : kMostAlpha;
    const float p_k = p.logit[k], q_k = q.logit[k];
    double h = 0.0;
    q_sum = f_sum = e_rising = 0.0;
    const Scores p = this->p, q = this->q;  // in registers, where a store to f cannot change them
    for (int64_t first = 0; first < n_tiles * kTile; first += kTile) {
      const float *from = q.logit + first, *other = p.logit + first, *es = e + first;
      float* to = f + first;
      float all = 0.0f, rising = 0.0f, beside = 0.0f, over = 0.0f;
#pragma omp simd reduction(+ : all, rising, beside, over)
      for (int i = 0; i < kTile; ++i) {
        const float mass = exp2_nonpositive(q.relative(from[i], q.max));
        const bool rises = q.relative(from[i], q_k) > p.relative(other[i], p_k);  // −inf less −inf: NaN, false
        const float risen = rises ? mass : 0.0f, excess = alpha * risen - es[i];
        to[i] = risen;
        all += mass;
        rising += risen;
        beside += rises ? es[i] : 0.0f;
        over += excess > 0.0f ? excess : 0.0f;
      }
      q_sum += all, f_sum += rising, e_rising += beside, h += over;
    }
    stay = 1.0 / (1.0 + (h > 0.0 ? h / e_sum * (alpha_k / alpha) : 0.0));
    return q_sum > 0.0 && e_sum > 0.0 && p_k > kNegInf && q.max > kNegInf;
  }

  // Tiles' Σ f over tokens with α f > e; returns all of it, and in *beside Σ e over them.
  FASTSMC_HD double active(float alpha, double* tile_mass, double* beside) const {
    double total = 0.0;
    *beside = 0.0;
    for (int64_t t = 0; t < n_tiles; ++t) {
      const float *fs = f + t * kTile, *es = e + t * kTile;
      float mass = 0.0f, other = 0.0f;
#pragma omp simd reduction(+ : mass, other)
      for (int i = 0; i < kTile; ++i) {
        const bool in = alpha * fs[i] - es[i] > 0.0f;
        mass += in ? fs[i] : 0.0f;
        other += in ? es[i] : 0.0f;
      }
      tile_mass[t] = mass;
      total += mass, *beside += other;
    }
    return total;
  }

  // A token other than k, by u0 >= stay and u1. Scratch: n_tiles.
  FASTSMC_HD int64_t move(double u0, double u1, double* tile_mass) const {
    const double over = (1.0 / u0 - 1.0) * e_sum;  // inf for 0
    double next = (e_rising + over) / f_sum, beside;
    float alpha = next < kMostAlpha ? static_cast<float>(next) : kMostAlpha;
    for (bool last = false;;) {
      const double mass = active(alpha, tile_mass, &beside);
      if (!(mass > 0.0)) {  // by rounding: the set that is wanted has a token or two, just above
        alpha *= 1.0f + 0x1p-20f;
        last = true;
        continue;
      }
      next = (beside + over) / mass;
      if (last || !(static_cast<float>(next) < alpha)) break;
      alpha = static_cast<float>(next);
    }
    const int64_t first = invert_cdf(tile_mass, n_tiles, &u1) * kTile;
    alignas(64) float mass[kTile];
#pragma omp simd
    for (int i = 0; i < kTile; ++i) mass[i] = alpha * f[first + i] - e[first + i] > 0.0f ? f[first + i] : 0.0f;
    return first + invert_cdf(mass, kTile, &u1);
  }

  FASTSMC_HD double log_q(int64_t i) const { return kLog2 * q.log2(i) - log(q_sum); }
};

// Kinks of h(x) = Σ f_i (x − r_i)+ in one bin, r_i being where token i begins to count: sums of f, f·r, f·r².
struct Kinks {
  double f, fr, frr;
};

// ∫ dx/(1 + c·h(x))², from left to right. Over a bin h is known at both ends and in the mean, hence up to the square of
// how far it is from its chord: with 64 bins per octave the relative error is below 1e-6.
struct Integral {
  double c, x, slope, h, value;
  FASTSMC_HD void advance(double to, const Kinks& k) {
    const double width = to - x, end = h + slope * width + k.f * to - k.fr;
    const double mean = h * width + 0.5 * (slope * width * width + (k.f * to - 2.0 * k.fr) * to + k.frr);
    const double middle = 1.0 + 0.5 * c * (h + end);
    value += width / ((1.0 + c * h) * (1.0 + c * end)) +
             2.0 * c * (0.5 * width * (h + end) - mean) / (middle * middle * middle);
    x = to, h = end, slope += k.f;
  }
};

// The bin of r in [0, 1), bin 0 next to 1, and where a bin begins.
FASTSMC_HD inline int bin_of(float r) {
  const int bin = static_cast<int>(as_bits(1.0f) >> kBinShift) - 1 - static_cast<int>(as_bits(r) >> kBinShift);
  return bin < kBins ? bin : kBins - 1;
}
FASTSMC_HD inline float begin_of(int bin) {
  return bin >= kBins - 1 ? 0.0f : as_float(((as_bits(1.0f) >> kBinShift) - 1 - static_cast<uint32_t>(bin)) << kBinShift);
}

// Writes to `found` (kTile + 16 places) the i with r_i < 1, in order, and returns their number. Without a branch per
// token: half of them would be guessed wrong.
FASTSMC_HD inline int find_below_one(const float* r, int* found) {
  int n = 0;
#if defined(__AVX512F__) && !defined(__CUDACC__)
  const __m512i step = _mm512_set1_epi32(16);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < kTile; i += 16, index = _mm512_add_epi32(index, step)) {
    const __mmask16 below = _mm512_cmp_ps_mask(_mm512_load_ps(r + i), _mm512_set1_ps(1.0f), _CMP_LT_OQ);
    _mm512_storeu_si512(found + n, _mm512_maskz_compress_epi32(below, index));
    n += __builtin_popcount(below);
  }
#else
  for (int i = 0; i < kTile; ++i) {
    found[n] = i;
    n += r[i] < 1.0f;
  }
#endif
  return n;
}

// log P(j | k) of a token that move() gave. In x = α/reference; beyond the reference nearly all of it is behind, and H
// is taken to be linear. Scratch: kBins.
FASTSMC_HD inline double log_kernel(const Versus& v, int64_t j, Kinks* bins) {
  const double own = exp2(v.p.log2(j) - v.q.log2(j));
  double reference = 0x1p20 * v.e_sum / v.f_sum;
  reference = 2.0 * own > reference ? 2.0 * own : reference;
  reference = v.alpha_k < reference ? v.alpha_k : reference;
  const float inverse = static_cast<float>(1.0 / reference);
  const double begin = own < reference ? own / reference : 1.0 - 0x1p-24;  // else by rounding: odds that hardly rose
  const float start = begin < 1.0 - 0x1p-24 ? static_cast<float>(begin) : 1.0f - 0x1p-24f;
  const double c = reference / v.e_sum;
  const float least = static_cast<float>(1e-12 / c);  // 10^5 tokens that count for less change it by 1e-7
  for (int b = 0; b <= bin_of(start); ++b) bins[b] = {};
  Kinks before{};
  for (int64_t first = 0; first < v.n_tiles * kTile; first += kTile) {
    alignas(64) float r[kTile];
    const float *fs = v.f + first, *es = v.e + first;
    float f_before = 0.0f, fr_before = 0.0f;
#pragma omp simd reduction(+ : f_before, fr_before)
    for (int i = 0; i < kTile; ++i) {
      const float f = fs[i], at = es[i] * inverse / f;
      r[i] = f > least && at >= start ? at : 1.0f;
      f_before += at < start ? f : 0.0f;
      fr_before += at < start ? f * at : 0.0f;
    }
    before.f += f_before, before.fr += fr_before;
    int found[kTile + 16];
    const int n = find_below_one(r, found);
    for (int m = 0; m < n; ++m) {
      const int i = found[m];
      const double f = fs[i], fr = f * r[i];
      Kinks& bin = bins[bin_of(r[i])];
      bin.f += f, bin.fr += fr, bin.frr += fr * r[i];
    }
  }
  Integral integral{c, begin, before.f, before.f * begin - before.fr, 0.0};
  for (int b = bin_of(start); b >= 0; --b) {
    if (!(bins[b].f > 0.0)) continue;
    if (begin_of(b) > integral.x) integral.advance(begin_of(b), {});
    integral.advance(b > 0 ? begin_of(b - 1) : 1.0, bins[b]);
  }
  if (integral.x < 1.0) integral.advance(1.0, {});
  if (v.alpha_k > reference) integral.value += (1.0 / (1.0 + c * integral.h) - v.stay) / (c * v.f_sum);
  return log(c * integral.value) + v.log_q(j) + log(v.q_sum);
}

// The noise itself: the first of the exponential clocks (E p_i + E_i)/q_i, k's being E p_k/q_k, all times q_k or, where
// that is 0, the largest q. exponential(i) gives E_i, and for k itself E. lse: of p. Clocks of tokens whose odds did not
// rise are later than k's, and not looked at.
template <typename Exponential>
FASTSMC_HD inline int64_t win(const Versus& v, double lse, int64_t vocab, Exponential exponential) {
  const float p_k = v.p.logit[v.k], q_k = v.q.logit[v.k];
  const bool gone = !(q_k > kNegInf);
  const double e = exponential(v.k), t = v.p.temperature;
  double first = gone ? __builtin_huge_val() : log(e) + p_k / t - lse;
  int64_t winner = gone ? kNoToken : v.k;
  for (int64_t i = 0; i < vocab; ++i) {
    if (!(v.q.relative(v.q.logit[i], q_k) > v.p.relative(v.p.logit[i], p_k))) continue;
    const double clock = log(e * exp(v.p.logit[i] / t - lse) + exponential(i)) -
                         kLog2 * v.q.log2_over(i, gone ? v.q.max : q_k);
    if (clock < first) first = clock, winner = i;
  }
  return winner;
}

}  // namespace fastsmc
