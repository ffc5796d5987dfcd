// A layer on few tokens in one call, in 8 bits or bfloat16. On few tokens a product takes as long as it takes to read its
// weights, and the calls of which a layer is made take longer than that. 8-bit products are exact sums of whole numbers
// (AVX-512 VNNI), those of bfloat16 are summed in float32 (AVX-512 BF16). The steps between them, and what is rounded
// where, are those of `Int8Layer.__call__` in int8.py and `FusedLayer.__call__` in onednn.py.

#include "calls.h"
#include "lanes.h"

// A linear layer; the fields are those of `_Linear` in few_tokens.py.
struct Linear {
  const int8_t* weight;  // by sixteen columns: (width / 16, depth / 4, 16, 4)
  const float *scale, *bias;
  int64_t depth, width;  // multiples of 4 and 64
};

// The fields are those of `_Norm`.
struct Norm {
  const float *weight, *bias;
  float eps;
};

// The fields are those of `_Layer`.
struct Layer {
  Linear qkv, out, up, down;
  const float *inverse_step, *zero;  // of what the layer reads, (hidden)
  const Attention* attention;        // all but what a call brings
  const Between* between;
  float wide_inverse_step, wide_zero;  // of the wide part; a half is added to the zero point, so that cutting rounds
  Norm last;
};

// The same in bfloat16; the fields are those of `_FloatLinear` and `_FloatLayer`.
struct FloatLinear {
  const BFloat16* weight;  // by sixteen columns: (width / 16, depth / 2, 16, 2)
  const float* bias;
  int64_t depth, width;  // multiples of 2 and 64
};

struct FloatLayer {
  FloatLinear qkv, out, up, down;
  const Attention* attention;
  Norm middle, last;
  int64_t activation;  // as of `activated`
};

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)  // GCC 9 knows no products in bfloat16
#include <immintrin.h>
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

namespace {

constexpr int kChunks = 4;
constexpr int64_t kColumns = kChunks * kLanes;

bool has_vnni() {
  static const bool found = has_512() && __builtin_cpu_supports("avx512vnni");
  return found;
}

bool has_bfloat16() {
  static const bool found = has_512() && __builtin_cpu_supports("avx512bf16");
  return found;
}

enum class Then { kStore, kAdd, kActivate };

// Where a product's sums go.
struct Goal {
  float* numbers;      // (rows, width): where they go; with kAdd they hold what is added
  uint8_t* rounded;    // the same in 8 bits
  int64_t activation;  // as of `activated`
  float inverse_step, zero;
};

// What becomes of a product's sums. Apart, for clang hands no vectors from functions for one kind of CPU to such for all.
template <int rows, Then then>
INLINE void finish(const Linear& linear, const Ints (&sums)[rows][kChunks], int64_t column, const Goal& goal) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++) {
      const int64_t i = column + c * kLanes, at = r * linear.width + i;
      Lanes x = __builtin_convertvector(sums[r][c], Lanes) * load(linear.scale + i) + load(linear.bias + i);
      if constexpr (then == Then::kAdd) x += load(goal.numbers + at);
      if constexpr (then == Then::kActivate) {
        x = activated(x, goal.activation) * goal.inverse_step + goal.zero;
        store(goal.rounded + at, lesser(greater(x, Lanes{}), all(255.0f)));
      } else {
        store(goal.numbers + at, x);
      }
    }
}

// Some rows times sixty-four columns.
template <int rows, Then then>
VNNI void product(const Linear& linear, const uint8_t* from, int64_t column, const Goal& goal) {
  __m512i sums[rows][kChunks];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++) sums[r][c] = _mm512_setzero_si512();
  const int8_t* weight = linear.weight + column * linear.depth;
  for (int64_t d = 0; d < linear.depth; d += 4) {
    __m512i those[kChunks];
    for (int c = 0; c < kChunks; c++)
      those[c] = _mm512_loadu_si512(weight + c * kLanes * linear.depth + d * kLanes);
    for (int r = 0; r < rows; r++) {
      int32_t four;
      std::memcpy(&four, from + r * linear.depth + d, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      for (int c = 0; c < kChunks; c++) sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], x, those[c]);
    }
  }
  Ints found[rows][kChunks];
  std::memcpy(found, sums, sizeof found);
  finish<rows, then>(linear, found, column, goal);
}

