// Passes over packed texts for which torch has no CPU kernel of its own: attention of texts of any lengths, what exits
// read of them, and rounding to 8 bits. Products of matrices stay oneDNN's.
//
// Plain C++ with the vector extensions of GCC and Clang; no header of Python or torch. `geep/backends/kernels.py` calls
// what is exported at the end. Threads are those of the OpenMP that torch has loaded already.

#include "calls.h"
#include "lanes.h"

namespace {

// Transposes 16 x 16 numbers in four rounds; in each, blocks of one size change places.
INLINE void transpose(Lanes (&rows)[kLanes]) {
#define ROUND(size, LOWER, UPPER)                 \
  UNROLL for (int i = 0; i < kLanes; i++) {       \
    if (i & size) continue;                       \
    const Lanes a = rows[i], b = rows[i + size];  \
    rows[i] = SHUFFLE(a, b, LOWER);               \
    rows[i + size] = SHUFFLE(a, b, UPPER);        \
  }
#define LOWER_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define UPPER_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOWER_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define UPPER_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOWER_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define UPPER_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOWER_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define UPPER_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  ROUND(8, LOWER_8, UPPER_8)
  ROUND(4, LOWER_4, UPPER_4)
  ROUND(2, LOWER_2, UPPER_2)
  ROUND(1, LOWER_1, UPPER_1)
}

// ---- Attention ----

template <class In>
INLINE Lanes turned(const In* from, const float* turn, int64_t head) {
  const Lanes x = load(from);
  return turn ? x * load(turn) + crossed<1>(x) * load(turn + head) : x;
}

// One head of one text.
template <int kChunks, class In, class Out>
struct Head {
  static constexpr int64_t kHead = kChunks * kLanes;
  const Attention& call;
  int64_t length, padded;  // tokens, and the same up to full lanes
  const In *query, *key, *value;
  Out* out;
  const float *bias, *by_content, *by_position, *inverse_step, *zero;
  float* keys;     // transposed, (kHead, padded)
  float* scratch;  // scores of some rows, then their queries

  INLINE int64_t stride() const { return 3 * call.num_heads * kHead; }

  INLINE const float* turn(int64_t token, int64_t chunk) const {
    return call.turns ? call.turns + token * 2 * kHead + chunk * kLanes : nullptr;
  }

  INLINE void transpose_keys() const {
    for (int64_t first = 0; first < padded; first += kLanes) {
      for (int64_t chunk = 0; chunk < kChunks; chunk++) {
        Lanes block[kLanes];
        UNROLL for (int i = 0; i < kLanes; i++) {
          const int64_t token = first + i;
          const In* from = key + token * stride() + chunk * kLanes;
          block[i] = token < length ? turned(from, turn(token, chunk), kHead) : Lanes{};
        }
        transpose(block);
        UNROLL for (int i = 0; i < kLanes; i++) store(keys + (chunk * kLanes + i) * padded + first, block[i]);
      }
    }
  }

  template <int kRows, int kColumns>
  INLINE void score(const float* queries, int64_t column, float* scores) const {
    Lanes sums[kRows][kColumns] = {};
    for (int64_t d = 0; d < kHead; d++) {
      Lanes those[kColumns];
      for (int c = 0; c < kColumns; c++) those[c] = load(keys + d * padded + column + c * kLanes);
      for (int r = 0; r < kRows; r++)
        for (int c = 0; c < kColumns; c++) sums[r][c] += queries[r * kHead + d] * those[c];
    }
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < kColumns; c++) store(scores + r * padded + column + c * kLanes, sums[r][c]);
  }

  // The same where scores depend on distances in all coordinates (DeBERTa): the score of query i and key j is
  // i·(j + content vector of j - i) + j·(position vector of j - i).
  template <int kRows>
  INLINE void score_by_distance(const float* queries, int64_t first, int64_t column, float* scores) const {
    Lanes sums[kRows] = {};
    const int64_t shift = call.columns / 2 + column - first;
    for (int64_t d = 0; d < kHead; d++) {
      const Lanes those = load(keys + d * padded + column);
      for (int r = 0; r < kRows; r++) {
        const int64_t at = d * call.columns + shift - r;
        sums[r] += queries[r * kHead + d] * (those + load(by_content + at)) + those * load(by_position + at);
      }
    }
    for (int r = 0; r < kRows; r++) store(scores + r * padded + column, sums[r]);
  }

  // Turns scores of columns begin … end - 1 into shares, but for the factor that is returned.
  INLINE float softmax(float* scores, int64_t token, int64_t begin, int64_t end) const {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t last = end - kLanes;
    const Ints is_there = lane < (int32_t)std::min(length - last, kLanes);
    const float* by_column = bias ? bias + call.columns / 2 - token : nullptr;
    Lanes high = all(-3e38f);
    for (int64_t j = begin; j < end; j += kLanes) {
      Lanes x = load(scores + j);
      if (by_column) x += load(by_column + j);
      if (j == last) x = is_there ? x : all(-3e38f);
      store(scores + j, x);
      high = greater(high, x);
    }
    const Lanes top = all(greatest(high));
    Lanes sum = {};
    for (int64_t j = begin; j < end; j += kLanes) {
      const Lanes share = exponential(load(scores + j) - top);
      store(scores + j, share);
      sum += share;
    }
    return 1.0f / total(sum);
  }

