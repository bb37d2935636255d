// The runtime of the stand-in: devices, memory, streams, events, captures, descriptors, failures on demand, the trace.
//
// Device memory is host memory. A stream is a thread that does what it was given in order. Names and signatures are CANN's
// (the headers in torch_npu/include/acl); behaviour is what torch_npu relies on, and nothing of it proves what CANN does.
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "standin.h"

namespace standin {
namespace {

using Clock = std::chrono::steady_clock;

// --- settings ---

// NAME[:CALLS][@A-B]=VALUE, NAME or * for all. CALLS: 4, 4-6, 4- (from the 4th on), 8%20 (each 8th of 20); without: every one.
struct Rule {
  std::string name;
  int64_t first = 1, last = INT64_MAX, every = 0;
  int64_t row_begin = 0, row_end = INT64_MAX;
  double value = 0;
  int64_t calls = 0;

  bool matches_next(const char* called_name) {
    if (name != "*" && name != called_name) return false;
    ++calls;
    return every ? calls % every == first % every : first <= calls && calls <= last;
  }
};

[[noreturn]] void refuse(const char* variable, const std::string& text) {
  std::fprintf(stderr, "stand-in for CANN: %s: %s is not NAME[:CALLS][@A-B]=VALUE\n", variable, text.c_str());
  std::_Exit(2);
}

Rule parse_rule(const char* variable, const std::string& text) {
  Rule rule;
  char name[128] = "", calls[64] = "";
  size_t equal = text.rfind('=');
  if (equal == std::string::npos) refuse(variable, text);
  std::string target = text.substr(0, equal);
  char* end = nullptr;
  rule.value = std::strtod(text.c_str() + equal + 1, &end);
  bool whole = end != text.c_str() + equal + 1 && !*end;
  if (size_t at = target.find('@'); at != std::string::npos) {
    whole &= std::sscanf(target.c_str() + at, "@%ld-%ld", &rule.row_begin, &rule.row_end) == 2;
    target.resize(at);
  }
  int fields = std::sscanf(target.c_str(), "%127[^:]:%63s", name, calls);
  rule.name = name;
  if (fields == 2) {
    int64_t other = 0;
    char kind = 0;
    int read = std::sscanf(calls, "%ld%c%ld", &rule.first, &kind, &other);
    whole &= read >= 1 && (read == 1 || kind == '-' || (kind == '%' && other > 0));
    rule.last = read == 1 ? rule.first : read == 3 ? other : INT64_MAX;
    if (kind == '%') rule.every = other;
  }
  if (fields < 1 || !whole) refuse(variable, text);
  return rule;
}

std::vector<Rule> rules(const char* variable) {
  std::vector<Rule> result;
  std::istringstream entries(std::getenv(variable) ? std::getenv(variable) : "");
  for (std::string entry; std::getline(entries, entry, ',');)
    if (!entry.empty()) result.push_back(parse_rule(variable, entry));
  return result;
}

int64_t number(const char* variable, int64_t otherwise) {
  const char* text = std::getenv(variable);
  return text && *text ? std::strtoll(text, nullptr, 10) : otherwise;
}

std::string text(const char* variable, const char* otherwise) {
  const char* found = std::getenv(variable);
  return found && *found ? found : otherwise;
}

struct Settings {
  int64_t device_bytes = number("STANDIN_DEVICE_BYTES", int64_t{64} << 30);
  int64_t host_bytes = number("STANDIN_HOST_BYTES", INT64_MAX);
  int64_t devices = number("STANDIN_DEVICES", 2);
  std::string soc = text("STANDIN_SOC", "Ascend910_9362");
  std::string cann = text("STANDIN_CANN", "8.5.0");
  std::vector<Rule> failures = rules("STANDIN_FAIL");
  std::vector<Rule> delays = rules("STANDIN_DELAY");
  std::vector<Rule> stalls = rules("STANDIN_STALL");
  std::vector<Rule> wrong = rules("STANDIN_WRONG");
  std::vector<Rule> workspaces = rules("STANDIN_WORKSPACE");
  int trace = std::getenv("STANDIN_TRACE") ? open(std::getenv("STANDIN_TRACE"), O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
  std::mutex mutex;  // of the rules' counters
};

Settings* current_settings = nullptr;  // never destroyed: threads of streams outlive main
Settings& settings() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (!current_settings) current_settings = new Settings;
  });
  return *current_settings;
}

const Rule* next_match(std::vector<Rule>& list, const char* name) {
  if (list.empty()) return nullptr;
  std::lock_guard lock(settings().mutex);
  const Rule* found = nullptr;
  for (Rule& rule : list)
    if (rule.matches_next(name)) found = &rule;
  return found;
}

