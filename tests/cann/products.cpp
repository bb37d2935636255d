// The operators whose work is a matrix product: linear layers, convolution, attention, the MLP; and layer norm.
//
// float32 is multiplied as float32 with blocked accumulation, half types as float32 and rounded once, as the cube unit does.
// With a cube_math_type that asks for HF32 the float32 inputs are rounded to its 11 bits of mantissa first.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "standin.h"

namespace standin {
namespace {

using Floats = std::vector<float>;

// --- float32 matrices ---

struct Matrix {
  const float* data;
  int64_t rows, columns, row_step, column_step;
};

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// A tile of 6 rows and 2 vectors stays in registers while it runs down 256 steps of the inner dimension.
constexpr int64_t kTileRows = 6, kTileColumns = 2 * kLanes, kDepth = 256, kBlockRows = 96;

// Tiles of `matrix`, one after another, each step by step of the inner dimension; rows past the end are zero. Along the rows of
// the matrix, since a weight's columns lie 4 KB apart.
void pack(const Matrix& matrix, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, int64_t tile,
          float* packed) {
  for (int64_t start = 0; start < rows; start += tile, packed += tile * columns)
    for (int64_t row = 0; row < tile; ++row) {
      const float* from = matrix.data + (first_row + start + row) * matrix.row_step + first_column * matrix.column_step;
      bool inside = start + row < rows;
      for (int64_t column = 0; column < columns; ++column)
        packed[column * tile + row] = inside ? from[column * matrix.column_step] : 0;
    }
}

void multiply_tile(const float* left, const float* right, int64_t depth, float* out, int64_t step, int64_t rows,
                   int64_t columns) {
  Lanes sums[kTileRows][2] = {};
  for (int64_t inner = 0; inner < depth; ++inner, left += kTileRows, right += kTileColumns) {
    Lanes first = *reinterpret_cast<const Lanes*>(right), second = *reinterpret_cast<const Lanes*>(right + kLanes);
#pragma GCC unroll 6
    for (int64_t row = 0; row < kTileRows; ++row) {
      sums[row][0] += left[row] * first;
      sums[row][1] += left[row] * second;
    }
  }
  const float* flat = reinterpret_cast<const float*>(sums);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) out[row * step + column] += flat[row * kTileColumns + column];
}

// out += left @ right, out having rows one after another.
void multiply_add(const Matrix& left, const Matrix& right, float* out) {
  Matrix turned{right.data, right.columns, right.rows, right.column_step, right.row_step};
  int64_t tiles = (right.columns + kTileColumns - 1) / kTileColumns;
  Floats packed_right(static_cast<size_t>(tiles * kTileColumns * std::min(kDepth, right.rows)));
  for (int64_t inner = 0; inner < left.columns; inner += kDepth) {
    int64_t depth = std::min(kDepth, left.columns - inner);
    parallel(tiles, kTileColumns * depth, [&](int64_t begin, int64_t end) {
      int64_t columns = std::min(right.columns, end * kTileColumns) - begin * kTileColumns;
      pack(turned, begin * kTileColumns, columns, inner, depth, kTileColumns,
           packed_right.data() + begin * kTileColumns * depth);
    });
    int64_t blocks = (left.rows + kBlockRows - 1) / kBlockRows;
    // Parts go along the tiles of columns, or a product with few rows would keep one thread.
    parallel(tiles, left.rows * depth * kTileColumns, [&](int64_t begin, int64_t end) {
      Floats packed_left(static_cast<size_t>(kBlockRows * depth));
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t top = block * kBlockRows, rows = std::min(kBlockRows, left.rows - top);
        pack(left, top, rows, inner, depth, kTileRows, packed_left.data());
        for (int64_t tile = begin; tile < end; ++tile)
          for (int64_t row = 0; row < rows; row += kTileRows)
            multiply_tile(packed_left.data() + row * depth, packed_right.data() + tile * kTileColumns * depth, depth,
                          out + (top + row) * right.columns + tile * kTileColumns, right.columns,
                          std::min(kTileRows, rows - row), std::min(kTileColumns, right.columns - tile * kTileColumns));
      }
    });
  }
}

