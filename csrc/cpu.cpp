// The CPU backend: OpenMP loops over rows around the arithmetic of include/fastsmc. Raw pointers only; shapes, dtypes
// and index ranges were checked by fastsmc/ops. Functions return the first offending index, −1 when there is none.
//
// The OpenMP runtime is whichever the process has already loaded with global symbols: PyTorch's, as fastsmc.ops imports
// torch first. So torch.set_num_threads holds here too and no second thread pool appears.
#include "cpu.hpp"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cpu_weigh.hpp"
#include "fastsmc/redraw.cuh"

namespace fastsmc::cpu {

// With fewer elements one thread is faster than waking the others.
constexpr int64_t kSerial = 1 << 16;

// The matrix row that output row r uses; null where there is no matrix, or no row.
template <typename T>
const T* row_of(const Matrix& m, int64_t r) {
  const int64_t index = m.rows ? m.rows[r] : r;
  return m.data && index >= 0 ? static_cast<const T*>(m.data) + index * m.stride : nullptr;
}

// Calls f with the mask row of output row r, or with a null NoMask* where all tokens are allowed.
template <typename F>
auto with_mask(const Matrix& mask, int64_t r, F f) {
  const uint32_t* words = row_of<uint32_t>(mask, r);
  return words ? f(words) : f(static_cast<const NoMask*>(nullptr));
}

// Calls f with null pointers of the types of logits and twist; where there is none, but a power, that is ZeroTwist.
template <typename F>
void dispatch(int logit_dtype, int psi_dtype, bool powers, F f) {
  const auto with_psi = [&](auto* logit) {
    if (psi_dtype == kNone && powers) f(logit, static_cast<ZeroTwist*>(nullptr));
    else if (psi_dtype == kNone) f(logit, static_cast<NoTwist*>(nullptr));
    else if (psi_dtype == kFloat32) f(logit, static_cast<float*>(nullptr));
    else if (psi_dtype == kBFloat16) f(logit, static_cast<bf16*>(nullptr));
    else if (psi_dtype == kFloat16) f(logit, static_cast<fp16*>(nullptr));
    else throw std::invalid_argument("unknown dtype code " + std::to_string(psi_dtype));
  };
  if (logit_dtype == kFloat32) with_psi(static_cast<float*>(nullptr));
  else if (logit_dtype == kBFloat16) with_psi(static_cast<bf16*>(nullptr));
  else if (logit_dtype == kFloat16) with_psi(static_cast<fp16*>(nullptr));
  else throw std::invalid_argument("unknown dtype code " + std::to_string(logit_dtype));
}

void uniforms(double* out, int64_t n, const UniformGroups& of) {
  for (int64_t g = 0; g < of.n_groups; ++g) {
    const UniformKey key = of.key(g);
    const int64_t begin = of.begin(g), end = of.offsets ? of.offsets[g + 1] : n;
    for (int64_t i = begin; i < end; ++i) out[i] = uniform(key, static_cast<uint32_t>(i - begin));
  }
}

// lse, lse_psi, max_psi: (n_rows,); tile_mass: (n_rows, n_tiles)
void weigh(const Matrix& logits, const Matrix& psi, const Matrix& mask, int64_t n_rows, int64_t vocab,
           const Powered& temperature, double* lse, double* lse_psi, double* tile_mass, float* max_psi) {
  if (psi.dtype == kNone && mask.dtype == kNone && !temperature.powers) lse_psi = lse;
  const int64_t n_tiles = (vocab + kTile - 1) / kTile;
  dispatch(logits.dtype, psi.dtype, temperature.powers, [&](auto* logit, auto* twist) {
    using Logit = std::remove_pointer_t<decltype(logit)>;
    using Psi = std::remove_pointer_t<decltype(twist)>;
#pragma omp parallel if (n_rows * vocab > kSerial)
    {
      std::vector<float> base_shifts(n_tiles), shifts(n_tiles);
      std::vector<double> base_mass(n_tiles);
#pragma omp for schedule(dynamic, 4)  // cores may be shared with others
      for (int64_t r = 0; r < n_rows; ++r) {
        const Logit* row = row_of<Logit>(logits, r);
        if (!row) {
          lse[r] = lse_psi[r] = max_psi[r] = kNegInf;
          std::fill_n(tile_mass + r * n_tiles, n_tiles, 0.0);
          continue;
        }
        const Scale scale = temperature.scale(r);
        with_mask(mask, r, [&](auto* words) {
          weigh_row(TileWeigher(), row, row_of<Psi>(psi, r), words, vocab, scale, base_shifts.data(), base_mass.data(),
                    shifts.data(), lse + r, lse_psi + r, tile_mass + r * n_tiles, max_psi + r);
        });
      }
    }
  });
}

// Draw j: weighed row rows[j], uniform u[j]. tokens, log_prob, log_psi: (n_draws,).
void draw(const Matrix& logits, const Matrix& psi, const Matrix& mask, int64_t vocab, const Powered& temperature,
          const double* lse, const double* tile_mass, const int64_t* rows, const double* u, int64_t n_draws,
          int64_t* tokens, double* log_prob, double* log_psi) {
  const int64_t n_tiles = (vocab + kTile - 1) / kTile;
  dispatch(logits.dtype, psi.dtype, temperature.powers, [&](auto* logit, auto* twist) {
    using Logit = std::remove_pointer_t<decltype(logit)>;
    using Psi = std::remove_pointer_t<decltype(twist)>;
#pragma omp parallel for schedule(static) if (n_draws * kTile > kSerial)
    for (int64_t j = 0; j < n_draws; ++j) {
      const int64_t r = rows[j];
      const Logit* row = row_of<Logit>(logits, r);
      const Psi* twists = row_of<Psi>(psi, r);
      const Scale scale = temperature.scale(r);
      const int64_t token = with_mask(mask, r, [&](auto* words) {
        return row ? draw_row(row, twists, words, vocab, scale, tile_mass + r * n_tiles, u[j]) : kNoToken;
      });
      tokens[j] = token;
      log_prob[j] = log_psi[j] = std::numeric_limits<double>::quiet_NaN();
      if (token == kNoToken) continue;
      log_prob[j] = static_cast<double>(load(row, token)) * scale.z * kLog2 - lse[r];
      log_psi[j] = load(twists, token);
    }
  });
}

namespace {

// The rows of a Contrast one after the other, in a thread's memory. The factual row is made ready once for all the rows
// in a run that are compared with it.
class Comparer {
 public:
  explicit Comparer(const Contrast& of)
      : of_(of), n_tiles_((of.vocab + kTile - 1) / kTile), floats_(4 * n_tiles_ * kTile) {}

