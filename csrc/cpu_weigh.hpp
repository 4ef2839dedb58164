// TileWeigher: what weighs the tiles of a row on this CPU. Without AVX-512 that is weigh_tile in weigh.cuh; with it,
// what is here, which gives the same up to rounding.
//
// Rows often lie in a cache, so weighing is bound by arithmetic. A tile therefore is read once, and its exponentials
// are summed relative to the row's *frame*, an integer exponent near its scores, taken from the maximum of an earlier
// tile of the row. Any frame will do as long as no exponential leaves the range of float32; an integer one costs no
// rounding. The tile's maximum, which is found on the way, says whether the frame was near enough. If it was not, in
// the first tile of a row, in a last tile that is not whole, and where there is NaN, a tile is weighed carefully: first
// its maximum, then sums relative to that. What a row gives does not depend on other rows.
//
// 2^t: t is rounded to n/32, the rest r is within ±1/64. 2^(n/32) is a table's entry, into whose exponent n/32's
// integer part is added. For 2^r a square is completed: 2^r ~ c((r + h)² + k), c multiplied into the table. With
// h = 46/32 the subtraction that gives −(n/32 − h) is exact, 2^0 is 1, and the relative error is below 3.4e-7, 4e-8 on
// average; that of the scores themselves, in float32, is 6e-8 times their size. That makes seven operations per vector,
// the last of which adds to the sum. Zen 4 finishes not quite two per cycle, whichever units they are for.
//
// Dead ends: maxima of bfloat16 as 16-bit integers, 32 at a time (no faster); vscalefps and vreduceps for exponent and
// rest (two cycles each); eight vectors at a time (registers run out).
#pragma once
#include "fastsmc/weigh.cuh"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#pragma GCC diagnostic push  // GCC 12 takes the undefined vectors in its own headers for mistakes
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fastsmc::cpu {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

inline __m512 load16(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline __m512 load16(const bf16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline __m512 load16(const fp16* p, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }

// Four vectors go through every operation side by side: that hides its latency.
struct Four {
  __m512 part[4];
  __m512& operator[](int i) { return part[i]; }
  const __m512& operator[](int i) const { return part[i]; }
};
inline Four four(float value) {
  const __m512 v = _mm512_set1_ps(value);
  return {{v, v, v, v}};
}
template <typename F>
inline void each(F f) {
  f(0), f(1), f(2), f(3);
}
inline float sum_of(const Four& v) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(v[0], v[1]), _mm512_add_ps(v[2], v[3])));
}
inline float max_of(const Four& v) {
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3])));
}

// Loads 64 elements: in their order if `ordered`, as where a second matrix must line up with them.
template <bool ordered, typename T>
inline Four load64(const T* p) {
  Four v;
  each([&](int i) { v[i] = load16(p + 16 * i, 0xffff); });
  return v;
}
template <bool ordered>
inline Four load64(const bf16* p) {
  if (ordered) return load64<ordered, bf16>(p);
  const __m512i odd = _mm512_set1_epi32(0xffff0000), first = _mm512_loadu_si512(p), second = _mm512_loadu_si512(p + 32);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(first, 16)), _mm512_castsi512_ps(_mm512_and_si512(first, odd)),
           _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)), _mm512_castsi512_ps(_mm512_and_si512(second, odd))}};
}

constexpr float kRestShift = 1.4375f;                      // h
constexpr double kRestScale = 0.24109945;                  // c
constexpr float kRestOffset = 2.0812597274780273f;         // k = 1/c − h²
constexpr float kLeast = -120.0f, kMost = 100.0f;          // of 2^t: their sums, too, are far from the exponents' ends
constexpr float kLeastMax = -80.0f;                        // beside 2^-80 a thousand of 2^-120 are nothing

// Its lowest bit is 1/32: 1.5·2^18.
constexpr float kMagic = 393216.0f;
constexpr float kFrameLimit = 65536.0f;  // kMagic − frame has that lowest bit

struct Exp2Table {
  alignas(64) uint32_t bits[32];  // of c·2^(i/32), less i in the place where n << 18 puts it
  Exp2Table() {
    for (uint32_t i = 0; i < 32; ++i) bits[i] = as_bits(static_cast<float>(kRestScale * std::exp2(i / 32.0))) - (i << 18);
  }
};
inline const Exp2Table kExp2Table;