void trace(const std::string& line) {
  std::string whole = line + "\n";
  if (write(settings().trace, whole.data(), whole.size()) < 0) std::perror("STANDIN_TRACE");
}

thread_local std::string recent_error;

}  // namespace

bool tracing() { return settings().trace >= 0; }

int fail(int code, const std::string& what) {
  char stamp[32];
  std::time_t now = std::time(nullptr);
  std::strftime(stamp, sizeof stamp, "%Y-%m-%d-%H:%M:%S", std::localtime(&now));
  recent_error = "[PID: " + std::to_string(getpid()) + "] " + stamp + " EE9999: Inner Error!\nEE9999: " + what +
                 ", error code is " + std::to_string(code) + ".\n        TraceBack (most recent call last):\n";
  return code;
}

int missing(const char* kind, const char* name) {
  std::string what = std::string(kind) + " " + name + " is not there";
  std::fprintf(stderr, "stand-in for CANN: %s\n", what.c_str());
  return fail(kNotSupported, "The stand-in for CANN: " + what);
}

int answer(const char* name, const std::string& details) {
  const Rule* stall = next_match(settings().stalls, name);
  if (stall) std::this_thread::sleep_for(std::chrono::microseconds(int64_t(stall->value)));
  const Rule* rule = next_match(settings().failures, name);
  int code = rule ? int(rule->value) : 0;
  if (tracing()) trace(name + details + (code ? " error=" + std::to_string(code) : ""));
  return code ? fail(code, std::string(name) + " failed as STANDIN_FAIL asks") : 0;
}

// --- streams ---

namespace {
struct Capture;

// One recording of an event: set by the stream's thread when it comes to it.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Clock::time_point time;

  void set() {
    std::lock_guard lock(mutex);
    done = true;
    time = Clock::now();
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return done; });
  }
  bool is_set() {
    std::lock_guard lock(mutex);
    return done;
  }
};
}  // namespace

using Task = std::function<void()>;

struct Stream {
  int id, device;
  std::shared_ptr<Capture> capture;  // guarded by captures_mutex

  Stream(int id, int device) : id(id), device(device), inner(new Inner) {}

  void push(Task task) {
    std::lock_guard lock(inner->mutex);
    inner->tasks.push_back(std::move(task));
    if (!inner->started) std::thread(&Stream::work, inner).detach();
    inner->started = true;
    inner->changed.notify_all();
  }
  void drain() {
    std::unique_lock lock(inner->mutex);
    inner->changed.wait(lock, [this] { return inner->idle(); });
  }
  std::string failure() {  // what an operator met while it ran, once
    std::lock_guard lock(inner->mutex);
    return std::exchange(inner->failure, {});
  }
  bool idle() {
    std::lock_guard lock(inner->mutex);
    return inner->idle();
  }
  void stop() {
    drain();
    std::lock_guard lock(inner->mutex);
    inner->stopped = true;
    inner->changed.notify_all();
  }
  // A forked child has none of the threads, and locks in whatever state they were.
  void forget() { new (&inner) std::shared_ptr<Inner>(new Inner); }

 private:
  struct Inner {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> tasks;
    bool busy = false, started = false, stopped = false;
    std::string failure;
    bool idle() const { return tasks.empty() && !busy; }
  };
  std::shared_ptr<Inner> inner;

  static std::string run(const Task& task) {
    try {
      task();
      return {};
    } catch (const std::exception& error) {
      std::fprintf(stderr, "stand-in for CANN: %s\n", error.what());
      return error.what();
    }
  }
  static void work(std::shared_ptr<Inner> inner) {
    std::unique_lock lock(inner->mutex);
    while (true) {
      inner->changed.wait(lock, [&] { return inner->stopped || !inner->tasks.empty(); });
      if (inner->stopped) return;
      Task task = std::move(inner->tasks.front());
      inner->tasks.pop_front();
      inner->busy = true;
      lock.unlock();
      std::string failure = run(task);
      task = nullptr;
      lock.lock();
      if (!failure.empty()) inner->failure = failure;
      inner->busy = false;
      inner->changed.notify_all();
    }
  }
};

namespace {

struct Device {
  int id;
  Stream* default_stream;
  int64_t used = 0;
};

// Everything that exists, by address. Leaked on purpose, like the settings.
struct World {
  std::mutex mutex;
  std::vector<Device*> devices;
  std::map<Stream*, int> streams;  // to their device
  int next_stream = 0;
  std::map<void*, std::pair<int64_t, int>> blocks;  // size and device; -1 is pinned host memory
  std::map<void*, int64_t> reserved;                // address ranges
  int64_t host_used = 0;