  // Tokens first … first + kRows - 1 look at their text.
  template <int kRows>
  INLINE void mix(int64_t first) const {
    int64_t begin = 0, end = padded;
    if (call.window >= 0) {
      begin = std::max<int64_t>(first - call.window, 0) / kLanes * kLanes;
      end = std::min(padded, (first + kRows + call.window + kLanes - 1) / kLanes * kLanes);
    }
    float *scores = scratch, *queries = scratch + kRows * padded;
    for (int r = 0; r < kRows; r++)
      for (int64_t chunk = 0; chunk < kChunks; chunk++) {
        const In* from = query + (first + r) * stride() + chunk * kLanes;
        store(queries + r * kHead + chunk * kLanes, turned(from, turn(first + r, chunk), kHead) * call.scale);
      }
    int64_t column = begin;
    if (by_content)
      for (; column < end; column += kLanes) score_by_distance<kRows>(queries, first, column, scores);
    for (; column + 2 * kLanes <= end; column += 2 * kLanes) score<kRows, 2>(queries, column, scores);
    if (column < end) score<kRows, 1>(queries, column, scores);
    float factors[kRows];
    for (int r = 0; r < kRows; r++) factors[r] = softmax(scores + r * padded, first + r, begin, end);
    Lanes sums[kRows][kChunks] = {};
    for (int64_t j = begin; j < std::min(end, length); j++) {
      Lanes that[kChunks];
      for (int c = 0; c < kChunks; c++) that[c] = load(value + j * stride() + c * kLanes);
      for (int r = 0; r < kRows; r++)
        for (int c = 0; c < kChunks; c++) sums[r][c] += scores[r * padded + j] * that[c];
    }
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < kChunks; c++) {
        Lanes x = sums[r][c] * factors[r];
        if constexpr (sizeof(Out) == 1)
          x = lesser(greater(x * load(inverse_step + c * kLanes) + load(zero + c * kLanes), Lanes{}), all(255.0f));
        store(out + (first + r) * call.num_heads * kHead + c * kLanes, x);
      }
  }

  INLINE void run() const {
    constexpr int kRows = 16 / std::max(kChunks, 2);  // so that the sums stay in registers
    transpose_keys();
    // The last rows are mixed once more where they do not fill a block: the same numbers, written again.
    if (length >= kRows)
      for (int64_t token = 0; token < length; token += kRows) mix<kRows>(std::min(token, length - kRows));
    else
      for (int64_t token = 0; token < length; token++) mix<1>(token);
  }
};

template <int kChunks, class In, class Out>
INLINE void attend(const Attention& call, int64_t text, int64_t number, float* scratch) {
  const int64_t start = call.offsets[text], length = call.offsets[text + 1] - start, at = number * call.head;
  const int64_t padded = (length + kLanes - 1) / kLanes * kLanes, width = call.num_heads * call.head;
  const In* query = (const In*)call.qkv + start * 3 * width + at;
  const auto of_head = [&](const float* all, int64_t size) { return all ? all + number * size : nullptr; };
  const Head<kChunks, In, Out> head{call,
                                    length,
                                    padded,
                                    query,
                                    query + width,
                                    query + 2 * width,
                                    (Out*)call.out + start * width + at,
                                    of_head(call.bias, call.bias_heads > 1 ? call.columns : 0),
                                    of_head(call.by_content, call.head * call.columns),
                                    of_head(call.by_position, call.head * call.columns),
                                    of_head(call.inverse_step, call.head),
                                    of_head(call.zero, call.head),
                                    scratch,
                                    scratch + call.head * padded};
  if (length) head.run();
}

template <class In, class Out>
INLINE void attend(const Attention& call, int64_t text, int64_t number, float* scratch) {
  switch (call.head) {
    case 16: return attend<1, In, Out>(call, text, number, scratch);
    case 32: return attend<2, In, Out>(call, text, number, scratch);
    case 64: return attend<4, In, Out>(call, text, number, scratch);
  }
}

FOR_EACH_CPU(attend_float, (const Attention& call, int64_t text, int64_t number, float* scratch),
             { attend<float, float>(call, text, number, scratch); })
FOR_EACH_CPU(attend_bfloat16, (const Attention& call, int64_t text, int64_t number, float* scratch),
             { attend<BFloat16, BFloat16>(call, text, number, scratch); })
FOR_EACH_CPU(attend_8_bit, (const Attention& call, int64_t text, int64_t number, float* scratch),
             { attend<float, uint8_t>(call, text, number, scratch); })

// ---- Rounding ----

