// The operators that go element by element: arithmetic, comparisons, copies, reductions, indices, random numbers.
//
// Values are computed as double and rounded once to the output's type: float32 results are those of exact arithmetic, and the
// half types are rounded as a kernel that computes in float32 would.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>

#include "standin.h"

namespace standin {

// --- tensors ---

int64_t Tensor::count() const { return std::accumulate(size, size + rank, int64_t{1}, std::multiplies<>()); }

bool Tensor::contiguous() const {
  int64_t expected = 1;
  for (int axis = rank - 1; axis >= 0; expected *= size[axis--])
    if (size[axis] != 1 && stride[axis] != expected) return false;
  return true;
}

size_t item_size(int dtype) {
  switch (dtype) {
    case kInt8:
    case kUint8:
    case kBool: return 1;
    case kHalf:
    case kBfloat16:
    case kInt16:
    case kUint16: return 2;
    case kInt64:
    case kUint64:
    case kDouble: return 8;
    default: return 4;
  }
}

bool is_floating(int dtype) { return dtype == kFloat || dtype == kHalf || dtype == kBfloat16 || dtype == kDouble; }

namespace {

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Bfloat16 {
  uint16_t bits;
  operator double() const { return bits_to_float(uint32_t{bits} << 16); }
  static Bfloat16 from(double wide) {
    float value = float(wide);
    uint32_t all;
    std::memcpy(&all, &value, sizeof all);
    if (std::isnan(value)) return {0x7fc0};
    return {uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16)};
  }
};

template <typename Value>
Value convert(double value) {
  if constexpr (std::is_same_v<Value, Bfloat16>)
    return Bfloat16::from(value);
  else if constexpr (std::is_same_v<Value, bool>)
    return value != 0;
  else if constexpr (std::is_same_v<Value, _Float16>)
    return _Float16(float(value));
  else
    return Value(value);
}

// Calls visit with a value of the C++ type that stands for a dtype.
template <typename Visit>
auto by_type(int dtype, Visit visit) {
  switch (dtype) {
    case kFloat: return visit(float{});
    case kHalf: return visit(_Float16{});
    case kBfloat16: return visit(Bfloat16{});
    case kDouble: return visit(double{});
    case kInt8: return visit(int8_t{});
    case kUint8: return visit(uint8_t{});
    case kInt16: return visit(int16_t{});
    case kInt32: return visit(int32_t{});
    case kInt64: return visit(int64_t{});
    case kBool: return visit(bool{});
    default: throw std::runtime_error("dtype " + std::to_string(dtype) + " is not there");
  }
}

[[gnu::noinline]] void read(const Tensor& from, int64_t element, int64_t stride, int64_t count, double* values) {
  by_type(from.dtype, [&](auto type) {
    auto* data = reinterpret_cast<const decltype(type)*>(from.data) + element;
    for (int64_t index = 0; index < count; ++index) values[index] = double(data[index * stride]);
  });
}

[[gnu::noinline]] void write(const Tensor& to, int64_t element, int64_t stride, int64_t count, const double* values) {
  by_type(to.dtype, [&](auto type) {
    using Value = decltype(type);
    auto* data = reinterpret_cast<Value*>(to.data) + element;
    for (int64_t index = 0; index < count; ++index) data[index * stride] = convert<Value>(values[index]);
  });
}

}  // namespace

double load(const Tensor& tensor, int64_t element) {
  double value;
  read(tensor, element, 1, 1, &value);
  return value;
}
void store(const Tensor& tensor, int64_t element, double value) { write(tensor, element, 1, 1, &value); }