// --- tensors as float32 ---

// The elements in order, as float32: a view where they lie so, else a copy.
struct Values {
  Floats own;
  const float* data;

  Values(const Tensor& tensor, bool hf32 = false) {
    if (tensor.dtype == kFloat && tensor.contiguous() && !hf32) {
      data = reinterpret_cast<const float*>(tensor.data);
      return;
    }
    own.resize(size_t(tensor.count()));
    Out flat{tensor};
    flat.data = reinterpret_cast<char*>(own.data());
    flat.dtype = kFloat;
    for (int64_t axis = tensor.rank - 1, step = 1; axis >= 0; step *= tensor.size[axis--]) flat.stride[axis] = step;
    copy(flat, tensor);
    if (hf32)
      for (float& value : own) value = round_hf32(value);
    data = own.data();
  }
  // HF32 has 11 bits of mantissa where float32 has 23.
  static float round_hf32(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isfinite(value)) bits = (bits + 0x800) & ~0xfffu;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
  }
};

// Writes float32 values in order into a tensor of any type and layout.
void put(const Out& out, const float* values) {
  Tensor flat = out;
  flat.data = reinterpret_cast<char*>(const_cast<float*>(values));
  flat.dtype = kFloat;
  for (int64_t axis = out.rank - 1, step = 1; axis >= 0; step *= out.size[axis--]) flat.stride[axis] = step;
  copy(out, flat);
}

// A matrix of float32 or another type, in whatever layout: a weight is a transposed view, which needs no copy.
struct MatrixOf {
  std::unique_ptr<Values> values;
  Matrix matrix;

  MatrixOf(const Tensor& tensor, bool hf32) {
    if (tensor.rank != 2) throw std::runtime_error("a matrix has two dimensions");
    bool as_it_is = tensor.dtype == kFloat && !hf32;
    if (!as_it_is) values = std::make_unique<Values>(tensor, hf32);
    matrix = as_it_is ? Matrix{reinterpret_cast<const float*>(tensor.data), tensor.size[0], tensor.size[1], tensor.stride[0],
                               tensor.stride[1]}
                      : Matrix{values->data, tensor.size[0], tensor.size[1], tensor.size[1], 1};
  }
};

// cube_math_type: 0 keep, 1 allow what is faster, 2 float16, 3 HF32. CANN reads 1 as HF32 for float32.
bool asks_hf32(int8_t cube_math_type, const Tensor& tensor) {
  return tensor.dtype == kFloat && (cube_math_type == 1 || cube_math_type == 3);
}

// --- products ---

void product(const Tensor& left, const Tensor& right, const Out& out, bool hf32, float* sums) {
  MatrixOf first(left, hf32), second(right, hf32);
  multiply_add(first.matrix, second.matrix, sums);
  put(out, sums);
}

void mm(Tensor left, Tensor right, Out out, int8_t cube_math_type) {
  Floats sums(size_t(out.count()));
  product(left, right, out, asks_hf32(cube_math_type, left), sums.data());
}

void addmm(Tensor bias, Tensor left, Tensor right, Scalar beta, Scalar alpha, Out out, int8_t cube_math_type) {
  Floats sums(size_t(out.count()));
  MatrixOf first(left, asks_hf32(cube_math_type, left)), second(right, asks_hf32(cube_math_type, right));
  multiply_add(first.matrix, second.matrix, sums.data());
  Tensor wide = out;
  wide.data = bias.data, wide.dtype = bias.dtype;
  for (int axis = 1, own = bias.rank - 1; axis >= 0; --axis, --own)
    wide.stride[axis] = own < 0 || bias.size[own] == 1 ? 0 : bias.stride[own];
  Values biases(wide);
  for (size_t index = 0; index < sums.size(); ++index)
    sums[index] = float(alpha.real) * sums[index] + float(beta.real) * biases.data[index];
  put(out, sums.data());
}

