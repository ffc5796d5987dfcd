// What a table says of texts, in one call on a CPU; see bags.py, and cpu.py for the table that is searched.
//
// Rows are summed in the order in which `embedding_bag` sums them in `ExitPredictor.predict`, one number after another
// and with nothing contracted (`-ffp-contract=off`), so that the answers are the same to the last bit. Plain C++; no
// header of Python or torch. Threads are those of the OpenMP that torch has loaded already.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

namespace {

// What is read besides the texts; the fields are those of `_Bags` in cpp_bags.py.
struct Bags {
  const int64_t *slot_keys, *slot_values;
  int64_t slot_mask;
  const uint8_t* is_key;
  int64_t num_symbols;
  const float* rows;
  int64_t stride, width;
  const float *base, *edges;
  int64_t num_edges;
  const int64_t* layers;
  int64_t order, symbol_bits, size_shift, separator, shared_shift, num_buckets;
};

// Texts, and what is said of them; the fields are those of `_Texts` in cpp_bags.py.
struct Texts {
  const int64_t *symbols, *lengths;
  int64_t num_places, num_texts;
  int64_t* layers;
  float *scores, *outputs;
};

uint64_t mixed(uint64_t bits) {  // `_hash` of cpu.py
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// The sum of a text's rows.
struct Sum {
  const Bags& bags;
  float score = 0;
  float* outputs;
  int64_t num_keys = 0;

  void add(int64_t row) {
    const float* numbers = bags.rows + row * bags.stride;
    score += numbers[0];
    for (int64_t i = 1; i < bags.width; i++) outputs[i - 1] += numbers[i];
    num_keys++;
  }

  void add_found(int64_t key) {
    for (int64_t slot = mixed(key) & bags.slot_mask; bags.slot_keys[slot] >= key; slot = (slot + 1) & bags.slot_mask)
      if (bags.slot_keys[slot] == key) return add(bags.num_symbols + bags.slot_values[slot]);
  }
};

// The windows of one size of a text: packed, -1 where there is none, and whether the other run has them, too.
struct Windows {
  int64_t* packed;
  uint8_t* are_shared;
};

void pack(const Bags& bags, const int64_t* symbols, int64_t length, int64_t size, int64_t* packed) {
  for (int64_t place = 0; place < length; place++) {
    int64_t found = -1;
    if (place + size <= length) {
      found = 0;
      for (int64_t i = place; found >= 0 && i < place + size; i++)
        found = bags.is_key[symbols[i]] ? (found << bags.symbol_bits) | symbols[i] : -1;
    }
    packed[place] = found;
  }
}

// Every window is held against those of the other run: texts are short, and nothing is sorted.
void compare(const Windows& windows, int64_t length, int64_t parting) {
  for (int64_t place = 0; place < length; place++) {
    const int64_t wanted = windows.packed[place], begin = place < parting ? parting : 0;
    const int64_t end = place < parting ? length : parting;
    int64_t equal = 0;
    for (int64_t other = begin; other < end; other++) equal += windows.packed[other] == wanted;
    windows.are_shared[place] = wanted >= 0 && equal;
  }
}

int64_t share(int64_t part, int64_t whole, int64_t buckets) {
  return std::min(part * buckets / std::max<int64_t>(whole, 1), buckets - 1);
}

void sum_single(const Bags& bags, const int64_t* symbols, int64_t length, Sum& sum) {
  for (int64_t place = 0; place < length; place++) {
    int64_t packed = symbols[place];
    if (!bags.is_key[packed]) continue;
    sum.add(packed);
    for (int64_t size = 2; size <= bags.order && place + size <= length; size++) {
      const int64_t symbol = symbols[place + size - 1];
      if (!bags.is_key[symbol]) break;
      packed = (packed << bags.symbol_bits) | symbol;
      sum.add_found(packed | (size << bags.size_shift));
    }
  }
}

// `room` holds the windows of all sizes: for each `length` packed ones, and behind all of these as many flags.
void sum_pair(const Bags& bags, const int64_t* symbols, int64_t length, Sum& sum, int64_t* room) {
  const int64_t parting = std::find(symbols, symbols + length, bags.separator) - symbols;
  const auto of_size = [&](int64_t size) {
    return Windows{room + (size - 1) * length, (uint8_t*)(room + bags.order * length) + (size - 1) * length};
  };
  for (int64_t size = 1; size <= bags.order; size++) {
    pack(bags, symbols, length, size, of_size(size).packed);
    compare(of_size(size), length, parting);
  }
  const int64_t shared_bit = int64_t{1} << bags.shared_shift;
  int64_t tokens[2] = {}, common[2] = {}, twos = 0;
  for (int64_t place = 0; place < length; place++) {
    const bool is_second = place >= parting;
    for (int64_t size = 1; size <= bags.order; size++) {
      const int64_t packed = of_size(size).packed[place];
      if (packed < 0) break;
      const bool is_shared = of_size(size).are_shared[place];
      if (size == 1) tokens[is_second]++, common[is_second] += is_shared;
      if (size == 2) twos += is_shared;
      if (is_shared && is_second) continue;
      if (size == 1 && !is_shared)
        sum.add(packed);
      else
        sum.add_found(packed | (size << bags.size_shift) | (is_shared ? shared_bit : 0));
    }
  }
  if (!tokens[0] || !tokens[1]) return;
  const int64_t most = bags.num_buckets;
  const int64_t buckets[] = {std::min(tokens[0] - common[0], most - 1), std::min(tokens[1] - common[1], most - 1),
                             share(common[0], tokens[0], most), share(common[1], tokens[1], most),
                             share(twos, common[0] + common[1], most)};
  for (int64_t kind = 0; kind < 5; kind++) sum.add_found(shared_bit | (kind * most + buckets[kind]));
}

void reduce(const Bags& bags, const Texts& texts, int64_t text, int64_t start, int64_t* room) {
  const int64_t length = texts.lengths[text];
  float* outputs = texts.outputs + text * (bags.width - 1);
  std::fill(outputs, outputs + bags.width - 1, 0.0f);
  Sum sum{bags, 0.0f, outputs};
  if (bags.separator < 0)
    sum_single(bags, texts.symbols + start, length, sum);
  else
    sum_pair(bags, texts.symbols + start, length, sum, room);
  const float num_keys = std::max<int64_t>(sum.num_keys, 1), by_root = 1.0f / std::sqrt(num_keys);
  const float score = sum.score / num_keys + bags.base[0];
  for (int64_t i = 1; i < bags.width; i++) outputs[i - 1] = outputs[i - 1] * by_root + bags.base[i];
  texts.scores[text] = score;
  texts.layers[text] = bags.layers[std::upper_bound(bags.edges, bags.edges + bags.num_edges, score) - bags.edges];
}

}  // namespace

extern "C" {

// Says of each text what the table knows. Returns 0; 1 if the lengths are not those of the symbols or one of these is
// none of the table's, and nothing is read then; 2 where there is no memory.
int geep_reduce_bags(const Bags* bags, const Texts* texts, int num_threads) {
  const int64_t num_texts = texts->num_texts, num_places = texts->num_places;
  uint64_t largest = 0;  // of a negative number larger than any
  for (int64_t i = 0; i < num_places; i++) largest = std::max(largest, (uint64_t)texts->symbols[i]);
  if (num_places && largest >= (uint64_t)bags->num_symbols) return 1;
  int64_t* starts = (int64_t*)std::malloc(std::max<int64_t>(num_texts, 1) * sizeof(int64_t));
  if (!starts) return 2;
  int64_t total = 0, longest = 0;
  for (int64_t text = 0; text < num_texts && total >= 0; text++) {
    const int64_t length = texts->lengths[text];
    starts[text] = total;
    total = length < 0 || length > num_places - total ? -1 : total + length;
    longest = std::max(longest, length);
  }
  int failed = total == num_places ? 0 : 1;
  if (!failed) {
    const int64_t room_size = bags->separator < 0 ? 1 : std::max<int64_t>(bags->order * longest * 9, 1);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_texts > 64) reduction(| : failed)
    {
      int64_t* room = (int64_t*)std::malloc(room_size);
      failed = room ? 0 : 2;
#pragma omp for schedule(dynamic, 16)
      for (int64_t text = 0; text < num_texts; text++)
        if (room) reduce(*bags, *texts, text, starts[text], room);
      std::free(room);
    }
  }
  std::free(starts);
  return failed;
}

}  // extern "C"