void parallel(int64_t count, int64_t cost, const std::function<void(int64_t, int64_t)>& range) {
  static const int64_t threads = [] {
    const char* text = std::getenv("STANDIN_THREADS");
    return text ? std::max<int64_t>(1, std::atoi(text)) : std::min<int64_t>(2, std::thread::hardware_concurrency());
  }();
  thread_local bool inside = false;  // a part does not split itself again
  int64_t parts = inside ? 1 : std::min(count, std::min(threads, 1 + count * cost / 1'000'000));
  if (parts <= 1) return range(0, count);
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part)
    others.emplace_back([&, part] {
      inside = true;
      range(count * part / parts, count * (part + 1) / parts);
    });
  inside = true;
  range(0, count / parts);
  inside = false;
  for (std::thread& other : others) other.join();
}

namespace {

// --- walking over several tensors at once ---

// The strides of `tensor` seen as having the shape of `target`, as broadcasting has it.
Tensor broadcast(const Tensor& tensor, const Tensor& target) {
  Tensor result = target;
  result.data = tensor.data;
  result.dtype = tensor.dtype;
  for (int axis = target.rank - 1, own = tensor.rank - 1; axis >= 0; --axis, --own)
    result.stride[axis] = own < 0 || tensor.size[own] == 1 ? 0 : tensor.stride[own];
  return result;
}

constexpr int kMost = 4;  // tensors that are walked over together
using Group = std::vector<Tensor>;
using Places = std::array<int64_t, kMost>;

// Merges neighbouring axes wherever all of the tensors, which have one shape, allow it: the rows get long.
void merge_axes(Group& tensors) {
  int rank = tensors[0].rank, kept = 0;
  for (int axis = 1; axis < rank; ++axis) {
    bool merges = true;
    for (const Tensor& tensor : tensors) merges &= tensor.stride[kept] == tensor.stride[axis] * tensor.size[axis];
    if (!merges) ++kept;
    for (Tensor& tensor : tensors) {
      tensor.size[kept] = merges ? tensor.size[kept] * tensor.size[axis] : tensor.size[axis];
      tensor.stride[kept] = tensor.stride[axis];
    }
  }
  for (Tensor& tensor : tensors) {
    if (rank == 0) tensor.size[0] = 1, tensor.stride[0] = 0;
    tensor.rank = kept + 1;
  }
}

// The element of that number in order, as an offset.
int64_t place(const Tensor& tensor, int64_t number) {
  int64_t element = 0;
  for (int axis = tensor.rank - 1; axis >= 0; number /= tensor.size[axis--])
    element += number % tensor.size[axis] * tensor.stride[axis];
  return element;
}

// The element at which row number `row` begins: a row is the last axis.
int64_t row_start(Tensor tensor, int64_t row) {
  --tensor.rank;
  return place(tensor, row);
}

constexpr int64_t kStretch = 256;

// Calls visit(starts, strides, count) for stretches of at most kStretch elements of all tensors together.
void walk(Group tensors, int64_t cost, const std::function<void(const Places&, const Places&, int64_t)>& visit) {
  if (tensors[0].count() == 0) return;
  merge_axes(tensors);
  int last = tensors[0].rank - 1;
  int64_t row = tensors[0].size[last], stretches = (row + kStretch - 1) / kStretch;
  parallel(tensors[0].count() / row * stretches, std::min(row, kStretch) * cost, [&](int64_t begin, int64_t end) {
    Places starts, strides;
    for (int64_t index = begin; index < end; ++index) {
      int64_t first = index % stretches * kStretch;
      for (size_t each = 0; each < tensors.size(); ++each) {
        strides[each] = tensors[each].stride[last];
        starts[each] = row_start(tensors[each], index / stretches) + first * strides[each];
      }
      visit(starts, strides, std::min(kStretch, row - first));
    }
  });
}

// out = function(inputs...), with broadcasting.
template <typename Function, typename... Inputs>
void pointwise_at_cost(int64_t cost, const Out& out, Function function, const Inputs&... inputs) {
  constexpr size_t number = sizeof...(inputs);
  Group all{Tensor(out), broadcast(inputs, out)...};
  walk(all, cost, [&](const Places& starts, const Places& strides, int64_t count) {
    double values[number + 1][kStretch];
    for (size_t each = 1; each <= number; ++each) read(all[each], starts[each], strides[each], count, values[each]);
    for (int64_t index = 0; index < count; ++index) {
      if constexpr (number == 0)
        values[0][index] = function();
      else if constexpr (number == 1)
        values[0][index] = function(values[1][index]);
      else if constexpr (number == 2)
        values[0][index] = function(values[1][index], values[2][index]);
      else
        values[0][index] = function(values[1][index], values[2][index], values[3][index]);
    }
    write(out, starts[0], strides[0], count, values[0]);
  });
}
template <typename Function, typename... Inputs>
void pointwise(const Out& out, Function function, const Inputs&... inputs) {
  pointwise_at_cost(4, out, function, inputs...);
}

}  // namespace