// One matrix of a batch: the last two axes.
Tensor matrix_of_batch(const Tensor& tensor, int64_t number, const Tensor& shape) {
  Tensor matrix = tensor;
  matrix.rank = 2;
  std::copy(tensor.size + tensor.rank - 2, tensor.size + tensor.rank, matrix.size);
  std::copy(tensor.stride + tensor.rank - 2, tensor.stride + tensor.rank, matrix.stride);
  for (int axis = shape.rank - 3, own = tensor.rank - 3; axis >= 0; number /= shape.size[axis--], --own)
    if (own >= 0 && tensor.size[own] != 1)
      matrix.data += number % shape.size[axis] * tensor.stride[own] * int64_t(item_size(tensor.dtype));
  return matrix;
}

void batch_product(Tensor left, Tensor right, Out out, int8_t cube_math_type) {
  int64_t each = out.size[out.rank - 2] * out.size[out.rank - 1];
  for (int64_t number = 0; number < out.count() / std::max<int64_t>(each, 1); ++number)
    mm(matrix_of_batch(left, number, out), matrix_of_batch(right, number, out), Out{matrix_of_batch(out, number, out)},
       cube_math_type);
}

// Vectors count as matrices of one row or column.
void matmul(Tensor left, Tensor right, Out out, int8_t cube_math_type) {
  auto insert = [](Tensor& tensor, int axis) {
    for (int each = tensor.rank++; each > axis; --each)
      tensor.size[each] = tensor.size[each - 1], tensor.stride[each] = tensor.stride[each - 1];
    tensor.size[axis] = 1, tensor.stride[axis] = 1;
  };
  if (right.rank == 1) insert(right, 1), insert(out, out.rank);
  if (left.rank == 1) insert(left, 0), insert(out, out.rank - 1);
  batch_product(left, right, out, cube_math_type);
}
// Convolution of images as a product of patches: [batch, channels, height, width].
void convolution(Tensor input, Tensor weight, Tensor bias, Ints stride, Ints padding, Ints dilation, bool transposed, Ints,
                 int64_t groups, Out out, int8_t cube_math_type) {
  if (transposed || groups != 1 || input.rank != 4) throw std::runtime_error("this convolution is not there");
  bool hf32 = asks_hf32(cube_math_type, input);
  Values pixels(input, hf32), kernels(weight, hf32);
  int64_t channels = input.size[1], height = input.size[2], width = input.size[3];
  int64_t places = out.size[2] * out.size[3], depth = weight.count() / weight.size[0];
  Floats patches(size_t(depth * places)), result(size_t(out.count()));
  for (int64_t image = 0; image < input.size[0]; ++image) {
    const float* source = pixels.data + image * channels * height * width;
    float* patch = patches.data();
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t down = 0; down < weight.size[2]; ++down)
        for (int64_t across = 0; across < weight.size[3]; ++across)
          for (int64_t y = 0; y < out.size[2]; ++y)
            for (int64_t x = 0; x < out.size[3]; ++x) {
              int64_t row = y * stride[0] + down * dilation[0] - padding[0],
                      column = x * stride[1] + across * dilation[1] - padding[1];
              bool inside = 0 <= row && row < height && 0 <= column && column < width;
              *patch++ = inside ? source[(channel * height + row) * width + column] : 0;
            }
    multiply_add({kernels.data, weight.size[0], depth, depth, 1}, {patches.data(), depth, places, places, 1},
                 result.data() + image * weight.size[0] * places);
  }
  if (bias) {
    Values biases(bias);
    for (size_t index = 0; index < result.size(); ++index)
      result[index] += biases.data[int64_t(index) / places % weight.size[0]];
  }
  put(out, result.data());
}

// --- attention ---

// Where one layout keeps batch, head, token and channel, as strides of elements in order.
struct Layout {
  int64_t batch, heads, tokens, width, batch_step, head_step, token_step;

