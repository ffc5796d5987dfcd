// Sixteen numbers at once, and functions for several kinds of CPU: what the kernels are made of.
//
// Plain C++ with the vector extensions of GCC and Clang.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Defines NAME##_512 and NAME##_256, or NAME##_any, the same function for several kinds of CPU; `BEST_OF` takes one. (Of
// the compilers' own ways `target_clones` knows kinds by makers' names or needs a newer compiler.)
#if defined(__x86_64__)
#define FOR_EACH_CPU(NAME, PARAMETERS, ...)                                                                     \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void NAME##_512 PARAMETERS __VA_ARGS__ \
  __attribute__((target("avx2,fma"))) void NAME##_256 PARAMETERS __VA_ARGS__
#define BEST_OF(NAME) (has_512() ? NAME##_512 : NAME##_256)
inline bool has_512() {
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return found;
}
inline bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
#define FOR_EACH_CPU(NAME, PARAMETERS, ...) void NAME##_any PARAMETERS __VA_ARGS__
#define BEST_OF(NAME) NAME##_any
inline bool runs_here() { return true; }
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// ---- Sixteen numbers at once ----

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

struct BFloat16 {
  uint16_t bits;
};

INLINE Lanes all(float x) { return x - Lanes{}; }
INLINE Lanes greater(Lanes a, Lanes b) { return a > b ? a : b; }
INLINE Lanes lesser(Lanes a, Lanes b) { return a < b ? a : b; }

INLINE Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE Lanes load(const BFloat16* from) {
  Halves upper;
  std::memcpy(&upper, from, sizeof upper);
  return (Lanes)(__builtin_convertvector(upper, Words) << 16);
}

INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

INLINE void store(BFloat16* to, Lanes x) {  // to the nearest, ties to even
  const Words bits = (Words)x;
  const Halves upper = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
  std::memcpy(to, &upper, sizeof upper);
}

INLINE void store(uint8_t* to, Lanes x) {  // cuts the fraction off; x is 0 … 255
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(x, Ints), Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}

// Every number from the lane `distance` away, in blocks of twice as many.
template <int distance>
INLINE Lanes crossed(Lanes x) {
  if constexpr (distance == 1) return SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  if constexpr (distance == 2) return SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  if constexpr (distance == 4) return SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (distance == 8) return SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

INLINE float greatest(Lanes x) {
  x = greater(x, crossed<8>(x));
  x = greater(x, crossed<4>(x));
  x = greater(x, crossed<2>(x));
  return greater(x, crossed<1>(x))[0];
}

INLINE float total(Lanes x) {
  x += crossed<8>(x);
  x += crossed<4>(x);
  x += crossed<2>(x);
  return (x + crossed<1>(x))[0];
}

// exp(x) for x <= 0, to the last digit or two of a float; below the least normal number 0.
INLINE Lanes exponential(Lanes x) {
  const Lanes least = all(-87.0f), y = greater(x, least);
  const Ints halvings = __builtin_convertvector(y * 1.44269504f - 0.5f, Ints);  // cut towards 0: the nearest
  const Lanes n = __builtin_convertvector(halvings, Lanes);
  const Lanes r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact; |r| <= ln 2 / 2
  Lanes sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Lanes power = (Lanes)((halvings + 127) << 23);
  return x > least ? sum * power : Lanes{};
}

// tanh(x), from exp(-2|x|). What is no number stays none, for the engine tells by it that a text is broken.
INLINE Lanes tangent(Lanes x) {
  const Lanes size = greater(x, -x), rest = exponential(-2.0f * size), found = (1.0f - rest) / (1.0f + rest);
  return x == x ? (x < 0.0f ? -found : found) : x;
}

// x / 2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, to 2e-7.
INLINE Lanes gelu(Lanes x) {
  const Lanes z = greater(x, -x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  Lanes sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const Lanes rest = sum * t * exponential(-z * z);  // 1 - erf(z)
  return 0.5f * x * (x < 0.0f ? rest : 2.0f - rest);
}

// Rows of a product at once, so that its sums stay in registers.
constexpr int kRows = 6;

// Adds to sums: rows (stride apart) times some columns, of as many lanes as sums have, of a matrix (depth, width).
template <int rows, int chunks, class T>
INLINE void add_product(const float* from, int64_t stride, const T* weight, int64_t depth, int64_t width,
                        Lanes (&sums)[rows][chunks]) {
  for (int64_t d = 0; d < depth; d++) {
    Lanes those[chunks];
    for (int c = 0; c < chunks; c++) those[c] = load(weight + d * width + c * kLanes);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < chunks; c++) sums[r][c] += from[r * stride + d] * those[c];
  }
}

// The same product, plus a bias.
template <int rows, int chunks, class T>
INLINE void product(const float* from, int64_t stride, const T* weight, int64_t depth, int64_t width,
                    const float* bias, Lanes (&sums)[rows][chunks]) {
  for (int c = 0; c < chunks; c++)
    for (int r = 0; r < rows; r++) sums[r][c] = load(bias + c * kLanes);
  add_product(from, stride, weight, depth, width, sums);
}

// Rounds numbers to unsigned 8 bits: each over its step, plus its zero point, the fraction cut off.
INLINE void round_row(const float* from, uint8_t* to, int64_t width, const float* inverse_step, const float* zero) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Lanes x = load(from + i) * load(inverse_step + i) + load(zero + i);
    store(to + i, lesser(greater(x, Lanes{}), all(255.0f)));
  }
  for (; i < width; i++) to[i] = (uint8_t)std::min(std::max(from[i] * inverse_step[i] + zero[i], 0.0f), 255.0f);
}

// A row normalised in place, as a layer norm does.
INLINE void normalise(float* row, int64_t hidden, const float* weight, const float* bias, float eps) {
  Lanes sum = {}, squares = {};
  for (int64_t i = 0; i < hidden; i += kLanes) sum += load(row + i);
  const Lanes mean = all(total(sum) / hidden);
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const Lanes x = load(row + i) - mean;
    squares += x * x;
  }
  // Where squares overflow nothing is left of the row, and that must be seen.
  const float variance = total(squares) / hidden + eps;
  const Lanes scale = all(variance < 3.4e38f ? 1.0f / std::sqrt(variance) : std::nanf(""));
  for (int64_t i = 0; i < hidden; i += kLanes)
    store(row + i, (load(row + i) - mean) * scale * load(weight + i) + load(bias + i));
}

// Activations by number: 0 gelu, 1 gelu by tanh, 2 relu.
INLINE Lanes activated(Lanes x, int64_t kind) {
  if (kind == 0) return gelu(x);
  if (kind == 1) return 0.5f * x * (1.0f + tangent(0.79788456f * (x + 0.044715f * x * x * x)));
  return x != x ? x : greater(x, Lanes{});
}

}  // namespace