  int64_t n_tiles() const { return n_tiles_; }

  // Loads output row r; false if it has no rows.
  bool load(int64_t r, Versus* v) {
    const int64_t f = of_.factual.rows ? of_.factual.rows[r] : r;
    if (f < 0 || (of_.logits.rows && of_.logits.rows[r] < 0)) return false;
    float* a = floats_.data();
    const int64_t n = n_tiles_ * kTile;
    if (const double t = of_.factual_temperature.at(r); f != at_ || t != p_.temperature) {
      const float max = load_row_of(of_.factual, {nullptr, 0, kNone, nullptr}, r, a);
      p_ = {a, max, t};
      e_sum_ = exponentials(p_, n_tiles_, a + n);
      at_ = f;
    }
    const float max = load_row_of(of_.logits, of_.mask, r, a + 2 * n);
    *v = {p_, {a + 2 * n, max, of_.temperature.at(r)}, of_.tokens[f], n_tiles_, a + n, e_sum_, a + 3 * n};
    return true;
  }

 private:
  const Contrast& of_;
  int64_t n_tiles_, at_ = -1;
  std::vector<float> floats_;  // n_tiles·kTile each: factual logits, their exponentials, logits, f
  Scores p_{};
  double e_sum_ = 0.0;

  float load_row_of(const Matrix& m, const Matrix& mask, int64_t r, float* out) const {
    float max = kNegInf;
    dispatch(m.dtype, kNone, false, [&](auto* typed, auto*) {
      using T = std::remove_pointer_t<decltype(typed)>;
      max = with_mask(mask, r, [&](auto* words) { return load_row(row_of<T>(m, r), words, of_.vocab, out); });
    });
    return max;
  }
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// 2^t for t <= 0 in float64, to 1e-15: as exp2_nonpositive, but below 2^-1000 the result is that.
double exp2_nonpositive64(double t) {
  const double magic = 0x1.8p52 + 1023.0;
  const double c = t < -1000.0 ? -1000.0 : t, shifted = c + magic;
  const double f = kLog2 * (c - (shifted - magic));
  double p = 1.0 / 39916800.0;
  for (const double inverse : {1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
                               1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0})
    p = p * f + inverse;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// log2 of a positive number, to 1e-9; of 0, −inf.
double log2_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint64_t root = 0x3fe6a09e667f3bcdu;  // √½: the mantissa is put into [√½, √2)
  const int64_t exponent = static_cast<int64_t>(bits - root) >> 52;
  bits -= static_cast<uint64_t>(exponent) << 52;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0), square = s * s;
  const double series = 1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square * (1.0 / 9.0))));
  return x > 0.0 ? static_cast<double>(exponent) + 2.0 / kLog2 * s * series : kNegInf;
}

