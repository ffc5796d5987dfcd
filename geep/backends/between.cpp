// What stands between two 8-bit products of a layer, in one call: the norm of the sum behind attention, its rounding for
// the first wide product, and the way through those wide channels that stay in float32 (`FLOAT_CHANNELS` of int8.py).

#include "calls.h"
#include "lanes.h"

namespace {

constexpr int kChunks = 2;  // of a product at once, and all that the channels in float32 are
static_assert(kWidth == kChunks * kLanes);
constexpr int kBlock = 8;  // rows at once; `pad_rows` gives no remainder

template <int rows>
INLINE void pass(const Between& between, float* sums, uint8_t* rounded) {
  const int64_t hidden = between.hidden;
  for (int r = 0; r < rows; r++) {
    normalise(sums + r * hidden, hidden, between.norm, between.norm_bias, between.eps);
    round_row(sums + r * hidden, rounded + r * hidden, hidden, between.inverse_step, between.zero);
  }
  Lanes wide[rows][kChunks];
  product(sums, hidden, between.up, hidden, kWidth, between.up_bias, wide);
  float numbers[rows * kWidth];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kChunks; c++)
      store(numbers + r * kWidth + c * kLanes, activated(wide[r][c], between.activation));
  for (int64_t column = 0; column < hidden; column += kWidth) {
    Lanes back[rows][kChunks];
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < kChunks; c++) back[r][c] = load(sums + r * hidden + column + c * kLanes);
    add_product(numbers, kWidth, between.down + column, kWidth, hidden, back);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < kChunks; c++) store(sums + r * hidden + column + c * kLanes, back[r][c]);
  }
}

INLINE void pass_some(const Between& between, float* sums, uint8_t* rounded, int64_t count) {
  if (count == kBlock) return pass<kBlock>(between, sums, rounded);
  for (int64_t row = 0; row < count; row++)
    pass<1>(between, sums + row * between.hidden, rounded + row * between.hidden);
}

FOR_EACH_CPU(pass_block, (const Between& between, float* sums, uint8_t* rounded, int64_t count),
             { pass_some(between, sums, rounded, count); })

}  // namespace

extern "C" {

// Changes sums (rows, hidden) to normalised ones plus what the float32 channels add; `rounded` gets the normalised ones
// in 8 bits.
void geep_between(const Between* between, float* sums, uint8_t* rounded, int64_t rows, int num_threads) {
  auto* pass_one = BEST_OF(pass_block);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows > 2 * kBlock)
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t at = row * between->hidden;
    pass_one(*between, sums + at, rounded + at, std::min<int64_t>(kBlock, rows - row));
  }
}

}  // extern "C"