  Layout(const Tensor& tensor, const std::string& name, int64_t head_count) {
    bool tokens_first = name == "SBH", joined = name == "BSH" || tokens_first;
    heads = head_count;
    batch = tensor.size[tokens_first ? 1 : 0];
    width = joined ? tensor.size[2] / heads : tensor.size[3];
    if (name == "BNSD") {
      tokens = tensor.size[2];
      token_step = width, head_step = tokens * width, batch_step = heads * head_step;
    } else if (name == "BSND" || joined) {
      tokens = tensor.size[tokens_first ? 0 : 1];
      head_step = width;
      token_step = heads * width * (tokens_first ? batch : 1);
      batch_step = tokens_first ? heads * width : tokens * token_step;
    } else {
      throw std::runtime_error("the attention layout " + name + " is not there");
    }
  }
  int64_t start(int64_t number) const { return number / heads * batch_step + number % heads * head_step; }
};

void softmax_rows(float* scores, int64_t rows, int64_t columns, float* most, float* sums) {
  for (int64_t row = 0; row < rows; ++row, scores += columns) {
    float top = *std::max_element(scores, scores + columns);
    double sum = 0;
    for (int64_t column = 0; column < columns; ++column) sum += scores[column] = std::exp(scores[column] - top);
    for (int64_t column = 0; column < columns; ++column) scores[column] = float(scores[column] / sum);
    most[row] = top, sums[row] = float(sum);
  }
}

void fill_rows(const Out& out, const Floats& values) {  // the kernel repeats each row's number eight times
  if (!out || !out.count()) return;
  Floats wide;
  for (float value : values) wide.insert(wide.end(), size_t(out.size[out.rank - 1]), value);
  put(out, wide.data());
}

void flash_attention(Tensor query, Tensor key, Tensor value, Tensor, Tensor, Tensor, Tensor mask, Ints, double scale,
                     double keep, int64_t, int64_t, int64_t heads, std::string layout, int64_t, int64_t sparse_mode, Out most,
                     Out sums, Out, Out out) {
  if (keep != 1 || mask || sparse_mode) throw std::runtime_error("attention with a mask or dropout is not there");
  Layout queries(query, layout, heads), keys(key, layout, heads), values(value, layout, heads);
  Values q(query), k(key), v(value);
  Floats result(size_t(out.count())), largest(size_t(queries.batch * heads * queries.tokens)), totals(largest.size());
  parallel(queries.batch * heads, 4 * queries.tokens * keys.tokens * queries.width, [&](int64_t begin, int64_t end) {
    Floats scores(size_t(queries.tokens * keys.tokens)), part(size_t(queries.tokens * values.width));
    for (int64_t number = begin; number < end; ++number) {
      std::fill(scores.begin(), scores.end(), 0.f);
      std::fill(part.begin(), part.end(), 0.f);
      multiply_add({q.data + queries.start(number), queries.tokens, queries.width, queries.token_step, 1},
                   {k.data + keys.start(number), keys.width, keys.tokens, 1, keys.token_step}, scores.data());
      for (float& score : scores) score *= float(scale);
      softmax_rows(scores.data(), queries.tokens, keys.tokens, &largest[size_t(number * queries.tokens)],
                   &totals[size_t(number * queries.tokens)]);
      multiply_add({scores.data(), queries.tokens, keys.tokens, keys.tokens, 1},
                   {v.data + values.start(number), values.tokens, values.width, values.token_step, 1}, part.data());
      for (int64_t token = 0; token < queries.tokens; ++token)
        std::copy_n(&part[size_t(token * values.width)], values.width,
                    &result[size_t(queries.start(number) + token * queries.token_step)]);
    }
  });
  put(out, result.data());
  fill_rows(most, largest);
  fill_rows(sums, totals);
}

// --- layer norm ---

void layer_norm(Tensor input, Ints shape, Tensor weight, Tensor bias, double epsilon, Out out, Out mean, Out spread) {
  int64_t width = 1;
  for (int64_t size : shape) width *= size;
  int64_t rows = input.count() / width;
  Values x(input), w(weight), b(bias);
  Floats result(size_t(input.count())), means(static_cast<size_t>(rows)), spreads(static_cast<size_t>(rows));
  parallel(rows, width * 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = x.data + row * width;
      double sum = 0, squares = 0;
      for (int64_t index = 0; index < width; ++index) sum += from[index];
      double middle = sum / double(width);
      for (int64_t index = 0; index < width; ++index) squares += (from[index] - middle) * (from[index] - middle);
      double inverse = 1 / std::sqrt(squares / double(width) + epsilon);
      for (int64_t index = 0; index < width; ++index)
        result[size_t(row * width + index)] =
            float((from[index] - middle) * inverse * (weight ? w.data[index] : 1) + (bias ? b.data[index] : 0));
      means[size_t(row)] = float(middle), spreads[size_t(row)] = float(inverse);
    }
  });
  put(out, result.data());
  if (mean && mean.count()) put(mean, means.data());
  if (spread && spread.count()) put(spread, spreads.data());
}