// Sorts by the upper halves, ascending; `other` is of the same size.
void sort_by_key(std::vector<uint64_t>& items, std::vector<uint64_t>& other) {
  constexpr int kBits = 11, kDigits = 1 << kBits, kPasses = 3;
  std::vector<uint32_t> counts(kPasses * kDigits);
  for (const uint64_t item : items)
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass * kDigits + (item >> (32 + kBits * pass) & (kDigits - 1))];
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* at = counts.data() + pass * kDigits;
    for (uint32_t digit = 0, before = 0; digit < kDigits; ++digit) before += std::exchange(at[digit], before);
    for (const uint64_t item : items) other[at[item >> (32 + kBits * pass) & (kDigits - 1)]++] = item;
    items.swap(other);
  }
}

// log P(· | k) of a row in float64: H is walked from kink to kink, and the integrals are summed backwards. α is in units
// of that at τ_k, or where q_k is nothing of the last kink of a token with mass.
//
// Kinks are sorted by their logarithms as float32: neighbours may change places that are nearer to each other than one
// part in a million. H beyond them is the same, and the integral, to the square of that.
class LawWriter {
 public:
  explicit LawWriter(int64_t vocab)
      : vocab_(vocab), items_(vocab), other_(vocab), fall_(vocab), alpha_(vocab + 1), h_(vocab + 1), mass_(vocab) {}

  void write(const Versus& v, float* out) {
    const double per_p = 1.0 / (v.p.temperature * kLog2), per_q = 1.0 / (v.q.temperature * kLog2);
    const double p_k = v.p.logit[v.k], q_k = v.q.logit[v.k];
    const double at_k = (p_k - v.p.max) * per_p - (q_k - v.q.max) * per_q;
    const bool endless = !(at_k < 900.0);
    std::fill_n(out, vocab_, kNegInf);
    const int64_t n = find_kinks(v, per_p, per_q, p_k, q_k);
    const double unit = endless ? measure_from_last(v, per_p, per_q, n) : at_k, c = exp2(unit) / v.e_sum;
    items_.resize(n), other_.resize(n);
    for (uint64_t& item : items_)  // the furthest first: α ascends
      item |= static_cast<uint64_t>(~as_bits(static_cast<float>(fall_[item]))) << 32;
    sort_by_key(items_, other_);
    double value = integrate(v, c, endless);
    for (int64_t m = n; m-- > 0;) h_[m] = value += h_[m];
    const double q_max = v.q.max;
#pragma omp simd
    for (int64_t m = 0; m < n; ++m) {
      const double log2_q = (v.q.logit[static_cast<uint32_t>(items_[m])] - q_max) * per_q;
      alpha_[m] = kLog2 * (log2_q + log2_of(c * h_[m]));
    }
    for (int64_t m = 0; m < n; ++m) out[static_cast<uint32_t>(items_[m])] = static_cast<float>(alpha_[m]);
    if (!endless) out[v.k] = static_cast<float>(0.0 - std::log1p(c * h_end_));
  }