  World() {
    for (int id = 0; id < count_visible(); ++id) devices.push_back(new Device{id, make_stream(id)});
    pthread_atfork(nullptr, nullptr, [] { world().after_fork(); });
  }
  static World& world();

  Stream* make_stream(int device) {
    Stream* stream = new Stream(next_stream++, device);
    streams[stream] = device;
    return stream;
  }
  void after_fork() {
    new (&mutex) std::mutex;
    for (auto& [stream, device] : streams) stream->forget();
  }
  // ASCEND_RT_VISIBLE_DEVICES as CANN takes it: numbers that exist, in ascending order, up to the first that is not so.
  static int count_visible() {
    const char* list = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!list) return int(settings().devices);
    std::istringstream entries(list);
    int count = 0;
    long last = -1;
    for (std::string entry; std::getline(entries, entry, ','); ++count) {
      char* end = nullptr;
      long id = std::strtol(entry.c_str(), &end, 10);
      if (end == entry.c_str() || *end || id <= last || id >= settings().devices) return id <= last ? 0 : count;
      last = id;
    }
    return count;
  }
};

World* current_world = nullptr;
World& World::world() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (!current_world) current_world = new World;
  });
  return *current_world;
}
World& world() { return World::world(); }

thread_local int current_device = -1;

Device* device_of_thread() {
  size_t id = size_t(std::max(current_device, 0));
  return id < world().devices.size() ? world().devices[id] : nullptr;
}

Stream* to_stream(void* handle) { return handle ? static_cast<Stream*>(handle) : device_of_thread()->default_stream; }

std::vector<Stream*> streams_of(int device) {  // every device with -1
  std::lock_guard lock(world().mutex);
  std::vector<Stream*> found;
  for (auto& [stream, owner] : world().streams)
    if (device < 0 || owner == device) found.push_back(stream);
  return found;
}

void drain_device(int device) {
  for (Stream* stream : streams_of(device)) stream->drain();
}

// --- captures ---

// How much of each stream's captured work has been done before a point. A fork is joined when the origin's knowledge covers it.
using Knowledge = std::map<Stream*, int64_t>;

struct Model {
  std::shared_ptr<std::vector<Task>> tasks = std::make_shared<std::vector<Task>>();  // in the order of the calls
};

struct Capture {
  Stream* origin;
  Model* model;  // the handle is the same while the capture runs and after
  std::map<Stream*, Knowledge> streams;
  bool invalid = false;

  void advance(Stream* stream) { ++streams[stream][stream]; }
  bool joined() {
    const Knowledge& origins = streams[origin];
    for (auto& [stream, own] : streams) {
      auto known = origins.find(stream);
      if (stream != origin && (known == origins.end() || known->second < own.at(stream))) return false;
    }
    return true;
  }
  void release() {
    for (auto& [stream, knowledge] : streams) stream->capture.reset();
  }
};

std::recursive_mutex captures_mutex;

struct Event {
  std::shared_ptr<Mark> mark;  // of the latest recording; none: never recorded, which counts as done
  std::weak_ptr<Capture> capture;
  Knowledge knowledge;
};

// Hand work to a stream, or to the capture that the stream is in. `line` is what a replay writes into the trace.
void enqueue(Stream* stream, const char* name, const std::string& line, Task run) {
  const Rule* delay = next_match(settings().delays, name);
  std::chrono::microseconds pause(delay ? int64_t(delay->value) : 0);
  Task delayed = !delay ? std::move(run) : [pause, run = std::move(run)] {
    std::this_thread::sleep_for(pause);
    run();
  };
  std::lock_guard lock(captures_mutex);
  if (!stream->capture) return stream->push(std::move(delayed));
  stream->capture->advance(stream);
  stream->capture->model->tasks->push_back(!tracing() ? delayed : [line, delayed] {
    trace(line);
    delayed();
  });
}

const char* state_of(Stream* stream) {
  std::lock_guard lock(captures_mutex);
  return stream->capture ? "captured" : "eager";
}

// What would wait for a stream that is being captured is refused, and spoils the capture.
int refuse_captured(Stream* stream, const char* name) {
  std::lock_guard lock(captures_mutex);
  if (!stream->capture) return 0;
  stream->capture->invalid = true;
  return fail(kStreamCaptured, std::string(name) + ": the stream is being captured");
}

int synchronize(void* handle, const char* name) {
  Stream* stream = to_stream(handle);
  if (int code = refuse_captured(stream, name)) return code;
  stream->drain();
  std::string failure = stream->failure();
  return failure.empty() ? 0 : fail(kAicoreException, failure);
}

int synchronize_device(const char* name) {
  for (Stream* stream : streams_of(std::max(current_device, 0)))
    if (int code = synchronize(stream, name)) return code;
  return 0;
}