void add_layer_norm(Tensor first, Tensor second, Tensor gamma, Tensor beta, Tensor bias, double epsilon, bool keeps_sum,
                    Out out, Out mean, Out spread, Out sum) {
  Values x(first), y(second), extra(bias);
  Floats added(size_t(first.count()));
  int64_t width = gamma.count();
  for (size_t index = 0; index < added.size(); ++index)
    added[index] = x.data[index] + y.data[index] +
                   (bias ? extra.data[bias.count() == width ? int64_t(index) % width : int64_t(index)] : 0);
  Tensor total = first;
  total.data = reinterpret_cast<char*>(added.data()), total.dtype = kFloat;
  for (int64_t axis = total.rank - 1, step = 1; axis >= 0; step *= total.size[axis--]) total.stride[axis] = step;
  if (keeps_sum) put(sum, added.data());
  layer_norm(total, {width}, gamma, beta, epsilon, out, mean, spread);
}

// --- the MLP in one ---

float activated(const std::string& name, float value) {
  double x = value;
  if (name == "gelu" || name == "fastgelu")
    return float(0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))));
  if (name == "relu") return std::max(value, 0.f);
  if (name == "silu") return float(x / (1 + std::exp(-x)));
  throw std::runtime_error("the activation " + name + " is not there");
}

// Without experts and quantisation: weights are [inner, outer]. The hidden values are rounded to the inputs' type in between.
void ffn(Tensor x, Tensor weight1, Tensor weight2, Ints experts, Tensor bias1, Tensor bias2, Tensor, Tensor, Tensor, Tensor,
         Tensor, Tensor, Tensor, Tensor, std::string activation, int64_t, bool, Out out) {
  if (!experts.empty() || weight1.rank != 2) throw std::runtime_error("an MLP with experts is not there");
  int64_t rows = x.count() / weight1.size[0], inner = weight1.size[1];
  auto linear = [rows](const float* left, const Tensor& weight, const Tensor& bias) {
    Floats sums(size_t(rows * weight.size[1]));
    multiply_add({left, rows, weight.size[0], weight.size[0], 1}, MatrixOf(weight, false).matrix, sums.data());
    Values biases(bias);
    if (bias)
      for (size_t index = 0; index < sums.size(); ++index) sums[index] += biases.data[int64_t(index) % weight.size[1]];
    return sums;
  };
  Floats hidden = linear(Values(x).data, weight1, bias1);
  std::string name = activation.substr(0, activation.find_first_not_of("abcdefghijklmnopqrstuvwxyz"));
  parallel(rows, inner * 100, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin * inner; index < end * inner; ++index)
      hidden[size_t(index)] = activated(name, hidden[size_t(index)]);
  });
  std::vector<char> narrow(hidden.size() * item_size(x.dtype));
  Out between{x};
  between.data = narrow.data(), between.rank = 1, between.size[0] = int64_t(hidden.size()), between.stride[0] = 1;
  put(between, hidden.data());
  put(out, linear(Values(between).data, weight2, bias2).data());
}

}  // namespace

OPERATOR(Mm, mm)
OPERATOR(Addmm, addmm)
OPERATOR(BatchMatMul, batch_product)
OPERATOR(Matmul, matmul)
OPERATOR(Convolution, convolution)
OPERATOR(FlashAttentionScore, flash_attention)
OPERATOR(LayerNorm, layer_norm)
OPERATOR(FastLayerNorm, layer_norm)
OPERATOR(AddLayerNorm, add_layer_norm)
OPERATOR(FFNV2, ffn)

}  // namespace standin