 private:
  int64_t vocab_;
  std::vector<uint64_t> items_, other_;  // tokens whose odds rose; over them the key that they are sorted by
  std::vector<double> fall_;             // by token: log2 of how far below 1 its α is
  std::vector<double> alpha_, h_;        // by kink, and at the end
  std::vector<float> mass_;
  double h_end_ = 0.0;

  // Fills `items_` and, as where the unit is α at τ_k, `fall_`; returns how many there are.
  int64_t find_kinks(const Versus& v, double per_p, double per_q, double p_k, double q_k) {
    const float *p = v.p.logit, *q = v.q.logit;
    items_.resize(vocab_);
#pragma omp simd
    for (int64_t i = 0; i < vocab_; ++i) {  // the difference may be fused, and does not say which is larger
      const double up = (q[i] - q_k) * per_q, from = (p[i] - p_k) * per_p;
      fall_[i] = up > from ? std::max(up - from, 1e-300) : 0.0;
    }
    int64_t n = 0;
    for (int64_t i = 0; i < vocab_; ++i) {  // without a branch per token
      items_[n] = i;
      n += fall_[i] > 0.0;
    }
    return n;
  }

  // Fills `fall_` where τ_k is infinite; returns log2 of the unit.
  double measure_from_last(const Versus& v, double per_p, double per_q, int64_t n) {
    const double p_max = v.p.max, q_max = v.q.max;
    double unit = -900.0;
    for (int64_t m = 0; m < n; ++m) {
      const int64_t i = items_[m];
      fall_[i] = (v.q.logit[i] - q_max) * per_q - (v.p.logit[i] - p_max) * per_p;
      if (exp2_nonpositive(v.q.relative(v.q.logit[i], v.q.max)) > 0.0f) unit = std::max(unit, -fall_[i]);
    }
    for (int64_t m = 0; m < n; ++m) fall_[items_[m]] = std::max(0.0, fall_[items_[m]] + unit);
    return unit;
  }

  // Leaves in h_ the integral from each kink to the next, of the last one to α = 1; returns that beyond.
  double integrate(const Versus& v, double c, bool endless) {
    const int64_t n = items_.size();
    const Scores q = v.q;
#pragma omp simd
    for (int64_t m = 0; m < n; ++m) {
      const uint32_t i = static_cast<uint32_t>(items_[m]);
      alpha_[m] = exp2_nonpositive64(-fall_[i]);
      mass_[m] = exp2_nonpositive(q.relative(q.logit[i], q.max));
    }
    alpha_[n] = 1.0;
    double slope = 0.0, h = 0.0, x = 0.0;
    for (int64_t m = 0; m < n; ++m) {
      h += slope * (alpha_[m] - x);
      h_[m] = h, x = alpha_[m];
      slope += mass_[m];
    }
    h_[n] = h_end_ = h + slope * (1.0 - x);
    const double end = endless ? 1.0 / ((1.0 + c * h_end_) * c * slope) : 0.0;
#pragma omp simd
    for (int64_t m = 0; m <= n; ++m) h_[m] = 1.0 / (1.0 + c * h_[m]);
    for (int64_t m = 0; m < n; ++m) h_[m] = (alpha_[m + 1] - alpha_[m]) * h_[m] * h_[m + 1];
    return end;
  }
};

}  // namespace