template <Then then>
VNNI void columns_of(const Linear& linear, const uint8_t* from, int64_t rows, int64_t column, Goal goal) {
  for (int64_t row = 0; row < rows;) {
    switch (std::min<int64_t>(rows - row, kRows)) {
#define CASE(n)                                          \
  case n:                                                \
    product<n, then>(linear, from, column, goal);        \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
    row += kRows;
    from += kRows * linear.depth;
    goal.numbers += then == Then::kActivate ? 0 : kRows * linear.width;
    goal.rounded += then == Then::kActivate ? kRows * linear.width : 0;
  }
}

template <Then then>
void multiply(const Linear& linear, const uint8_t* from, int64_t rows, const Goal& goal, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t column = 0; column < linear.width; column += kColumns)
    columns_of<then>(linear, from, rows, column, goal);
}

VNNI void normalise_rows(const Norm& norm, float* numbers, int64_t rows, int64_t hidden) {
  for (int64_t row = 0; row < rows; row++)
    normalise(numbers + row * hidden, hidden, norm.weight, norm.bias, norm.eps);
}

template <int rows, Then then>
INLINE void finish(const FloatLinear& linear, const Lanes (&sums)[rows][kChunks], int64_t column, BFloat16* to,
                   int64_t activation) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++) {
      BFloat16* at = to + r * linear.width + column + c * kLanes;
      Lanes x = sums[r][c];
      if constexpr (then == Then::kAdd) x += load(at);
      if constexpr (then == Then::kActivate) x = activated(x, activation);
      store(at, x);
    }
}

// Some rows times sixty-four columns. With kAdd `to` holds what is added.
template <int rows, Then then>
BF16 void product(const FloatLinear& linear, const BFloat16* from, int64_t column, BFloat16* to, int64_t activation) {
  __m512 sums[rows][kChunks];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++) sums[r][c] = _mm512_loadu_ps(linear.bias + column + c * kLanes);
  const BFloat16* weight = linear.weight + column * linear.depth;
  for (int64_t d = 0; d < linear.depth; d += 2) {
    __m512bh those[kChunks];
    for (int c = 0; c < kChunks; c++)
      those[c] = (__m512bh)_mm512_loadu_si512(weight + c * kLanes * linear.depth + d * kLanes);
    for (int r = 0; r < rows; r++) {
      int32_t two;
      std::memcpy(&two, from + r * linear.depth + d, sizeof two);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
      for (int c = 0; c < kChunks; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], x, those[c]);
    }
  }
  Lanes found[rows][kChunks];
  std::memcpy(found, sums, sizeof found);
  finish<rows, then>(linear, found, column, to, activation);
}

template <Then then>
BF16 void columns_of(const FloatLinear& linear, const BFloat16* from, int64_t rows, int64_t column, BFloat16* to,
                     int64_t activation) {
  for (int64_t row = 0; row < rows; row += kRows) {
    switch (std::min<int64_t>(rows - row, kRows)) {
#define CASE(n)                                                                                                     \
  case n:                                                                                                           \
    product<n, then>(linear, from + row * linear.depth, column, to + row * linear.width, activation);               \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
  }
}

template <Then then>
void multiply(const FloatLinear& linear, const BFloat16* from, int64_t rows, BFloat16* to, int num_threads,
              int64_t activation = 0) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t column = 0; column < linear.width; column += kColumns)
    columns_of<then>(linear, from, rows, column, to, activation);
}

// `room` holds a row.
INLINE void normalise_row(const Norm& norm, BFloat16* at, int64_t hidden, float* room) {
    for (int64_t i = 0; i < hidden; i += kLanes) store(room + i, load(at + i));
    normalise(room, hidden, norm.weight, norm.bias, norm.eps);
    for (int64_t i = 0; i < hidden; i += kLanes) store(at + i, load(room + i));
}

BF16 void normalise_rows(const Norm& norm, BFloat16* numbers, int64_t rows, int64_t hidden, float* room) {
  for (int64_t row = 0; row < rows; row++) {
    normalise_row(norm, numbers + row * hidden, hidden, room);
  }
}

// A layer's attention on what a call brings; `kind` as of `geep_attend`.
int attend(Attention call, const void* qkv, void* out, const int64_t* offsets, int64_t num_texts, int64_t longest,
           int kind, int num_threads) {
  call.qkv = qkv;
  call.out = out;
  call.offsets = offsets;
  call.num_texts = num_texts;
  call.longest = longest;
  return geep_attend(&call, kind, num_threads);
}

}  // namespace

