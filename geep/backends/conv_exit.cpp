// The convolutional exit (`ConvHead` of geep/modeling/heads.py) in one call: of few texts an exit takes less time than
// the calls of which it is made. Computes in float32, whatever weights and hidden states are kept in.
//
// Tokens are narrowed into rows with `reach` rows of zeros between texts, so that the neighbours of a token are one row
// of numbers and the convolution is a product like any other.

#include <omp.h>

#include "lanes.h"

namespace {

constexpr int64_t kChunks = 4, kColumns = kChunks * kLanes;  // channels
constexpr int kTexts = 4;                                    // answered together, as many rows of a product

// Weights; the fields are those of `_Exit` in conv_exit.py. Matrices lie as (in, out), only the last as (out, in), which
// is float32 as all biases are.
struct Exit {
  const void *narrow, *convolution, *dense;
  const float *out, *narrow_bias, *convolution_bias, *dense_bias, *out_bias;
  int64_t hidden, reach, dense_width, num_labels;
  int64_t parts;  // of a text: 1, or 2 that are compared
};

// What a call reads and writes; the fields are those of `_Texts` in conv_exit.py.
struct Texts {
  const void* hidden;     // (tokens, hidden)
  const int64_t* texts;   // where each begins, and the end of the last, (num_texts + 1)
  const int64_t* halves;  // the same of the parts of each, (num_texts * parts + 1)
  int64_t num_texts;
  float* logits;  // (num_texts, num_labels)
};

// Some tokens of one text.
struct Block {
  int64_t first, count, row;  // the first token, how many, and the row of the first among narrowed ones
};

INLINE const float* as_floats(const float* from, int64_t, float*) { return from; }

INLINE const float* as_floats(const BFloat16* from, int64_t count, float* room) {
  for (int64_t i = 0; i < count; i += kLanes) store(room + i, load(from + i));
  return room;
}

template <int rows, class T>
INLINE void narrow(const Exit& exit, const T* hidden, float* narrowed, float* room) {
  Lanes sums[rows][kChunks];
  product(as_floats(hidden, rows * exit.hidden, room), exit.hidden, (const T*)exit.narrow, exit.hidden, kColumns,
          exit.narrow_bias, sums);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++) store(narrowed + r * kColumns + c * kLanes, gelu(sums[r][c]));
}

// Narrowed tokens with what their neighbours have to say.
template <int rows, class T>
INLINE void convolve(const Exit& exit, const float* narrowed, float* near) {
  Lanes sums[rows][kChunks];
  product(narrowed - exit.reach * kColumns, kColumns, (const T*)exit.convolution, (2 * exit.reach + 1) * kColumns,
          kColumns, exit.convolution_bias, sums);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++) {
      const int64_t at = r * kColumns + c * kLanes;
      store(near + at, load(narrowed + at) + gelu(sums[r][c]));
    }
}

// The last rows are made once more where they do not fill a block: the same numbers, written again.
template <class T>
INLINE void narrow_all(const Exit& exit, const Texts& texts, const Block& block, float* narrowed, float* room) {
  const T* from = (const T*)texts.hidden + block.first * exit.hidden;
  float* to = narrowed + block.row * kColumns;
  for (int64_t i = 0; i < block.count;) {
    if (block.count < kRows) {
      narrow<1>(exit, from + i * exit.hidden, to + i * kColumns, room);
      i += 1;
    } else {
      const int64_t at = std::min(i, block.count - kRows);
      narrow<kRows>(exit, from + at * exit.hidden, to + at * kColumns, room);
      i += kRows;
    }
  }
}

template <class T>
INLINE void convolve_all(const Exit& exit, const Block& block, const float* narrowed, float* near) {
  const int64_t start = block.row * kColumns;
  for (int64_t i = 0; i < block.count;) {
    if (block.count < kRows) {
      convolve<1, T>(exit, narrowed + start + i * kColumns, near + start + i * kColumns);
      i += 1;
    } else {
      const int64_t at = start + std::min(i, block.count - kRows) * kColumns;
      convolve<kRows, T>(exit, narrowed + at, near + at);
      i += kRows;
    }
  }
}

// Mean and maximum of rows; zeros where there are none.
INLINE void pool(const float* rows, int64_t count, float* to) {
  const float share = count ? 1.0f / count : 0.0f;
  for (int64_t i = 0; i < kColumns; i += kLanes) {
    Lanes sum = {}, high = all(count ? -3.4e38f : 0.0f);
    for (int64_t row = 0; row < count; row++) {
      const Lanes x = load(rows + row * kColumns + i);
      sum += x;
      high = greater(high, x);
    }
    store(to + i, sum * share);
    store(to + kColumns + i, high);
  }
}

// Features of a text: mean and maximum, of two parts those of either, their distance and their product.
INLINE void read_text(const Exit& exit, const Texts& texts, int64_t text, const float* near, float* features) {
  const int64_t width = 2 * kColumns;
  for (int64_t part = 0; part < exit.parts; part++) {
    const int64_t* bounds = texts.halves + text * exit.parts + part;
    pool(near + (bounds[0] + exit.reach * (text + 1)) * kColumns, bounds[1] - bounds[0], features + part * width);
  }
  if (exit.parts == 1) return;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Lanes one = load(features + i), other = load(features + width + i), gap = one - other;
    store(features + 2 * width + i, greater(gap, -gap));
    store(features + 3 * width + i, one * other);
  }
}