// Sums of 2^(x·scale − frame), and the maximum of x. Scores below kLeast count as kLeast. NaN gives NaN.
struct SumExp2 {
  const __m512i low = _mm512_load_si512(kExp2Table.bits), high = _mm512_load_si512(kExp2Table.bits + 16);
  const __m512 offset = _mm512_set1_ps(kRestOffset);
  const __m512 scale, least, magic, shifted_magic;
  Four max = four(kNegInf), sum = four(0.0f);

  SumExp2(float scale, float frame)
      : scale(_mm512_set1_ps(scale)),
        least(_mm512_set1_ps((frame + kLeast) / scale)),
        magic(_mm512_set1_ps(kMagic - frame)),
        shifted_magic(_mm512_set1_ps(kMagic - frame + kRestShift)) {}

  // Inlined, or the sums would live in memory: left to itself GCC calls it where there are both ψ and a mask.
  [[gnu::always_inline]] inline void add(Four x) {
    Four n, w;
    __m512i power[4];
    each([&](int i) { max[i] = _mm512_max_ps(x[i], max[i]); });  // of NaN and max: max, the second
    each([&](int i) { x[i] = _mm512_max_ps(least, x[i]); });     // of least and NaN: NaN
    each([&](int i) { n[i] = _mm512_fmadd_ps(x[i], scale, magic); });
    each([&](int i) { power[i] = _mm512_permutex2var_epi32(low, _mm512_castps_si512(n[i]), high); });
    each([&](int i) {
      power[i] = _mm512_add_epi32(power[i], _mm512_slli_epi32(_mm512_castps_si512(n[i]), 18));
    });
    each([&](int i) { w[i] = _mm512_fmsub_ps(x[i], scale, _mm512_sub_ps(n[i], shifted_magic)); });
    each([&](int i) { w[i] = _mm512_fmadd_ps(w[i], w[i], offset); });
    each([&](int i) { sum[i] = _mm512_fmadd_ps(w[i], _mm512_castsi512_ps(power[i]), sum[i]); });
  }
};

// The frame of z or of x; NaN until there is one.
struct Frame {
  float frame = __builtin_nanf("");

  void set(float max) {
    if (max > -kFrameLimit && max < kFrameLimit) frame = std::ceil(max);
  }
  // Whether a sum relative to the frame is right, for scores with this maximum. Without mass the sum is set to 0.
  bool holds(float max, float* sum) const {
    if (max == kNegInf && *sum == *sum) *sum = 0.0f;
    return *sum == *sum && (max == kNegInf || (max - frame >= kLeastMax && max - frame <= kMost));
  }
};

class TileWeigher {
 public:
  template <typename Logit, typename Psi, typename Mask>
  TileSums operator()(const Logit* logits, const Psi* psi, const Mask* mask, int n, Scale scale) {
    constexpr bool reweighs = kReweighs<Psi, Mask>;
    TileSums sums;
    if (n == kTile && base_.frame == base_.frame && (!reweighs || both_.frame == both_.frame) &&
        weigh_quickly(logits, psi, mask, scale, &sums))
      return sums;
    return weigh_carefully(logits, psi, mask, n, scale);
  }

 private:
  Frame base_, both_;

  // Makes x of 16 tokens from their scaled logits.
  template <typename Psi, typename Mask>
  static __m512 reweigh(__m512 scaled, const Psi* psi, const Mask* mask, int i, __mmask16 lanes) {
    __m512 x = scaled;
    if constexpr (kTwists<Psi>) x = _mm512_fmadd_ps(load16(psi + i, lanes), _mm512_set1_ps(1.44269504f), scaled);
    if constexpr (!std::is_same<Mask, NoMask>::value)
      x = _mm512_mask_add_ps(x, static_cast<__mmask16>(~(mask[i >> 5] >> (i & 16))), scaled, _mm512_set1_ps(kNegInf));
    return x;
  }