// --- operators ---

std::string shown(const Tensor& tensor) {
  static const std::map<int, const char*> names = {{kFloat, "float32"}, {kHalf, "float16"},   {kBfloat16, "bfloat16"},
                                                   {kInt8, "int8"},     {kInt32, "int32"},    {kUint8, "uint8"},
                                                   {kInt64, "int64"},   {kDouble, "float64"}, {kBool, "bool"}};
  auto found = names.find(tensor.dtype);
  std::string result = found == names.end() ? "dtype" + std::to_string(tensor.dtype) : found->second;
  for (int axis = 0; axis < tensor.rank; ++axis) result += (axis ? "," : "[") + std::to_string(tensor.size[axis]);
  return result + (tensor.rank ? "]" : "[]") + (tensor.contiguous() ? "" : "'");  // ' marks a strided view
}

std::string shown(const Plan& plan) {
  std::string result;
  for (const Tensor& tensor : plan.inputs) result += " " + shown(tensor);
  result += " ->";
  for (const Tensor& tensor : plan.outputs) result += " " + shown(tensor);
  return result;
}

void scale(const Tensor& tensor, const Rule& rule) {
  if (!is_floating(tensor.dtype)) return;
  int64_t rows = tensor.rank ? tensor.size[0] : 1, each = rows ? tensor.count() / rows : 0;
  for (int64_t row = std::min(rule.row_begin, rows); row < std::min(rule.row_end, rows); ++row)
    for (int64_t index = 0; index < each; ++index) {
      int64_t offset = tensor.rank ? row * tensor.stride[0] : 0;
      for (int64_t axis = tensor.rank - 1, rest = index; axis > 0; rest /= tensor.size[axis--])
        offset += rest % tensor.size[axis] * tensor.stride[axis];
      store(tensor, offset, load(tensor, offset) * (1 + rule.value));
    }
}

}  // namespace

int prepare(Plan&& made, uint64_t* workspace, Plan** plan) {
  if (int code = called((std::string(made.name) + "GetWorkspaceSize").c_str())) return code;
  const Rule* rule = next_match(settings().workspaces, made.name);
  *workspace = rule ? uint64_t(rule->value) : 0;
  *plan = new Plan(std::move(made));
  return 0;
}

int launch(Plan* raw, void* handle) {
  std::shared_ptr<Plan> plan(raw);
  Stream* stream = to_stream(handle);
  std::string rest = tracing() ? shown(*plan) : "";
  std::string where = std::string(plan->name) + " stream=" + std::to_string(stream->id);
  if (int code = called(plan->name, " stream=", stream->id, " ", state_of(stream), rest)) return code;
  const Rule* wrong = next_match(settings().wrong, plan->name);
  enqueue(stream, plan->name, where + " replayed" + rest, [plan, wrong] {
    plan->run();
    if (wrong)
      for (const Tensor& tensor : plan->outputs) scale(tensor, *wrong);
  });
  return 0;
}

}  // namespace standin

// --- what CANN exports ---

using namespace standin;

