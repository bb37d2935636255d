// What runtime.cpp offers to the operators: tensors, plans, launches, and the settings of the environment.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace standin {

// aclError: CANN's numbers for what the stand-in answers itself.
enum Error : int {
  kParamInvalid = 107000,
  kInvalidDevice = 107001,
  kContextNull = 107002,
  kCaptureDependency = 107024,
  kStreamUnjoined = 107025,
  kStreamCaptured = 107027,
  kEventCaptured = 107028,
  kStreamNotCaptured = 107029,
  kMemoryAllocation = 207001,
  kAicoreException = 507015,
  kCaptureInvalidated = 507903,
  kNotSupported = 500002,
};

// aclDataType
enum Dtype : int {
  kFloat = 0,
  kHalf = 1,
  kInt8 = 2,
  kInt32 = 3,
  kUint8 = 4,
  kInt16 = 6,
  kUint16 = 7,
  kUint32 = 8,
  kInt64 = 9,
  kUint64 = 10,
  kDouble = 11,
  kBool = 12,
  kBfloat16 = 27,
};

constexpr int kMaxRank = 8;  // CANN's limit

// A strided view, as aclTensor describes it. The memory is the caller's.
struct Tensor {
  char* data = nullptr;  // the first element
  int dtype = kFloat;
  int rank = 0;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements
  explicit operator bool() const { return data != nullptr || rank > 0; }
  int64_t count() const;
  bool contiguous() const;
};
struct Out : Tensor {};  // one that an operator writes

struct Scalar {
  double real = 0;
  int dtype = -1;  // as long as there is none
};
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

struct Stream;

// What GetWorkspaceSize leaves for the launch: everything by value, since the descriptors are destroyed in between.
struct Plan {
  const char* name;
  std::function<void()> run;
  std::vector<Tensor> inputs, outputs;
};

size_t item_size(int dtype);
double load(const Tensor& tensor, int64_t element);  // element: an offset in elements from data
void store(const Tensor& tensor, int64_t element, double value);
bool is_floating(int dtype);
void copy(Out to, Tensor from);  // converting, broadcasting

// Every exported function begins with ENTER: it is traced, and answers an error where STANDIN_FAIL says so.
bool tracing();
int answer(const char* name, const std::string& details);
template <typename... Parts>
int called(const char* name, const Parts&... parts) {
  if (!tracing()) return answer(name, {});
  std::ostringstream details;
  (void(details << parts), ...);
  return answer(name, details.str());
}
#define ENTER(...) \
  if (int code = standin::called(__func__, ##__VA_ARGS__)) return code

int fail(int code, const std::string& what);      // sets the text of aclGetRecentErrMsg
int missing(const char* kind, const char* name);  // "operator aclnnX is not there", on stderr too

// The two calls of an operator: what to do, then when.
int prepare(Plan&& made, uint64_t* workspace, Plan** plan);
int launch(Plan* plan, void* stream);

// Calls range(begin, end) for parts of 0..count, on another thread too where count * cost (operations) is worth one.
void parallel(int64_t count, int64_t cost, const std::function<void(int64_t, int64_t)>& range);

}  // namespace standin

// The descriptors that torch_npu makes and destroys around a call.
struct aclTensor : standin::Tensor {};
struct aclScalar : standin::Scalar {};
struct aclIntArray : standin::Ints {};
struct aclBoolArray : std::vector<char> {};
struct aclTensorList : std::vector<const aclTensor*> {};
struct aclScalarList : std::vector<const aclScalar*> {};

namespace standin {

// How an argument of an operator crosses the C interface, and what of it a plan keeps.
template <typename Value>
struct Wire {
  using Type = Value;
  static Value keep(Type value) { return value; }
  static void list(const Value&, Plan&) {}
};
template <>
struct Wire<Tensor> {
  using Type = const aclTensor*;
  static Tensor keep(Type pointer) { return pointer ? Tensor(*pointer) : Tensor{}; }
  static void list(const Tensor& tensor, Plan& plan) {
    if (tensor) plan.inputs.push_back(tensor);
  }
};
template <>
struct Wire<Out> {
  using Type = const aclTensor*;
  static Out keep(Type pointer) { return Out{Wire<Tensor>::keep(pointer)}; }
  static void list(const Out& tensor, Plan& plan) {
    if (tensor) plan.outputs.push_back(tensor);
  }
};
template <>
struct Wire<Scalar> {
  using Type = const aclScalar*;
  static Scalar keep(Type pointer) { return pointer ? Scalar(*pointer) : Scalar{}; }
  static void list(const Scalar&, Plan&) {}
};
template <>
struct Wire<Ints> {
  using Type = const aclIntArray*;
  static Ints keep(Type pointer) { return pointer ? Ints(*pointer) : Ints{}; }
  static void list(const Ints&, Plan&) {}
};
template <>
struct Wire<Tensors> {
  using Type = const aclTensorList*;
  static Tensors keep(Type pointer) {
    Tensors tensors;
    if (pointer)
      for (const aclTensor* tensor : *pointer) tensors.push_back(tensor ? Tensor(*tensor) : Tensor{});
    return tensors;
  }
  static void list(const Tensors& tensors, Plan& plan) {
    for (const Tensor& tensor : tensors) Wire<Tensor>::list(tensor, plan);
  }
};
template <>
struct Wire<std::string> {
  using Type = const char*;
  static std::string keep(Type pointer) { return pointer ? pointer : ""; }
  static void list(const std::string&, Plan&) {}
};

template <typename... Values>
int prepare_with(const char* name, void (*function)(Values...), typename Wire<Values>::Type... arguments, uint64_t* workspace,
                 Plan** plan) {
  Plan made{name, nullptr, {}, {}};
  std::tuple<Values...> kept{Wire<Values>::keep(arguments)...};
  std::apply([&](const Values&... values) { (Wire<Values>::list(values, made), ...); }, kept);
  made.run = [function, kept] { std::apply(function, kept); };
  return prepare(std::move(made), workspace, plan);
}
template <const char* name, auto function>
struct Entry;
template <const char* name, typename... Values, void (*function)(Values...)>
struct Entry<name, function> {
  static int prepare(typename Wire<Values>::Type... arguments, uint64_t* workspace, Plan** plan) {
    return prepare_with<Values...>(name, function, arguments..., workspace, plan);
  }
};

}  // namespace standin

// Exports aclnnNAME and aclnnNAMEGetWorkspaceSize for a function on values. The ifunc gives a template a C name: the loader
// asks the resolver for the address.
#define OPERATOR(NAME, FUNCTION)                                                                                  \
  static constexpr char name_##NAME[] = "aclnn" #NAME;                                                            \
  extern "C" {                                                                                                    \
  static int (*entry_##NAME())() {                                                                                \
    return reinterpret_cast<int (*)()>(reinterpret_cast<void*>(&standin::Entry<name_##NAME, FUNCTION>::prepare)); \
  }                                                                                                               \
  int aclnn##NAME##GetWorkspaceSize() __attribute__((ifunc("entry_" #NAME)));                                     \
  int aclnn##NAME(void*, uint64_t, standin::Plan* plan, void* stream) { return launch(plan, stream); }            \
  }