// --- copies ---

// Bit for bit between equal types.
void copy(Out to, Tensor from) {
  if (to.dtype != from.dtype) return pointwise(to, [](double value) { return value; }, from);
  size_t bytes = item_size(to.dtype);
  walk({to, broadcast(from, to)}, 1, [&](const Places& starts, const Places& strides, int64_t count) {
    char *target = to.data + starts[0] * int64_t(bytes), *source = from.data + starts[1] * int64_t(bytes);
    if (strides[0] == 1 && strides[1] == 1) return void(std::memmove(target, source, size_t(count) * bytes));
    for (int64_t index = 0; index < count; ++index)
      std::memcpy(target + index * strides[0] * int64_t(bytes), source + index * strides[1] * int64_t(bytes), bytes);
  });
}

namespace {

void cast(Tensor from, int, Out to) { copy(to, from); }

Out narrow(const Tensor& tensor, int64_t axis, int64_t start, int64_t length) {
  Out part{tensor};
  part.data += start * tensor.stride[axis] * int64_t(item_size(tensor.dtype));
  part.size[axis] = length;
  return part;
}

int64_t positive(int64_t axis, int64_t rank) { return axis < 0 ? axis + rank : axis; }

void concatenate(Tensors parts, int64_t axis, Out out) {
  axis = positive(axis, out.rank);
  int64_t start = 0;
  for (const Tensor& part : parts) {
    if (part.rank != out.rank) continue;  // torch lets an empty vector pass
    copy(narrow(out, axis, start, part.size[axis]), part);
    start += part.size[axis];
  }
}

void stack(Tensors parts, int64_t axis, Out out) {
  axis = positive(axis, out.rank);
  for (size_t index = 0; index < parts.size(); ++index) {
    Tensor part = parts[index];
    for (int each = part.rank++; each > axis; --each)
      part.size[each] = part.size[each - 1], part.stride[each] = part.stride[each - 1];
    part.size[axis] = 1;
    copy(narrow(out, axis, int64_t(index), 1), part);
  }
}

void repeat(Tensor from, Ints repeats, Out out) {  // each axis of the result is [repeats, size]
  Tensor target = out, source = out;
  source.data = from.data;
  source.dtype = from.dtype;
  target.rank = source.rank = 0;
  for (int axis = 0; axis < out.rank; ++axis) {
    int own = axis - (out.rank - from.rank);
    int64_t size = own < 0 ? 1 : from.size[own];
    for (bool inner : {false, true}) {
      target.size[target.rank] = inner ? size : repeats[size_t(axis)];
      target.stride[target.rank++] = out.stride[axis] * (inner ? 1 : size);
      source.stride[source.rank++] = inner && own >= 0 ? from.stride[own] : 0;
    }
  }
  std::copy(target.size, target.size + target.rank, source.size);
  copy(Out{target}, source);
}

// --- arithmetic ---

// Each operator comes as tensor with tensor or number, and in place: the function says what it computes.
template <typename Function>
struct Binary {
  static void tensors(Tensor left, Tensor right, Out out) { pointwise(out, Function(), left, right); }
  static void number(Tensor left, Scalar right, Out out) {
    pointwise(out, [&](double value) { return Function()(value, right.real); }, left);
  }
  static void number_first(Scalar left, Tensor right, Out out) {
    pointwise(out, [&](double value) { return Function()(left.real, value); }, right);
  }
  static void in_place(Out left, Tensor right) { tensors(left, right, left); }
  static void number_in_place(Out left, Scalar right) { number(left, right, left); }
};
// With a factor for the second: addition and subtraction.
template <int sign>
struct Sum {
  static void tensors(Tensor left, Tensor right, Scalar factor, Out out) {
    pointwise(out, [by = sign * factor.real](double a, double b) { return a + by * b; }, left, right);
  }
  static void number(Tensor left, Scalar right, Scalar factor, Out out) {
    pointwise(out, [add = sign * factor.real * right.real](double a) { return a + add; }, left);
  }
  static void in_place(Out left, Tensor right, Scalar factor) { tensors(left, right, factor, left); }
  static void number_in_place(Out left, Scalar right, Scalar factor) { number(left, right, factor, left); }
};

double rounded(double value, int mode) { return mode == 1 ? std::trunc(value) : mode == 2 ? std::floor(value) : value; }
void divide_rounding(Tensor left, Tensor right, int mode, Out out) {
  pointwise(out, [mode](double a, double b) { return rounded(a / b, mode); }, left, right);
}
void divide_number_rounding(Tensor left, Scalar right, int mode, Out out) {
  pointwise(out, [&](double a) { return rounded(a / right.real, mode); }, left);
}

#define STRUCT(NAME, ...)                                                                                     \
  struct NAME {                                                                                               \
    double operator()([[maybe_unused]] double a, [[maybe_unused]] double b = 0) const { return __VA_ARGS__; } \
  };
STRUCT(Times, a* b)
STRUCT(Over, a / b)
STRUCT(Quotient, std::floor(a / b))
STRUCT(BitAnd, double(int64_t(a) & int64_t(b)))
STRUCT(BitOr, double(int64_t(a) | int64_t(b)))
STRUCT(Power, std::pow(a, b))
STRUCT(Larger, std::isnan(a) ? a : std::isnan(b) ? b : std::max(a, b))
STRUCT(Smaller, std::isnan(a) ? a : std::isnan(b) ? b : std::min(a, b))
STRUCT(Equal, a == b)
STRUCT(Unequal, a != b)
STRUCT(Less, a < b)
STRUCT(AtMost, a <= b)
STRUCT(Greater, a > b)
STRUCT(AtLeast, a >= b)
STRUCT(And, a != 0 && b != 0)
STRUCT(Or, a != 0 || b != 0)

template <typename Function>
struct Unary {
  static void out(Tensor from, Out to) { pointwise(to, Function(), from); }
  static void in_place(Out tensor) { pointwise(tensor, Function(), tensor); }
};
STRUCT(Negative, -a)
STRUCT(Absolute, std::abs(a))
STRUCT(Root, std::sqrt(a))
STRUCT(InverseRoot, 1 / std::sqrt(a))
STRUCT(Inverse, 1 / a)
STRUCT(Exponential, std::exp(a))
STRUCT(Logarithm, std::log(a))
STRUCT(Tangent, std::tanh(a))
STRUCT(Logistic, 1 / (1 + std::exp(-a)))
STRUCT(ErrorFunction, std::erf(a))
STRUCT(Sine, std::sin(a))
STRUCT(Cosine, std::cos(a))
STRUCT(Down, std::floor(a))
STRUCT(Up, std::ceil(a))
STRUCT(Nearest, std::nearbyint(a))
STRUCT(Not, a == 0)
STRUCT(Finite, std::isfinite(a))
STRUCT(Positive, std::max(a, 0.0))
STRUCT(Signum, a > 0 ? 1 : a < 0 ? -1 : a)

void clamp(Tensor from, Scalar low, Scalar high, Out out) {
  pointwise(
      out,
      [&](double value) {
        if (low.dtype >= 0) value = value < low.real ? low.real : value;
        return high.dtype >= 0 && value > high.real ? high.real : value;
      },
      from);
}
void choose(Tensor condition, Tensor yes, Tensor no, Out out) {
  pointwise(out, [](double c, double a, double b) { return c != 0 ? a : b; }, condition, yes, no);
}
void fill_where(Out out, Tensor mask, Scalar value) {
  pointwise(out, [&](double m, double old) { return m != 0 ? value.real : old; }, mask, out);
}
// CANN's own formula, whatever torch asks for: the tanh one.
double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
double gelu_erf(double x) { return 0.5 * x * std::erfc(x * -0.7071067811865476); }
void gelu(Tensor x, Out y) { pointwise_at_cost(100, y, gelu_tanh, x); }
void gelu_v2(Tensor x, int64_t approximate, Out y) { pointwise_at_cost(100, y, approximate ? gelu_tanh : gelu_erf, x); }

// --- filling ---

void fill(Out out, Scalar value) {
  pointwise(out, [&] { return value.real; });
}
void fill_with(Out out, Tensor value) { copy(out, value); }
void zero(Out out) {
  pointwise(out, [] { return 0.0; });
}
void one(Out out) {
  pointwise(out, [] { return 1.0; });
}

void sequence(Out out, const std::function<double(int64_t)>& value) {
  for (int64_t index = 0; index < out.count(); ++index) store(out, index * out.stride[0], value(index));
}
void arange(Scalar start, Scalar, Scalar step, Out out) {
  sequence(out, [&](int64_t index) { return start.real + double(index) * step.real; });
}
// Random numbers that the seed decides; not those of CANN.
template <typename Distribution>
void random(const Out& out, Distribution distribution, int64_t seed, int64_t offset) {
  std::mt19937_64 generator(uint64_t(seed) * 6364136223846793005u + uint64_t(offset));
  std::vector<double> values(size_t(out.count()));
  for (double& value : values) value = distribution(generator);
  Tensor flat = out;
  flat.dtype = kDouble;
  flat.data = reinterpret_cast<char*>(values.data());
  for (int64_t axis = out.rank - 1, step = 1; axis >= 0; step *= out.size[axis--]) flat.stride[axis] = step;
  copy(out, flat);
}
void normal(Out out, float mean, float spread, int64_t seed, int64_t offset) {
  random(out, std::normal_distribution<double>(mean, spread), seed, offset);
}
void uniform(Out out, double from, double to, int64_t seed, int64_t offset) {
  random(out, std::uniform_real_distribution<double>(from, to), seed, offset);
}

// --- reductions ---

// out[kept axes] = function(values of the reduced axes). The values come in order, as double.
void reduce(const Tensor& from, const Ints& axes, const Out& out,
            const std::function<double(const double*, int64_t)>& function) {
  bool reduced[kMaxRank] = {};
  for (int64_t axis : axes) reduced[positive(axis, from.rank)] = true;
  if (axes.empty()) std::fill(reduced, reduced + from.rank, true);
  Tensor outer = from, inner = from;
  outer.rank = inner.rank = 0;
  for (int axis = 0; axis < from.rank; ++axis) {
    Tensor& side = reduced[axis] ? inner : outer;
    side.size[side.rank] = from.size[axis];
    side.stride[side.rank++] = from.stride[axis];
  }
  int64_t each = inner.count();
  Group rows{inner};
  merge_axes(rows);
  int64_t row = rows[0].size[rows[0].rank - 1], step = rows[0].stride[rows[0].rank - 1];
  parallel(outer.count(), each * 4, [&](int64_t begin, int64_t end) {
    std::vector<double> values(static_cast<size_t>(each));
    for (int64_t index = begin; index < end; ++index) {
      int64_t start = place(outer, index);
      for (int64_t done = 0; done < each; done += row)
        read(from, start + row_start(rows[0], done / row), step, row, values.data() + done);
      store(out, place(out, index), function(values.data(), each));  // an axis kept with size 1 changes no order
    }
  });
}

double total(const double* values, int64_t count) { return std::accumulate(values, values + count, 0.0); }
double largest(const double* values, int64_t count) { return std::accumulate(values, values + count, values[0], Larger()); }
double smallest(const double* values, int64_t count) { return std::accumulate(values, values + count, values[0], Smaller()); }
bool set(double value) { return value != 0; }

void sum(Tensor from, Ints axes, bool, int, Out out) { reduce(from, axes, out, total); }
void mean(Tensor from, Ints axes, bool, int, Out out) {
  reduce(from, axes, out, [](const double* values, int64_t count) { return total(values, count) / double(count); });
}
void all(Tensor from, Ints axes, bool, Out out) {
  reduce(from, axes, out, [](const double* values, int64_t count) { return double(std::all_of(values, values + count, set)); });
}
void any(Tensor from, Ints axes, bool, Out out) {
  reduce(from, axes, out, [](const double* values, int64_t count) { return double(std::any_of(values, values + count, set)); });
}
void maximum_of_all(Tensor from, Out out) { reduce(from, {}, out, largest); }
void minimum_of_all(Tensor from, Out out) { reduce(from, {}, out, smallest); }
void amax(Tensor from, Ints axes, bool, Out out) { reduce(from, axes, out, largest); }
void amin(Tensor from, Ints axes, bool, Out out) { reduce(from, axes, out, smallest); }

double norm_of(const double* values, int64_t count, double order) {
  double sum = 0, most = 0;
  for (int64_t index = 0; index < count; ++index) {
    double size = std::abs(values[index]);
    most = Larger()(most, size);
    sum += order == 2 ? size * size : order == 1 ? size : std::pow(size, order);
  }
  return std::isinf(order) ? most : order == 2 ? std::sqrt(sum) : std::pow(sum, 1 / order);
}
void vector_norm(Tensor from, Scalar order, Ints axes, bool, int, Out out) {
  reduce(from, axes, out, [&](const double* values, int64_t count) { return norm_of(values, count, order.real); });
}
void norm(Tensor from, Scalar order, Ints axes, bool keep, Out out) { vector_norm(from, order, axes, keep, 0, out); }

double variance(const double* values, int64_t count, int64_t correction) {
  double middle = total(values, count) / double(count), sum = 0;
  for (int64_t index = 0; index < count; ++index) sum += (values[index] - middle) * (values[index] - middle);
  return sum / double(count - correction);
}
void deviation(Tensor from, Ints axes, int64_t correction, bool, Out out) {
  reduce(from, axes, out, [=](const double* values, int64_t count) { return std::sqrt(variance(values, count, correction)); });
}
void variance_of(Tensor from, Ints axes, int64_t correction, bool, Out out) {
  reduce(from, axes, out, [=](const double* values, int64_t count) { return variance(values, count, correction); });
}

template <typename Better>
double position(const double* values, int64_t count) {
  int64_t best = 0;
  for (int64_t index = 1; index < count; ++index)
    if (Better()(values[index], values[best]) != 0) best = index;
  return double(best);
}
template <typename Better>
void position_of(Tensor from, int64_t axis, bool, Out out) {
  reduce(from, {axis}, out, position<Better>);
}
void same(Tensor left, Tensor right, Out out) {
  bool equal = left.rank == right.rank && std::equal(left.size, left.size + left.rank, right.size);
  std::vector<char> cells(size_t(equal ? left.count() : 0));
  if (equal) {
    Out each{left};
    each.data = cells.data();
    each.dtype = kBool;
    for (int64_t axis = left.rank - 1, step = 1; axis >= 0; step *= left.size[axis--]) each.stride[axis] = step;
    pointwise(each, Equal(), left, right);
  }
  store(out, 0, equal && std::all_of(cells.begin(), cells.end(), [](char cell) { return cell; }));
}

// Along one axis: calls visit(where the column starts in each tensor).
void columns(const Tensor& shape, int64_t axis, std::initializer_list<const Tensor*> tensors,
             const std::function<void(const std::vector<int64_t>&)>& visit) {
  Tensor rest = shape;
  rest.size[axis] = 1;
  std::vector<int64_t> starts(tensors.size());
  for (int64_t column = 0; column < rest.count(); ++column) {
    size_t each = 0;
    for (const Tensor* tensor : tensors) {
      std::copy(tensor->stride, tensor->stride + shape.rank, rest.stride);
      starts[each++] = place(rest, column);
    }
    visit(starts);
  }
}

void softmax(Tensor from, int64_t axis, Out out) {
  axis = positive(axis, from.rank);
  std::vector<double> values(size_t(from.size[axis]));
  columns(from, axis, {&from, &out}, [&](const std::vector<int64_t>& starts) {
    int64_t count = from.size[axis];
    read(from, starts[0], from.stride[axis], count, values.data());
    double most = largest(values.data(), count);
    for (double& value : values) value = std::exp(value - most);
    double all_of_it = total(values.data(), count);
    for (double& value : values) value /= all_of_it;
    write(out, starts[1], out.stride[axis], count, values.data());
  });
}

// --- indices ---

void index_select(Tensor from, int64_t axis, Tensor index, Out out) {
  axis = positive(axis, from.rank);
  for (int64_t place = 0; place < index.count(); ++place) {
    int64_t chosen = int64_t(load(index, place * (index.rank ? index.stride[0] : 0)));
    copy(narrow(out, axis, place, 1), narrow(from, axis, positive(chosen, from.size[axis]), 1));
  }
}
// out = from[index, ...]: tensors of integers for the first axes.
void index_first(Tensor from, Tensors indices, Out out) {
  int64_t number = 1;
  for (const Tensor& index : indices) number = std::max(number, index.count());
  Tensor shape = indices[0];
  for (const Tensor& index : indices)
    if (index.count() == number) shape = index;
  Tensor rest = from, target = out;
  int used = int(indices.size());
  rest.rank = target.rank = from.rank - used;
  for (int axis = 0; axis < rest.rank; ++axis) {
    rest.size[axis] = target.size[axis] = from.size[axis + used];
    rest.stride[axis] = from.stride[axis + used];
    target.stride[axis] = out.stride[out.rank - rest.rank + axis];
  }
  int64_t bytes = int64_t(item_size(from.dtype));
  Tensor places = shape;  // where the results of the indices lie in `out`: its first axes
  std::copy(out.stride, out.stride + shape.rank, places.stride);
  for (int64_t each = 0; each < number; ++each) {
    Tensor source = rest, sink = target;
    for (int axis = 0; axis < used; ++axis) {
      Tensor index = broadcast(indices[size_t(axis)], shape);
      source.data += positive(int64_t(load(index, place(index, each))), from.size[axis]) * from.stride[axis] * bytes;
    }
    sink.data += place(places, each) * bytes;
    copy(Out{sink}, source);
  }
}

}  // namespace