extern "C" {

int geep_has_vnni() { return has_vnni(); }

int geep_has_bfloat16() { return has_bfloat16(); }

// As `geep_few_tokens`, in bfloat16.
int geep_few_tokens_bfloat16(const FloatLayer* layer, const BFloat16* hidden, BFloat16* out, const int64_t* offsets,
                             int64_t num_texts, int64_t longest, int num_threads) {
  const int64_t rows = offsets[num_texts], width = layer->qkv.depth, wide = layer->up.width;
  const int64_t size = width * 4 + rows * (3 * width + 2 * width + wide) * 2;
  char* room = (char*)std::aligned_alloc(64, (size + 63) / 64 * 64);
  if (!room) return 1;
  float* row = (float*)room;
  BFloat16 *qkv = (BFloat16*)(row + width), *mixed = qkv + rows * 3 * width, *middle = mixed + rows * width;
  BFloat16* activated = middle + rows * width;
  multiply<Then::kStore>(layer->qkv, hidden, rows, qkv, num_threads);
  const int failed = attend(*layer->attention, qkv, mixed, offsets, num_texts, longest, 1, num_threads);
  if (!failed) {
    std::memcpy(middle, hidden, rows * width * sizeof(BFloat16));
    multiply<Then::kAdd>(layer->out, mixed, rows, middle, num_threads);
    normalise_rows(layer->middle, middle, rows, width, row);
    multiply<Then::kActivate>(layer->up, middle, rows, activated, num_threads, layer->activation);
    std::memcpy(out, middle, rows * width * sizeof(BFloat16));
    multiply<Then::kAdd>(layer->down, activated, rows, out, num_threads);
    normalise_rows(layer->last, out, rows, width, row);
  }
  std::free(room);
  return failed;
}

// Runs a layer on tokens (rows, hidden) of texts that begin at `offsets`. Returns 0, or 1 where there is no memory.
int geep_few_tokens(const Layer* layer, const float* hidden, float* out, const int64_t* offsets, int64_t num_texts,
                    int64_t longest, int num_threads) {
  const int64_t rows = offsets[num_texts], width = layer->qkv.depth, wide = layer->up.width;
  const int64_t size = std::max<int64_t>(rows * (3 * width * 4 + 3 * width + wide), 64);
  char* room = (char*)std::aligned_alloc(64, (size + 63) / 64 * 64);
  if (!room) return 1;
  float* qkv = (float*)room;
  uint8_t *read = (uint8_t*)(qkv + rows * 3 * width), *mixed = read + rows * width, *rounded = mixed + rows * width;
  uint8_t* activated = rounded + rows * width;
  geep_round(hidden, read, rows, width, layer->inverse_step, layer->zero, num_threads);
  multiply<Then::kStore>(layer->qkv, read, rows, {qkv, nullptr, 0, 0, 0}, num_threads);
  const int failed = attend(*layer->attention, qkv, mixed, offsets, num_texts, longest, 2, num_threads);
  if (!failed) {
    std::memcpy(out, hidden, rows * width * sizeof(float));
    multiply<Then::kAdd>(layer->out, mixed, rows, {out, nullptr, 0, 0, 0}, num_threads);
    geep_between(layer->between, out, rounded, rows, num_threads);
    const Goal goal{nullptr, activated, layer->between->activation, layer->wide_inverse_step, layer->wide_zero};
    multiply<Then::kActivate>(layer->up, rounded, rows, goal, num_threads);
    multiply<Then::kAdd>(layer->down, activated, rows, {out, nullptr, 0, 0, 0}, num_threads);
    normalise_rows(layer->last, out, rows, width);
  }
  std::free(room);
  return failed;
}

}  // extern "C"

#else

extern "C" {
int geep_has_vnni() { return 0; }
int geep_has_bfloat16() { return 0; }
int geep_few_tokens_bfloat16(const FloatLayer*, const BFloat16*, BFloat16*, const int64_t*, int64_t, int64_t, int) {
  return 1;
}
int geep_few_tokens(const Layer*, const float*, float*, const int64_t*, int64_t, int64_t, int) { return 1; }
}

#endif