  // Weighs a whole tile in its row's frames; false if they are too far off.
  template <typename Logit, typename Psi, typename Mask>
  bool weigh_quickly(const Logit* logits, const Psi* psi, const Mask* mask, Scale scale, TileSums* sums) const {
    constexpr bool reweighs = kReweighs<Psi, Mask>;
    const __m512 scales = _mm512_set1_ps(scale.x);
    SumExp2 base(scale.z, base_.frame), both(1.0f, reweighs ? both_.frame : 0.0f);
    for (int i = 0; i < kTile; i += 64) {
      prefetch64(logits + kTile + i);
      Four x = load64<reweighs>(logits + i);
      base.add(x);
      if constexpr (reweighs) {
        if constexpr (kTwists<Psi>) prefetch64(psi + kTile + i);
        each([&](int j) { x[j] = reweigh(_mm512_mul_ps(x[j], scales), psi, mask, i + 16 * j, 0xffff); });
        both.add(x);
      }
    }
    sums->max.z = max_of(base.max) * scale.z;
    sums->shift.z = base_.frame;
    sums->z = sum_of(base.sum);
    if (!base_.holds(sums->max.z, &sums->z)) return false;
    if (!reweighs) return true;
    sums->max.x = max_of(both.max);
    sums->shift.x = both_.frame;
    sums->x = sum_of(both.sum);
    return both_.holds(sums->max.x, &sums->x);
  }

  // Weighs any tile of n tokens; its maxima make the frames of the tiles after it.
  template <typename Logit, typename Psi, typename Mask>
  TileSums weigh_carefully(const Logit* logits, const Psi* psi, const Mask* mask, int n, Scale scale) {
    constexpr bool reweighs = kReweighs<Psi, Mask>;
    alignas(64) float z[kTile], x[reweighs ? kTile : 1];
    const __m512 infinite = _mm512_set1_ps(kNegInf);
    const __m512 scales = _mm512_set1_ps(scale.z), powered = _mm512_set1_ps(scale.x);
    __m512 z_max = infinite, x_max = infinite;
    for (int i = 0; i < kTile; i += 16) {
      const __mmask16 lanes = n - i >= 16 ? 0xffff : n > i ? static_cast<__mmask16>((1 << (n - i)) - 1) : 0;
      __m512 v = infinite, sum = infinite;
      if (lanes) {
        const __m512 logit = load16(logits + i, lanes);
        v = _mm512_mask_mul_ps(infinite, lanes, logit, scales);
        sum = reweigh(_mm512_mask_mul_ps(infinite, lanes, logit, powered), psi, mask, i, lanes);
      }
      z_max = _mm512_max_ps(v, z_max);  // of NaN and z_max: z_max, the second
      _mm512_store_ps(z + i, v);
      if constexpr (reweighs) {
        x_max = _mm512_max_ps(sum, x_max);
        _mm512_store_ps(x + i, sum);
      }
    }
    TileSums sums{};
    sums.max.z = sums.shift.z = _mm512_reduce_max_ps(z_max);
    sums.z = sum_relative(z, sums.max.z);
    base_.set(sums.max.z);
    if constexpr (reweighs) {
      sums.max.x = sums.shift.x = _mm512_reduce_max_ps(x_max);
      sums.x = sum_relative(x, sums.max.x);
      both_.set(sums.max.x);
    }
    return sums;
  }

  // Σ 2^(x_i − max) over a tile; NaN if it holds NaN or +inf, 0 if it holds no mass.
  static float sum_relative(const float* x, float max) {
    const __m512 shift = _mm512_set1_ps(max == kNegInf ? 0.0f : max);
    SumExp2 sum(1.0f, 0.0f);
    for (int i = 0; i < kTile; i += 64) {
      Four t = load64<false>(x + i);
      each([&](int j) { t[j] = _mm512_sub_ps(t[j], shift); });
      sum.add(t);
    }
    const float all = sum_of(sum.sum);
    return max == kNegInf && all == all ? 0.0f : all;
  }
};

#else

struct TileWeigher {
  template <typename... Arguments>
  TileSums operator()(Arguments... arguments) const {
    return weigh_tile(arguments...);
  }
};

#endif

}  // namespace fastsmc::cpu