FOR_EACH_CPU(round_one, (const float* from, uint8_t* to, int64_t width, const float* inverse_step, const float* zero),
             { round_row(from, to, width, inverse_step, zero); })

// ---- Exits ----

// Mean and maximum of a text's rows, each the sum of one of `one` and one of `other`.
template <class T>
INLINE void pool(const T* one, const T* other, T* out, int64_t length, int64_t width) {
  const float share = length ? 1.0f / length : 0.0f;
  for (int64_t i = 0; i < width; i += kLanes) {
    Lanes sum = {}, high = all(length ? -3.4e38f : 0.0f);
    for (int64_t token = 0; token < length; token++) {
      const Lanes x = load(one + token * width + i) + load(other + token * width + i);
      sum += x;
      high = greater(high, x);
    }
    store(out + i, sum * share);
    store(out + width + i, high);
  }
}

FOR_EACH_CPU(pool_float, (const float* one, const float* other, float* out, int64_t length, int64_t width),
             { pool(one, other, out, length, width); })
FOR_EACH_CPU(pool_bfloat16, (const BFloat16* one, const BFloat16* other, BFloat16* out, int64_t length, int64_t width),
             { pool(one, other, out, length, width); })

}  // namespace

extern "C" {

// Whether this CPU runs the kernels.
int geep_runs_here() { return runs_here(); }

// Lets every token look at its text. `kind` 0: float32 in and out, 1: bfloat16, 2: float32 in, 8 bits out. Returns 0,
// or 1 where there is no memory.
int geep_attend(const Attention* call, int kind, int num_threads) {
  const int64_t padded = (call->longest + kLanes - 1) / kLanes * kLanes;
  const int64_t size = call->head * padded + 8 * (padded + call->head), tasks = call->num_texts * call->num_heads;
  const int64_t share = std::clamp<int64_t>(tasks / (num_threads * 8), 1, call->num_heads);
  auto* attend_one = kind == 0   ? BEST_OF(attend_float)
                     : kind == 1 ? BEST_OF(attend_bfloat16)
                                 : BEST_OF(attend_8_bit);
  int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1) reduction(| : failed)
  {
    float* scratch = (float*)std::aligned_alloc(64, size * sizeof(float));
    failed = scratch == nullptr;
#pragma omp for schedule(dynamic, share)
    for (int64_t task = 0; task < tasks; task++)
      if (scratch) attend_one(*call, task / call->num_heads, task % call->num_heads, scratch);
    std::free(scratch);
  }
  return failed;
}

// Rounds (rows, width) to unsigned 8 bits: each channel over its step, plus its zero point, the fraction cut off.
void geep_round(const float* from, uint8_t* to, int64_t rows, int64_t width, const float* inverse_step,
                const float* zero, int num_threads) {
  auto* round_one = BEST_OF(round_one);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows > 64)
  for (int64_t row = 0; row < rows; row++) round_one(from + row * width, to + row * width, width, inverse_step, zero);
}

// Puts the rows around each row side by side, those of its text alone: (tokens, bytes) to (tokens, 2 reach + 1, bytes).
void geep_neighbours(const char* rows, char* out, const int64_t* offsets, int64_t num_texts, int64_t bytes,
                     int64_t reach, int num_threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(num_threads) if (num_threads > 1 && num_texts > 8)
  for (int64_t text = 0; text < num_texts; text++)
    for (int64_t row = offsets[text]; row < offsets[text + 1]; row++) {
      char* to = out + row * (2 * reach + 1) * bytes;
      const int64_t begin = std::max(row - reach, offsets[text]), end = std::min(row + reach + 1, offsets[text + 1]);
      const int64_t before = (begin - row + reach) * bytes, there = (end - begin) * bytes;
      std::memset(to, 0, before);
      std::memcpy(to + before, rows + begin * bytes, there);
      std::memset(to + before + there, 0, (2 * reach + 1) * bytes - before - there);
    }
}

// Mean and maximum of each text's rows of a sum (tokens, width), to (texts, 2 width); width a multiple of 16. `kind` 0:
// float32, 1: bfloat16.
void geep_pool(const void* one, const void* other, void* out, int kind, const int64_t* offsets, int64_t num_texts,
               int64_t width, int num_threads) {
  auto* floats = BEST_OF(pool_float);
  auto* bfloats = BEST_OF(pool_bfloat16);
#pragma omp parallel for schedule(dynamic, 8) num_threads(num_threads) if (num_threads > 1 && num_texts > 8)
  for (int64_t text = 0; text < num_texts; text++) {
    const int64_t at = offsets[text] * width, length = offsets[text + 1] - offsets[text];
    if (kind)
      bfloats((const BFloat16*)one + at, (const BFloat16*)other + at, (BFloat16*)out + text * 2 * width, length, width);
    else
      floats((const float*)one + at, (const float*)other + at, (float*)out + text * 2 * width, length, width);
  }
}

}  // extern "C"