void redraw(const Contrast& of, const double* u, int64_t* tokens, double* stay, double* log_prob, double* log_kernel) {
#pragma omp parallel if (of.n_rows * of.vocab > kSerial)
  {
    Comparer comparer(of);
    std::vector<double> tile_mass(comparer.n_tiles());
    std::vector<Kinks> bins(kBins);
#pragma omp for schedule(dynamic, 4)
    for (int64_t r = 0; r < of.n_rows; ++r) {
      Versus v;
      tokens[r] = kNoToken, stay[r] = log_prob[r] = log_kernel[r] = kNan;
      if (!comparer.load(r, &v) || !v.compare()) continue;
      const bool stays = u[2 * r] < v.stay;
      tokens[r] = stays ? v.k : v.move(u[2 * r], u[2 * r + 1], tile_mass.data());
      stay[r] = v.stay;
      log_prob[r] = v.log_q(tokens[r]);
      log_kernel[r] = stays ? std::log(v.stay) : fastsmc::log_kernel(v, tokens[r], bins.data());
    }
  }
}

void redraw_logits(const Contrast& of, float* out) {
#pragma omp parallel if (of.n_rows * of.vocab > kSerial)
  {
    Comparer comparer(of);
    LawWriter writer(of.vocab);
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < of.n_rows; ++r) {
      Versus v;
      float* row = out + r * of.vocab;
      if (!comparer.load(r, &v)) std::fill_n(row, of.vocab, kNegInf);
      else if (!v.compare()) std::fill_n(row, of.vocab, static_cast<float>(kNan));
      else writer.write(v, row);
    }
  }
}

// Every token that can win has an exponential of its own, whatever the logits: that is the joint noise.
void gumbel(const Contrast& of, const double* lse, const NoiseKeys& keys, int64_t* tokens) {
#pragma omp parallel if (of.n_rows * of.vocab > kSerial / 16)
  {
    Comparer comparer(of);
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < of.n_rows; ++r) {
      Versus v;
      tokens[r] = kNoToken;
      if (!comparer.load(r, &v) || !v.compare()) continue;
      const auto exponential = [&](int64_t i) {
        const UniformKey key{static_cast<uint64_t>(keys.seeds[r]), static_cast<uint32_t>(keys.groups[r]),
                             static_cast<uint32_t>(keys.steps[r]), kNoiseStream + static_cast<uint32_t>(i)};
        return -std::log1p(-uniform(key, static_cast<uint32_t>(keys.particles[r])));
      };
      tokens[r] = win(v, lse[r], of.vocab, exponential);
    }
  }
}

template <typename T>
void intervene_all(T* x, int64_t x_stride, const T* source, int64_t source_stride, const int64_t* slots, int64_t n_rows,
                   const Intervention& of) {
  std::vector<int64_t> begins;  // of blocks of neighbours that have one slot
  for (int64_t r = 0; r < n_rows; ++r)
    if (begins.empty() || slots[r] != slots[begins.back()] || r - begins.back() == kInterveneRows) begins.push_back(r);
  const int64_t n_blocks = begins.size();
  begins.push_back(n_rows);
#pragma omp parallel if (n_rows * of.width > kSerial)
  {
    std::vector<float> y(kInterveneRows * of.source_width), sum(kInterveneRows * of.width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < n_blocks; ++b) {
      const int64_t begin = begins[b];
      const int n = static_cast<int>(begins[b + 1] - begin);
      if (slots[begin] < 0) continue;
      T* rows[kInterveneRows];
      const T* sources[kInterveneRows];
      for (int j = 0; j < n; ++j) {
        rows[j] = x + (begin + j) * x_stride;
        sources[j] = source + (begin + j) * source_stride;
      }
      intervene_rows(of, slots[begin], n, rows, sources, y.data(), sum.data());
    }
  }
}

