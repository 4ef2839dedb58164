// kWeighTile: what weighs a tile on this CPU. With AVX-512 that is weigh_tile_avx512, which gives what weigh_tile in
// weigh.cuh gives up to rounding, and holds no scores but x in a buffer. The maxima come from a first pass over the tile, which stays in the first-level cache; the second computes the
// scores again.
//
// 2^t for t <= 0: t is rounded to n/32, the rest r is within ±1/64, so that a quadratic gives 2^r to 6e-8, and 2^(n/32)
// comes from the bits of n. Shifted into the place of a float's exponent, they make 2^floor(n/32)·(1 + i/32), i the
// lowest five; a table of 32 holds 2^(i/32)/(1 + i/32). Eleven operations a vector, and the last product is the sum's.
// Scores below −126 count as −126: beside a maximum of 1 that is nothing, and a tile without mass is known by its
// maximum. NaN passes through; that is why the exponent is multiplied on, not added.
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

struct Exp2Table {
  alignas(64) float value[32];
  Exp2Table() {
    for (int i = 0; i < 32; ++i) value[i] = static_cast<float>(std::exp2(i / 32.0) / (1.0 + i / 32.0));
  }
};
inline const Exp2Table kExp2Table;

inline __m512 load16(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline __m512 load16(const bf16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline __m512 load16(const fp16* p, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }

// Asks for 32 elements of the next tile while this one is summed: hardware prefetchers stop at the end of a page, and
// all of a tile asked for at once would be more than can be on its way. Past the end of a row it is harmless.
template <typename T>
inline void prefetch32(const T* p) {
  for (size_t i = 0; i < 32 * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
}

// Two registers, so that one's latency is hidden behind the other's work.
struct Pair {
  __m512 even, odd;
};

// Sums exponentials of 16 scores at a time.
struct SumExp2 {
  const __m512 low = _mm512_load_ps(kExp2Table.value), high = _mm512_load_ps(kExp2Table.value + 16);
  const __m512 magic = _mm512_set1_ps(393216.0f + 127.0f);  // 1.5·2^23/32: the lowest bit is 1/32; 127: exponent's bias
  const __m512 least = _mm512_set1_ps(-126.0f);
  const __m512 c1 = _mm512_set1_ps(0.69315734f), c2 = _mm512_set1_ps(0.24022651f);
  const __m512 shift;

  explicit SumExp2(float max) : shift(_mm512_set1_ps(max == kNegInf ? 0.0f : max)) {}

  __m512 operator()(__m512 score, __m512 sum) const {
    const __m512 t = _mm512_max_ps(least, _mm512_sub_ps(score, shift));  // of least and NaN: NaN, the second
    const __m512 shifted = _mm512_add_ps(t, magic);
    const __m512 r = _mm512_sub_ps(t, _mm512_sub_ps(shifted, magic));
    const __m512i bits = _mm512_castps_si512(shifted);
    const __m512 power = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 18));
    const __m512 table = _mm512_permutex2var_ps(low, bits, high);
    const __m512 q = _mm512_mul_ps(_mm512_fmadd_ps(c2, r, c1), r);
    return _mm512_fmadd_ps(_mm512_fmadd_ps(table, q, table), power, sum);
  }
};

inline float total(const Pair& sum, float max) {
  const float all = _mm512_reduce_add_ps(_mm512_add_ps(sum.even, sum.odd));
  return max == kNegInf && all == all ? 0.0f : all;
}

// whole: n is kTile
template <bool whole, typename Logit, typename Psi, typename Mask>
inline TileSums weigh_tile_avx512(const Logit* logits, const Psi* psi, const Mask* mask, int n, float scale) {
  constexpr bool twisted = !std::is_same<Psi, NoTwist>::value, masked = !std::is_same<Mask, NoMask>::value;
  constexpr bool reweighs = kReweighs<Psi, Mask>;
  alignas(64) float x[reweighs ? kTile : 1];
  const __m512 infinite = _mm512_set1_ps(kNegInf), scales = _mm512_set1_ps(scale), log2e = _mm512_set1_ps(1.44269504f);
  const auto lanes = [n](int i) -> __mmask16 {
    return whole || n - i >= 16 ? 0xffff : n > i ? static_cast<__mmask16>((1 << (n - i)) - 1) : 0;
  };
  const auto z_at = [&](int i) {
    const __mmask16 inside = lanes(i);
    return _mm512_mask_mul_ps(infinite, inside, load16(logits + i, inside), scales);
  };
  const auto maxima = [&](int i, __m512& z_max, __m512& x_max) {
    const __m512 z = z_at(i);
    z_max = _mm512_max_ps(z, z_max);  // of NaN and z_max: z_max, the second
    if constexpr (reweighs) {
      __m512 sum = z;
      if constexpr (twisted) sum = _mm512_fmadd_ps(load16(psi + i, lanes(i)), log2e, z);
      if constexpr (masked) {
        const uint32_t allowed = whole || i < n ? mask[i >> 5] >> (i & 16) : 0;
        sum = _mm512_mask_add_ps(sum, static_cast<__mmask16>(~allowed), z, infinite);
      }
      x_max = _mm512_max_ps(sum, x_max);
      _mm512_store_ps(x + i, sum);
    }
  };
  Pair z_max{infinite, infinite}, x_max{infinite, infinite};
  for (int i = 0; i < kTile; i += 32) {
    maxima(i, z_max.even, x_max.even);
    maxima(i + 16, z_max.odd, x_max.odd);
  }
  TileSums result{};
  result.max.z = _mm512_reduce_max_ps(_mm512_max_ps(z_max.even, z_max.odd));
  const SumExp2 base(result.max.z);
  Pair sum{_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int i = 0; i < kTile; i += 32) {
    prefetch32(logits + kTile + i);
    sum.even = base(z_at(i), sum.even);
    sum.odd = base(z_at(i + 16), sum.odd);
  }
  result.z = total(sum, result.max.z);
  if constexpr (reweighs) {
    result.max.x = _mm512_reduce_max_ps(_mm512_max_ps(x_max.even, x_max.odd));
    const SumExp2 both(result.max.x);
    sum = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int i = 0; i < kTile; i += 32) {
      if constexpr (twisted) prefetch32(psi + kTile + i);
      sum.even = both(_mm512_load_ps(x + i), sum.even);
      sum.odd = both(_mm512_load_ps(x + i + 16), sum.odd);
    }
    result.x = total(sum, result.max.x);
  }
  return result;
}

constexpr auto kWeighTile = [](auto* logits, auto* psi, auto* mask, int n, float scale) {
  return n == kTile ? weigh_tile_avx512<true>(logits, psi, mask, n, scale)
                    : weigh_tile_avx512<false>(logits, psi, mask, n, scale);
};

#else

constexpr auto kWeighTile = [](auto... arguments) { return weigh_tile(arguments...); };

#endif

}  // namespace fastsmc::cpu