extern "C" {

int standin_for_cann() { return 1; }  // CANN has no such symbol

// For a forked child that has used nothing yet: it gets the settings and the devices of its own environment.
void standin_restart() {
  settings();
  current_settings = new Settings;
  world();
  current_world = new World;
}

int standin_called(const char* name) { return called(name); }                // a generated stub
int standin_missing(const char* name) { return missing("operator", name); }  // a generated operator

const char* aclGetRecentErrMsg() {
  thread_local std::string shown_error;
  shown_error.swap(recent_error);
  recent_error.clear();
  return shown_error.c_str();
}

// Devices

int aclrtGetDeviceCount(uint32_t* count) {
  ENTER();
  *count = uint32_t(world().devices.size());
  return *count ? 0 : fail(kInvalidDevice, "no device is visible");
}
int aclrtSetDevice(int32_t id) {
  ENTER(" device=", id);
  if (id < 0 || size_t(id) >= world().devices.size()) return fail(kInvalidDevice, "there is no device " + std::to_string(id));
  current_device = id;
  return 0;
}
int aclrtGetDevice(int32_t* id) {
  ENTER();
  if (current_device < 0) return fail(kContextNull, "the current context is null");
  *id = current_device;
  return 0;
}
int aclrtResetDevice(int32_t id) {
  ENTER(" device=", id);
  drain_device(id);
  return 0;
}
int aclrtGetCurrentContext(void** context) {
  ENTER();
  if (current_device < 0) return fail(kContextNull, "the current context is null");
  *context = device_of_thread();
  return 0;
}
int aclrtSetCurrentContext(void* context) {
  ENTER();
  if (!context) return fail(kContextNull, "the context is null");
  current_device = static_cast<Device*>(context)->id;
  return 0;
}
int aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
  ENTER();
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
const char* aclrtGetSocName() {
  called(__func__);
  return settings().soc.c_str();
}
int aclGetDeviceCapability(uint32_t, int kind, int64_t* value) {
  ENTER(" kind=", kind);
  static const int64_t answers[] = {20, 40, 168 << 20};  // cube cores, vector cores, L2 of a 9362
  *value = kind >= 0 && kind < 3 ? answers[kind] : 0;
  return 0;
}
int aclrtGetDeviceInfo(uint32_t, int attribute, int64_t* value) {
  ENTER(" attribute=", attribute);
  *value = attribute == 201 ? 40 : attribute == 301 ? settings().device_bytes : 20;
  return 0;
}
int aclrtDeviceCanAccessPeer(int32_t* possible, int32_t, int32_t) {
  ENTER();
  *possible = 1;
  return 0;
}
int aclrtGetDeviceUtilizationRate(int32_t, int32_t* rates) {
  ENTER();
  std::fill(rates, rates + 4, 0);
  return 0;
}
int aclrtGetSysParamOpt(int, int64_t* value) {
  ENTER();
  *value = 0;
  return 0;
}
int aclrtCtxGetSysParamOpt(int option, int64_t* value) { return aclrtGetSysParamOpt(option, value); }

// aclCANNPackageVersion: the whole, then its four parts.
int aclsysGetCANNVersion(int, char* version) {
  ENTER();
  std::memset(version, 0, 128 + 4 * 64 + 128);
  std::strncpy(version, settings().cann.c_str(), 127);
  std::istringstream parts(settings().cann);
  std::string part;
  for (int index = 0; index < 4 && std::getline(parts, part, '.'); ++index)
    std::strncpy(version + 128 + 64 * index, part.c_str(), 63);
  return 0;
}

int aclopCompileAndExecute(const char* type, int, const void*, const void*, int, const void*, void*, const void*, int, int,
                           const char*, void*) {
  ENTER(" type=", type);
  return missing("acl_op", type);
}
int aclopCompileAndExecuteV2(const char* type, int, const void*, const void*, int, const void*, void*, const void*, int, int,
                             const char*, void*) {
  ENTER(" type=", type);
  return missing("acl_op", type);
}

// Memory

namespace {
constexpr int64_t kRound = 512;

int allocate(void** pointer, size_t size, int device, const char* name) {
  std::lock_guard lock(world().mutex);
  int64_t whole = (int64_t(size) + kRound - 1) / kRound * kRound;
  int64_t& used = device < 0 ? world().host_used : world().devices[size_t(device)]->used;
  int64_t bound = device < 0 ? settings().host_bytes : settings().device_bytes;
  if (whole > bound - used)
    return fail(kMemoryAllocation, std::string(name) + ": failed to allocate " + std::to_string(size) + " bytes");
  *pointer = std::aligned_alloc(kRound, size_t(std::max(whole, kRound)));
  if (!*pointer) return fail(kMemoryAllocation, std::string(name) + ": this machine has no memory left");
  used += whole;
  world().blocks[*pointer] = {whole, device};
  return 0;
}

// Waits for everything first: what is queued may still use the block, and a device would not crash over it.
int release(void* pointer, const char* name) {
  drain_device(-1);
  std::lock_guard lock(world().mutex);
  auto found = world().blocks.find(pointer);
  if (found == world().blocks.end()) return fail(kParamInvalid, std::string(name) + ": not an address that was allocated");
  auto [size, device] = found->second;
  (device < 0 ? world().host_used : world().devices[size_t(device)]->used) -= size;
  world().blocks.erase(found);
  std::free(pointer);
  return 0;
}
}  // namespace

int aclrtMalloc(void** pointer, size_t size, int) {
  ENTER(" bytes=", size);
  return allocate(pointer, size, std::max(current_device, 0), __func__);
}
int aclrtMallocAlign32(void** pointer, size_t size, int) {
  ENTER(" bytes=", size);
  return allocate(pointer, size, std::max(current_device, 0), __func__);
}
int aclrtFree(void* pointer) {
  ENTER();
  return release(pointer, __func__);
}
int aclrtMallocHost(void** pointer, size_t size) {
  ENTER(" bytes=", size);
  return allocate(pointer, size, -1, __func__);
}
int aclrtFreeHost(void* pointer) {
  ENTER();
  return release(pointer, __func__);
}
int aclrtGetMemInfo(int, size_t* free_bytes, size_t* total) {
  ENTER();
  std::lock_guard lock(world().mutex);
  *total = size_t(settings().device_bytes);
  *free_bytes = size_t(settings().device_bytes - device_of_thread()->used);
  return 0;
}
int aclrtMemcpy(void* target, size_t room, const void* source, size_t count, int kind) {
  ENTER(" kind=", kind, " bytes=", count);
  if (count > room) return fail(kParamInvalid, "aclrtMemcpy: the target is too small");
  std::memcpy(target, source, count);
  return 0;
}
int aclrtMemcpyAsync(void* target, size_t room, const void* source, size_t count, int kind, void* handle) {
  Stream* stream = to_stream(handle);
  std::string rest = " kind=" + std::to_string(kind) + " bytes=" + std::to_string(count);
  ENTER(" stream=", stream->id, " ", state_of(stream), rest);
  if (count > room) return fail(kParamInvalid, "aclrtMemcpyAsync: the target is too small");
  std::string line = std::string(__func__) + " stream=" + std::to_string(stream->id) + " replayed" + rest;
  enqueue(stream, __func__, line, [=] { std::memmove(target, source, count); });
  return 0;
}
int aclrtMemset(void* target, size_t room, int32_t value, size_t count) {
  ENTER(" bytes=", count);
  std::memset(target, value, std::min(room, count));
  return 0;
}
int aclrtMemsetAsync(void* target, size_t room, int32_t value, size_t count, void* handle) {
  Stream* stream = to_stream(handle);
  ENTER(" stream=", stream->id, " ", state_of(stream), " bytes=", count);
  std::string line =
      std::string(__func__) + " stream=" + std::to_string(stream->id) + " replayed bytes=" + std::to_string(count);
  enqueue(stream, __func__, line, [=] { std::memset(target, value, std::min(room, count)); });
  return 0;
}

// Address ranges that grow, which expandable_segments uses. A handle of physical memory is its size.

int aclrtReserveMemAddress(void** pointer, size_t size, size_t, void*, uint64_t) {
  ENTER(" bytes=", size);
  *pointer = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return fail(kMemoryAllocation, "aclrtReserveMemAddress: no address range is left");
  std::lock_guard lock(world().mutex);
  world().reserved[*pointer] = int64_t(size);
  return 0;
}
int aclrtReleaseMemAddress(void* pointer) {
  ENTER();
  drain_device(-1);
  std::lock_guard lock(world().mutex);
  munmap(pointer, size_t(world().reserved[pointer]));
  world().reserved.erase(pointer);
  return 0;
}
int aclrtMallocPhysical(void** handle, size_t size, const void*, uint64_t) {
  ENTER(" bytes=", size);
  std::lock_guard lock(world().mutex);
  Device* device = device_of_thread();
  if (int64_t(size) > settings().device_bytes - device->used)
    return fail(kMemoryAllocation, "aclrtMallocPhysical: failed to allocate " + std::to_string(size) + " bytes");
  device->used += int64_t(size);
  *handle = new std::pair<Device*, int64_t>(device, int64_t(size));
  return 0;
}
int aclrtFreePhysical(void* handle) {
  ENTER();
  std::lock_guard lock(world().mutex);
  auto* physical = static_cast<std::pair<Device*, int64_t>*>(handle);
  physical->first->used -= physical->second;
  delete physical;
  return 0;
}
int aclrtMapMem(void* pointer, size_t size, size_t, void*, uint64_t) {
  ENTER(" bytes=", size);
  return mprotect(pointer, size, PROT_READ | PROT_WRITE) ? fail(kParamInvalid, "aclrtMapMem failed") : 0;
}
int aclrtUnmapMem(void* pointer) {
  ENTER();
  drain_device(-1);  // the pages stay: nothing tells how many there are
  (void)pointer;
  return 0;
}

// Streams

int aclrtCreateStream(void** stream) {
  ENTER();
  std::lock_guard lock(world().mutex);
  *stream = world().make_stream(std::max(current_device, 0));
  return 0;
}
int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) {
  ENTER();
  std::lock_guard lock(world().mutex);
  *stream = world().make_stream(std::max(current_device, 0));
  return 0;
}
int aclrtDestroyStream(void* handle) {
  ENTER();
  Stream* stream = static_cast<Stream*>(handle);
  stream->stop();
  std::lock_guard lock(world().mutex);
  if (world().streams.erase(stream)) delete stream;
  return 0;
}
int aclrtDestroyStreamForce(void* handle) { return aclrtDestroyStream(handle); }
int aclrtSynchronizeStream(void* stream) {
  ENTER(" stream=", to_stream(stream)->id);
  return synchronize(stream, __func__);
}
int aclrtSynchronizeStreamWithTimeout(void* stream, int32_t) {
  ENTER(" stream=", to_stream(stream)->id);
  return synchronize(stream, __func__);
}
int aclrtSynchronizeDevice() {
  ENTER();
  return synchronize_device(__func__);
}
int aclrtSynchronizeDeviceWithTimeout(int32_t) {
  ENTER();
  return synchronize_device(__func__);
}
int aclrtStreamQuery(void* handle, int* status) {
  Stream* stream = to_stream(handle);
  ENTER(" stream=", stream->id);
  if (int code = refuse_captured(stream, __func__)) return code;
  *status = stream->idle() ? 0 : 1;
  return 0;
}
int aclrtStreamGetId(void* stream, int32_t* id) {
  ENTER();
  *id = to_stream(stream)->id;
  return 0;
}
int aclrtLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
  Stream* stream = to_stream(handle);
  ENTER(" stream=", stream->id, " ", state_of(stream));
  std::string line = std::string(__func__) + " stream=" + std::to_string(stream->id) + " replayed";
  enqueue(stream, __func__, line, [=] { function(argument); });
  return 0;
}
int aclrtLaunchCallback(void (*function)(void*), void* argument, int, void* stream) {
  return aclrtLaunchHostFunc(stream, function, argument);
}