void intervene(void* x, int64_t x_stride, const void* source, int64_t source_stride, int dtype, const int64_t* slots,
               int64_t n_rows, const Intervention& of) {
  const auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    intervene_all(static_cast<T*>(x), x_stride, static_cast<const T*>(source), source_stride, slots, n_rows, of);
  };
  if (dtype == kFloat32) run(static_cast<float*>(nullptr));
  else if (dtype == kBFloat16) run(static_cast<bf16*>(nullptr));
  else if (dtype == kFloat16) run(static_cast<fp16*>(nullptr));
  else throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
}

// First index of a row with logits whose temperature is not positive and finite, or too small for 1/T, else −1.
int64_t bad_temperature(const double* temperature, const int64_t* logit_rows, int64_t n) {
  for (int64_t r = 0; r < n; ++r) {
    const double t = temperature[r];
    const bool good = t > 0.0 && t < std::numeric_limits<double>::infinity() && 1.0 / t < 1e38;
    if (!good && (!logit_rows || logit_rows[r] >= 0)) return r;
  }
  return -1;
}

// First index outside [0, 1], NaN included, else −1.
int64_t bad_threshold(const double* thresholds, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(thresholds[i] >= 0.0 && thresholds[i] <= 1.0)) return i;
  return -1;
}

// First index outside [low, high) among those where `where` is not negative, or all where it is null; else −1.
int64_t bad_index(const int64_t* index, int64_t n, int64_t low, int64_t high, const int64_t* where) {
  for (int64_t i = 0; i < n; ++i)
    if ((index[i] < low || index[i] >= high) && (!where || where[i] >= 0)) return i;
  return -1;
}

// First position outside [0, most], else −1.
int64_t bad_position(const int32_t* positions, int64_t n, int64_t most) {
  for (int64_t i = 0; i < n; ++i)
    if (positions[i] < 0 || positions[i] > most) return i;
  return -1;
}

// First particle whose slot is not one of its group's, else −1.
int64_t bad_slot(const int64_t* slots, const int64_t* offsets, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i)
      if (slots[i] < 0 || slots[i] >= offsets[g + 1] - offsets[g]) return i;
  return -1;
}

// First group of more than `largest` particles, else −1.
int64_t bad_size(const int64_t* offsets, int64_t groups, int64_t largest) {
  for (int64_t g = 0; g < groups; ++g)
    if (offsets[g + 1] - offsets[g] > largest) return g;
  return -1;
}

// First index that does not ascend from 0 to n, else −1.
int64_t bad_offset(const int64_t* offsets, int64_t groups, int64_t n) {
  for (int64_t g = 0; g <= groups; ++g)
    if (offsets[g] < (g > 0 ? offsets[g - 1] : 0) || offsets[g] > (g > 0 ? n : 0)) return g;
  return offsets[groups] == n ? -1 : groups;
}

// First index that is NaN or +inf, else −1.
int64_t bad_log_weight(const double* log_weights, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(log_weights[i] < std::numeric_limits<double>::infinity())) return i;
  return -1;
}

namespace {
std::unique_ptr<u64[]> resample_memory(int64_t n) {  // not initialised: a small group would pay for it
  return std::unique_ptr<u64[]>(new u64[ResampleScratch::words(n)]);
}
}  // namespace

void resample(const ResamplingGroups& all) {
#pragma omp parallel for schedule(static) if (all.groups > 1 && all.particles > kSerial)
  for (int64_t g = 0; g < all.groups; ++g) {
    OneThread team;
    const Resampling r = all.group(g);
    fastsmc::resample(team, r, resample_memory(r.n).get());
  }
}