// --- what CANN calls them ---

OPERATOR(InplaceCopy, copy)
OPERATOR(Cast, cast)
OPERATOR(Cat, concatenate)
OPERATOR(Stack, stack)
OPERATOR(Repeat, repeat)

#define SUM(NAME, SIGN)                          \
  OPERATOR(NAME, (Sum<SIGN>::tensors))           \
  OPERATOR(NAME##s, (Sum<SIGN>::number))         \
  OPERATOR(Inplace##NAME, (Sum<SIGN>::in_place)) \
  OPERATOR(Inplace##NAME##s, (Sum<SIGN>::number_in_place))
SUM(Add, 1)
SUM(Sub, -1)

#define PRODUCT(NAME, STRUCT)                       \
  OPERATOR(NAME, Binary<STRUCT>::tensors)           \
  OPERATOR(NAME##s, Binary<STRUCT>::number)         \
  OPERATOR(Inplace##NAME, Binary<STRUCT>::in_place) \
  OPERATOR(Inplace##NAME##s, Binary<STRUCT>::number_in_place)
PRODUCT(Mul, Times)
PRODUCT(Div, Over)
OPERATOR(DivMod, divide_rounding)
OPERATOR(FloorDivide, Binary<Quotient>::tensors)
OPERATOR(FloorDivides, Binary<Quotient>::number)
OPERATOR(BitwiseAndTensor, Binary<BitAnd>::tensors)
OPERATOR(BitwiseOrTensor, Binary<BitOr>::tensors)
OPERATOR(DivMods, divide_number_rounding)
OPERATOR(PowTensorScalar, Binary<Power>::number)
OPERATOR(PowTensorTensor, Binary<Power>::tensors)
OPERATOR(PowScalarTensor, Binary<Power>::number_first)
OPERATOR(InplacePowTensorScalar, Binary<Power>::number_in_place)
OPERATOR(Maximum, Binary<Larger>::tensors)
OPERATOR(Minimum, Binary<Smaller>::tensors)
OPERATOR(LogicalAnd, Binary<And>::tensors)
OPERATOR(LogicalOr, Binary<Or>::tensors)

#define COMPARISON(NAME, STRUCT)                  \
  OPERATOR(NAME##Tensor, Binary<STRUCT>::tensors) \
  OPERATOR(NAME##Scalar, Binary<STRUCT>::number)
COMPARISON(Eq, Equal)
COMPARISON(Ne, Unequal)
COMPARISON(Lt, Less)
COMPARISON(Le, AtMost)
COMPARISON(Gt, Greater)
COMPARISON(Ge, AtLeast)

#define FUNCTION(NAME, STRUCT)       \
  OPERATOR(NAME, Unary<STRUCT>::out) \
  OPERATOR(Inplace##NAME, Unary<STRUCT>::in_place)
FUNCTION(Neg, Negative)
FUNCTION(Sqrt, Root)
FUNCTION(Rsqrt, InverseRoot)
FUNCTION(Reciprocal, Inverse)
FUNCTION(Exp, Exponential)
FUNCTION(Log, Logarithm)
FUNCTION(Tanh, Tangent)
FUNCTION(Sigmoid, Logistic)
FUNCTION(Erf, ErrorFunction)
FUNCTION(Sin, Sine)
FUNCTION(Cos, Cosine)
FUNCTION(Floor, Down)
FUNCTION(Ceil, Up)
FUNCTION(Round, Nearest)
FUNCTION(LogicalNot, Not)
FUNCTION(Relu, Positive)
OPERATOR(Abs, Unary<Absolute>::out)
OPERATOR(Sign, Unary<Signum>::out)
OPERATOR(IsFinite, Unary<Finite>::out)

OPERATOR(Clamp, clamp)
OPERATOR(SWhere, choose)
OPERATOR(InplaceMaskedFillScalar, fill_where)
OPERATOR(Gelu, gelu)
OPERATOR(GeluV2, gelu_v2)

OPERATOR(InplaceZero, zero)
OPERATOR(InplaceOne, one)
OPERATOR(InplaceFillScalar, fill)
OPERATOR(InplaceFillTensor, fill_with)
OPERATOR(Arange, arange)
OPERATOR(InplaceNormal, normal)
OPERATOR(InplaceUniform, uniform)

OPERATOR(ReduceSum, sum)
OPERATOR(Mean, mean)
OPERATOR(All, all)
OPERATOR(Any, any)
OPERATOR(Max, maximum_of_all)
OPERATOR(Min, minimum_of_all)
OPERATOR(Amax, amax)
OPERATOR(Amin, amin)
OPERATOR(LinalgVectorNorm, vector_norm)
OPERATOR(Norm, norm)
OPERATOR(Std, deviation)
OPERATOR(VarCorrection, variance_of)
OPERATOR(ArgMax, position_of<Greater>)
OPERATOR(ArgMin, position_of<Less>)
OPERATOR(Equal, same)
OPERATOR(Softmax, softmax)

OPERATOR(IndexSelect, index_select)
OPERATOR(Index, index_first)

}  // namespace standin