// Events

int aclrtCreateEventExWithFlag(void** event, uint32_t) {
  ENTER();
  *event = new Event;
  return 0;
}
int aclrtCreateEventWithFlag(void** event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
int aclrtDestroyEvent(void* event) {
  ENTER();
  delete static_cast<Event*>(event);
  return 0;
}
int aclrtRecordEvent(void* handle, void* stream_handle) {
  Stream* stream = to_stream(stream_handle);
  ENTER(" stream=", stream->id, " ", state_of(stream));
  std::lock_guard lock(captures_mutex);
  Event* event = static_cast<Event*>(handle);
  event->mark = std::make_shared<Mark>();
  event->capture = stream->capture;
  if (!stream->capture) {
    enqueue(stream, __func__, "", [mark = event->mark] { mark->set(); });
    return 0;
  }
  stream->capture->advance(stream);
  event->knowledge = stream->capture->streams[stream];
  event->mark->set();  // outside the capture nothing is to be waited for
  return 0;
}
int aclrtStreamWaitEvent(void* stream_handle, void* handle) {
  Stream* stream = to_stream(stream_handle);
  ENTER(" stream=", stream->id, " ", state_of(stream));
  std::lock_guard lock(captures_mutex);
  Event* event = static_cast<Event*>(handle);
  std::shared_ptr<Capture> capture = event->capture.lock();
  bool active = capture && capture->origin->capture == capture;
  if (!active) {  // an event from before a capture: waited for by the replay too, which finds it done
    if (event->mark) enqueue(stream, __func__, "", [mark = event->mark] { mark->wait(); });
    return 0;
  }
  if (stream->capture && stream->capture != capture) return fail(kCaptureDependency, "two captures depend on each other");
  stream->capture = capture;
  Knowledge& knowledge = capture->streams[stream];
  for (auto& [other, count] : event->knowledge) knowledge[other] = std::max(knowledge[other], count);
  capture->advance(stream);
  return 0;
}
int aclrtSynchronizeEvent(void* handle) {
  ENTER();
  std::shared_ptr<Mark> mark;
  {
    std::lock_guard lock(captures_mutex);
    Event* event = static_cast<Event*>(handle);
    if (std::shared_ptr<Capture> capture = event->capture.lock(); capture && capture->origin->capture == capture) {
      capture->invalid = true;
      return fail(kEventCaptured, "the event is being captured");
    }
    mark = event->mark;
  }
  if (mark) mark->wait();
  return 0;
}
int aclrtQueryEventStatus(void* handle, int* status) {
  ENTER();
  std::lock_guard lock(captures_mutex);
  Event* event = static_cast<Event*>(handle);
  *status = !event->mark || event->mark->is_set() ? 1 : 0;
  return 0;
}
int aclrtQueryEventWaitStatus(void* handle, int* status) {
  ENTER();
  std::lock_guard lock(captures_mutex);
  Event* event = static_cast<Event*>(handle);
  *status = !event->mark || event->mark->is_set() ? 0 : 1;
  return 0;
}
int aclrtEventElapsedTime(float* milliseconds, void* start_handle, void* end_handle) {
  ENTER();
  std::lock_guard lock(captures_mutex);
  Event *start = static_cast<Event*>(start_handle), *end = static_cast<Event*>(end_handle);
  if (!start->mark || !end->mark || !start->mark->is_set() || !end->mark->is_set())
    return fail(107006, "aclrtEventElapsedTime: an event was not recorded");
  *milliseconds = std::chrono::duration<float, std::milli>(end->mark->time - start->mark->time).count();
  return 0;
}
int aclrtEventGetTimestamp(void* handle, uint64_t* microseconds) {
  ENTER();
  std::lock_guard lock(captures_mutex);
  Event* event = static_cast<Event*>(handle);
  if (!event->mark || !event->mark->is_set()) return fail(107006, "aclrtEventGetTimestamp: the event was not recorded");
  *microseconds = uint64_t(std::chrono::duration_cast<std::chrono::microseconds>(event->mark->time.time_since_epoch()).count());
  return 0;
}

// Captures

int aclmdlRICaptureBegin(void* handle, int mode) {
  Stream* stream = to_stream(handle);
  ENTER(" stream=", stream->id, " mode=", mode);
  std::lock_guard lock(captures_mutex);
  if (stream->capture) return fail(kStreamCaptured, "the stream is being captured already");
  stream->capture = std::make_shared<Capture>();
  stream->capture->origin = stream;
  stream->capture->model = new Model;
  stream->capture->streams[stream][stream] = 0;
  return 0;
}
int aclmdlRICaptureGetInfo(void* handle, int* status, void** model) {
  ENTER();
  std::lock_guard lock(captures_mutex);
  Stream* stream = to_stream(handle);
  *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  if (model) *model = stream->capture ? stream->capture->model : nullptr;
  return 0;
}
int aclmdlRICaptureEnd(void* handle, void** model) {
  Stream* stream = to_stream(handle);
  std::lock_guard lock(captures_mutex);
  std::shared_ptr<Capture> capture = stream->capture;
  *model = nullptr;
  if (!capture || capture->origin != stream) return fail(kStreamNotCaptured, "no capture began in this stream");
  capture->release();
  ENTER(" stream=", stream->id, " tasks=", capture->model->tasks->size());
  if (capture->invalid) return fail(kCaptureInvalidated, "the capture is invalidated");
  if (!capture->joined()) return fail(kStreamUnjoined, "the capture has a stream that was not joined to the original stream");
  *model = capture->model;
  return 0;
}
int aclmdlRIExecuteAsync(void* model, void* handle) {
  Stream* stream = to_stream(handle);
  ENTER(" stream=", stream->id);
  enqueue(stream, __func__, "", [tasks = static_cast<Model*>(model)->tasks] {
    for (const Task& task : *tasks) task();
  });
  return 0;
}
int aclmdlRIDestroy(void* model) {
  ENTER();
  delete static_cast<Model*>(model);
  return 0;
}
int aclmdlRICaptureThreadExchangeMode(int* mode) {
  ENTER(" mode=", *mode);
  thread_local int current = 0;
  std::swap(current, *mode);
  return 0;
}

// Descriptors

aclTensor* aclCreateTensor(const int64_t* size, uint64_t rank, int dtype, const int64_t* stride, int64_t offset, int,
                           const int64_t*, uint64_t, void* storage) {
  if (rank > kMaxRank) return nullptr;
  aclTensor* tensor = new aclTensor;
  tensor->dtype = dtype;
  tensor->rank = int(rank);
  std::copy(size, size + rank, tensor->size);
  std::copy(stride, stride + rank, tensor->stride);
  tensor->data = static_cast<char*>(storage) + offset * int64_t(item_size(dtype));
  return tensor;
}
aclScalar* aclCreateScalar(const void* value, int dtype) {
  Tensor cell;
  cell.data = static_cast<char*>(const_cast<void*>(value));
  cell.dtype = dtype;
  aclScalar* scalar = new aclScalar;
  scalar->dtype = dtype;
  scalar->real = load(cell, 0);
  return scalar;
}
aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  aclIntArray* array = new aclIntArray;
  array->assign(values, values + count);
  return array;
}
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  aclBoolArray* array = new aclBoolArray;
  array->assign(values, values + count);
  return array;
}
aclTensorList* aclCreateTensorList(const aclTensor* const* values, uint64_t count) {
  aclTensorList* list = new aclTensorList;
  list->assign(values, values + count);
  return list;
}
aclScalarList* aclCreateScalarList(const aclScalar* const* values, uint64_t count) {
  aclScalarList* list = new aclScalarList;
  list->assign(values, values + count);
  return list;
}
int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return 0;
}
int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return 0;
}
int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return 0;
}
int aclDestroyBoolArray(const aclBoolArray* array) {
  delete array;
  return 0;
}
int aclDestroyTensorList(const aclTensorList* list) {  // with what it holds
  for (const aclTensor* tensor : *list) delete tensor;
  delete list;
  return 0;
}
int aclDestroyScalarList(const aclScalarList* list) {
  for (const aclScalar* scalar : *list) delete scalar;
  delete list;
  return 0;
}

}  // extern "C"