void emulate_resample(const ResamplingGroups& all, int threads, uint64_t seed) {
  ShuffledTeam team(threads, seed);
  const auto memory = resample_memory(all.first.n);
  for (int64_t g = 0; g < all.groups; ++g) fastsmc::resample(team, all.group(g), memory.get());
}

// (Σw)²/Σw² and log mean w, as resample() finds them.
void ess_log_mean(const double* log_weights, int64_t n, double* ess, double* log_mean) {
  bool resampled;
  OneThread team;
  const Lanes lanes(n);
  const auto memory = resample_memory(n);
  const ResampleScratch s(memory.get(), lanes);
  Resampling r{};
  r.log_weights = log_weights, r.n = n, r.ess = ess, r.log_mean = log_mean, r.resampled = &resampled;
  summarise(team, r, {lanes, s.values, s.totals}, s);
}

// First index outside [0, 1), NaN included, else −1.
int64_t bad_uniform(const double* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(u[i] >= 0.0 && u[i] < 1.0)) return i;
  return -1;
}

int64_t not_in_place(const int64_t* ancestors, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!in_place(ancestors, n, i)) return i;
  return -1;
}

int64_t bad_tail(const Reindexing& r, const std::vector<BlockCache>& caches) {
  if (caches.empty()) return -1;
  int64_t n_blocks = std::numeric_limits<int64_t>::max();
  for (const BlockCache& cache : caches) n_blocks = std::min(n_blocks, cache.n_blocks);
  for (int64_t i = 0; i < r.n; ++i) {
    const int64_t a = r.ancestors[i];
    const int64_t tail = r.tokens(a) / r.block_size;
    if (a == i || r.tokens(a) % r.block_size == 0) continue;
    const int64_t from = r.table[a * r.stride + tail], to = r.table[i * r.stride + tail];
    if (from < 0 || from >= n_blocks || to < 0 || to >= n_blocks || from == to) return i;
  }
  return -1;
}

void reindex(const Reindexing& r, const std::vector<BlockCache>& caches) {
  if (int32_t* generation = r.generation()) std::copy(r.ancestors, r.ancestors + r.n, generation);
  std::vector<int64_t> moved;  // rows that take over a tail
  for (int64_t i = 0; i < r.n; ++i) {
    const int64_t a = r.ancestors[i];
    if (a == i || !in_place(r.ancestors, r.n, i)) continue;
    const int64_t tokens = r.tokens(a);
    if (tokens < 0 || tokens > r.columns * r.block_size) continue;
    memcpy(r.table + i * r.stride, r.table + a * r.stride, sizeof(int32_t) * (tokens / r.block_size));
    if (tokens % r.block_size > 0) moved.push_back(i);
  }
  const int64_t n_moved = moved.size(), n_caches = caches.size();
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t c = 0; c < n_caches; ++c)
    for (int64_t m = 0; m < n_moved; ++m) {
      const BlockCache& cache = caches[c];
      const int64_t a = r.ancestors[moved[m]], tail = r.tokens(a) / r.block_size, slots = r.tokens(a) % r.block_size;
      const int64_t from = r.table[a * r.stride + tail], to = r.table[moved[m] * r.stride + tail];
      if (!cache.copies(from, to)) continue;
      const char* source = cache.base + from * cache.stride;
      char* target = cache.base + to * cache.stride;
      for (int64_t piece = 0; piece < cache.pieces; ++piece)
        memcpy(target + piece * cache.piece_size, source + piece * cache.piece_size, cache.used(slots));
    }
}

void emulate_reindex(const Reindexing& r, const std::vector<BlockCache>& caches, int parts, int threads,
                     uint64_t seed) {
  ShuffledTeam team(static_cast<int>(r.n * parts * threads), seed);
  team.each(team.size, [&](int i) {
    const int thread = i % threads, part = i / threads % parts;
    reindex_row(r, caches.data(), static_cast<int>(caches.size()), i / threads / parts, part, parts, thread, threads);
  });
}

