// What kernels are called with, where one kernel calls another.

#pragma once

#include <cstdint>

// What all texts and heads of a call share; the fields are those of `_Attention` in kernels.py.
struct Attention {
  const void* qkv;         // (tokens, 3, heads, head)
  void* out;               // (tokens, heads, head)
  const int64_t* offsets;  // (texts + 1)
  int64_t num_texts, longest, num_heads, head;
  float scale;
  const float* bias;  // added to scores by distance: (bias_heads, columns), distance 0 in the middle; or null
  int64_t bias_heads, columns;
  const float *by_content, *by_position;  // by distance, too: what a query and what a key is multiplied with, each
                                          // (heads, head, columns); or null
  const float* turns;  // of queries and keys: (positions, 2, head), cosines, then sines by their signs; or null
  int64_t window;      // largest distance at which tokens see each other; -1: any
  const float *inverse_step, *zero;  // of 8-bit results, (heads * head); or null
};

// Wide channels that stay in float32 in an 8-bit layer.
constexpr int64_t kWidth = 32;

// The fields are those of `_Between` in between.py.
struct Between {
  const float *norm, *norm_bias;
  float eps;
  const float *up, *up_bias, *down;  // (hidden, kWidth), (kWidth), (kWidth, hidden)
  const float *inverse_step, *zero;  // of the rounding, (hidden)
  int64_t hidden;                    // a multiple of `kWidth`
  int64_t activation;                // 0: gelu, 1: gelu by tanh, 2: relu
};

extern "C" {
int geep_attend(const Attention* call, int kind, int num_threads);
void geep_round(const float* from, uint8_t* to, int64_t rows, int64_t width, const float* inverse_step,
                const float* zero, int num_threads);
void geep_between(const Between* between, float* sums, uint8_t* rounded, int64_t rows, int num_threads);
}