template <int count, class T>
INLINE void answer(const Exit& exit, const Texts& texts, int64_t text, const float* near, float* room) {
  const int64_t depth = (exit.parts == 2 ? 8 : 2) * kColumns;
  float *features = room, *dense = room + kTexts * depth;
  for (int r = 0; r < count; r++) read_text(exit, texts, text + r, near, features + r * depth);
  for (int64_t column = 0; column < exit.dense_width; column += kColumns) {
    Lanes sums[count][kChunks];
    product(features, depth, (const T*)exit.dense + column, depth, exit.dense_width, exit.dense_bias + column, sums);
    for (int r = 0; r < count; r++)
      for (int c = 0; c < kChunks; c++) store(dense + r * exit.dense_width + column + c * kLanes, tangent(sums[r][c]));
  }
  for (int r = 0; r < count; r++)
    for (int64_t label = 0; label < exit.num_labels; label++) {
      Lanes sum = {};
      for (int64_t i = 0; i < exit.dense_width; i += kLanes)
        sum += load(dense + r * exit.dense_width + i) * load(exit.out + label * exit.dense_width + i);
      texts.logits[(text + r) * exit.num_labels + label] = total(sum) + exit.out_bias[label];
    }
}

template <class T>
INLINE void answer_all(const Exit& exit, const Texts& texts, int64_t text, const float* near, float* room) {
  if (text + kTexts <= texts.num_texts) return answer<kTexts, T>(exit, texts, text, near, room);
  for (; text < texts.num_texts; text++) answer<1, T>(exit, texts, text, near, room);
}

#define FOR_EACH_KIND(NAME, PARAMETERS, CALL, ...)                        \
  FOR_EACH_CPU(NAME##_float, PARAMETERS, { CALL<float>(__VA_ARGS__); })   \
  FOR_EACH_CPU(NAME##_bfloat16, PARAMETERS, { CALL<BFloat16>(__VA_ARGS__); })

FOR_EACH_KIND(narrow, (const Exit& exit, const Texts& texts, const Block& block, float* to, float* room), narrow_all,
              exit, texts, block, to, room)
FOR_EACH_KIND(convolve, (const Exit& exit, const Block& block, const float* from, float* to), convolve_all, exit, block,
              from, to)
FOR_EACH_KIND(answer, (const Exit& exit, const Texts& texts, int64_t text, const float* near, float* room), answer_all,
              exit, texts, text, near, room)

}  // namespace

extern "C" {

// Lets an exit answer texts. `kind` 0: hidden states and matrices are float32, 1: bfloat16. Returns 0, or 1 where there
// is no memory.
int geep_conv_exit(const Exit* exit, const Texts* texts, int kind, int num_threads) {
  const int64_t tokens = texts->texts[texts->num_texts], rows = tokens + exit->reach * (texts->num_texts + 1);
  // Blocks that all threads get some of.
  const int64_t size = std::clamp<int64_t>(tokens / (num_threads * 2) / kRows, 1, 16) * kRows;
  const int64_t most = tokens / size + texts->num_texts;
  const int64_t depth = (exit->parts == 2 ? 8 : 2) * kColumns;
  const int64_t room_size = std::max(kRows * exit->hidden, kTexts * (depth + exit->dense_width));
  float* narrowed = (float*)std::aligned_alloc(64, 2 * rows * kColumns * sizeof(float));
  float* rooms = (float*)std::aligned_alloc(64, num_threads * room_size * sizeof(float));
  Block* blocks = (Block*)std::malloc(std::max<int64_t>(most, 1) * sizeof(Block));
  const bool has_memory = narrowed && rooms && blocks;
  if (has_memory) {
    float* near = narrowed + rows * kColumns;
    int64_t num_blocks = 0;
    for (int64_t text = 0; text < texts->num_texts; text++) {
      const int64_t begin = texts->texts[text], end = texts->texts[text + 1];
      std::memset(narrowed + (begin + exit->reach * text) * kColumns, 0, exit->reach * kColumns * sizeof(float));
      // Of a block's rows fewer than `kRows` are made one by one, so the last block takes what is left.
      for (int64_t first = begin; first < end;) {
        const int64_t left = end - first, count = left < size + kRows ? left : size;
        blocks[num_blocks++] = {first, count, first + exit->reach * (text + 1)};
        first += count;
      }
    }
    std::memset(narrowed + (rows - exit->reach) * kColumns, 0, exit->reach * kColumns * sizeof(float));
    auto* narrow_one = kind ? BEST_OF(narrow_bfloat16) : BEST_OF(narrow_float);
    auto* convolve_one = kind ? BEST_OF(convolve_bfloat16) : BEST_OF(convolve_float);
    auto* answer_some = kind ? BEST_OF(answer_bfloat16) : BEST_OF(answer_float);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_blocks > 1)
    {
      float* room = rooms + omp_get_thread_num() * room_size;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_blocks; i++) narrow_one(*exit, *texts, blocks[i], narrowed, room);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_blocks; i++) convolve_one(*exit, blocks[i], narrowed, near);
#pragma omp for schedule(dynamic)
      for (int64_t text = 0; text < texts->num_texts; text += kTexts) answer_some(*exit, *texts, text, near, room);
    }
  }
  std::free(narrowed);
  std::free(rooms);
  std::free(blocks);
  return !has_memory;
}

}  // extern "C"