void settle(const int64_t* slots, const int64_t* tokens, const bool* wanted, const int64_t* offsets, int64_t groups,
            const Histories& out) {
  std::vector<int64_t> order, row_of;  // wanted particles, those with one history side by side; by slot
  int64_t row = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = offsets[g], end = offsets[g + 1];
    order.clear();
    for (int64_t i = begin; i < end; ++i) {
      out.ancestors[i] = i, out.slots[i] = slots[i], out.tokens[i] = 0, out.rows[i] = -1;
      out.present[i] = out.copied[i] = false;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (!wanted[i]) continue;
      order.push_back(i);
      out.present[begin + slots[i]] = true;
    }
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::make_tuple(slots[a], tokens[a], a) < std::make_tuple(slots[b], tokens[b], b);
    });
    int64_t vacant = begin;
    for (size_t k = 0; k < order.size(); ++k) {
      const int64_t i = order[k], before = k > 0 ? order[k - 1] : -1;
      int64_t target = begin + slots[i];
      if (before >= 0 && slots[before] == slots[i]) {
        if (tokens[before] == tokens[i]) {
          out.slots[i] = out.slots[before];
          continue;
        }
        while (out.present[vacant]) ++vacant;
        target = vacant;
        out.ancestors[target] = begin + slots[i];
        out.present[target] = out.copied[target] = true;
      }
      out.slots[i] = target - begin, out.tokens[target] = tokens[i];
    }
    row_of.resize(end - begin);
    for (int64_t slot = begin; slot < end; ++slot) {
      row_of[slot - begin] = row;
      row += out.present[slot];
    }
    for (const int64_t i : order) out.rows[i] = row_of[out.slots[i]];
  }
}

std::vector<Node> plan(const Table& table, int32_t* order) {
  return plan_nodes(table, order);
}

// Elements of a task's queries: so many that packing a span of keys costs little beside multiplying it, so few that
// queries and outputs stay in the second-level cache.
constexpr int64_t kTaskElements = 512 * 64;

void attend(const void* query, int64_t query_stride, void* out, int64_t out_stride, int dtype, int64_t n_heads,
            int64_t n_key_heads, const PagedKV& kv, const Table& table, int64_t length, const int32_t* order,
            const Node* nodes, int64_t n_nodes, double scale) {
  const int64_t group = n_heads / n_key_heads, threads = omp_get_max_threads();
  const int64_t fair = (2 * threads + n_key_heads - 1) / n_key_heads;  // two tasks a thread
  const int64_t small = (table.n_rows * group * kv.head_dim + kTaskElements - 1) / kTaskElements;
  const int64_t runs = std::min(table.n_rows, std::max(fair, small));
  const float scale2 = static_cast<float>(scale / kLog2);
  [[maybe_unused]] const bool tiles = may_use_tiles();
  const auto task = [&](auto math, auto* typed, int64_t head, int64_t run) {
    using T = std::remove_pointer_t<decltype(typed)>;
    attend_task<decltype(math)>(static_cast<const T*>(query), query_stride, static_cast<T*>(out), out_stride, kv,
                                table, length, order, nodes, n_nodes, table.n_rows * run / runs,
                                table.n_rows * (run + 1) / runs, head, group, scale2);
  };
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int64_t head = 0; head < n_key_heads; ++head)
    for (int64_t run = 0; run < runs; ++run) {
      if (dtype == kFloat32) task(FloatMath{}, static_cast<float*>(nullptr), head, run);
      else if (dtype == kFloat16) task(FloatMath{}, static_cast<fp16*>(nullptr), head, run);
#ifdef FASTSMC_BF16_TILES
      else if (tiles) {
        TileRegisters registers;
        task(TileMath{}, static_cast<bf16*>(nullptr), head, run);
      }
#endif
      else task(NarrowMath{}, static_cast<bf16*>(nullptr), head, run);
    }
}

}  // namespace fastsmc::cpu
