// Memory and counters, and the functions that Python calls through ctypes (stub_*).
#include "stub.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

namespace stub {

thread_local int current_device = 0;
thread_local cudaStream_t kernel_stream = nullptr;
std::recursive_mutex mutex;
std::atomic<uintptr_t> next_handle{0x1000};

namespace {

constexpr size_t kPage = 4096;
int devices = 8;
size_t memory_per_device = static_cast<size_t>(79.1 * (1ull << 30));
size_t copied_bytes = 4u << 20;

struct Totals {
  long count = 0;
  size_t bytes = 0;
};

// Never destroyed: libraries call until the process ends.
std::map<uintptr_t, Block> &blocks() {
  static auto *map = new std::map<uintptr_t, Block>;
  return *map;
}
template <int kind>
std::map<std::string, Totals> &table() {
  static auto *map = new std::map<std::string, Totals>;
  return *map;
}
enum { kLaunches, kProducts, kCollectives, kCopies, kOverlapped };

// A collective on a stream of NCCL for which no other stream has waited.
struct Pending {
  std::string key;
  size_t bytes;
  cudaStream_t stream;
  long number;    // of the collective
  long products;  // that were queued before it
  long period;    // between two calls of stub_take
};
std::vector<Pending> pending;
std::map<cudaEvent_t, std::pair<cudaStream_t, long>> &recorded() {  // event -> stream, collectives queued before it
  static auto *map = new std::map<cudaEvent_t, std::pair<cudaStream_t, long>>;
  return *map;
}
long num_collectives = 0, num_products = 0, period = 0;

size_t used[64];
std::atomic<bool> tracing{false};
using WaitCallback = void (*)(const char *);
WaitCallback on_wait = nullptr;

Block *locate(const void *pointer) {
  auto next = blocks().upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (next == blocks().begin()) return nullptr;
  --next;
  return reinterpret_cast<uintptr_t>(pointer) < next->first + next->second.size ? &next->second : nullptr;
}

void add(std::map<std::string, Totals> &to, const std::string &key, long count, size_t bytes = 0) {
  if (!tracing) return;
  std::lock_guard<std::recursive_mutex> guard(mutex);
  auto &totals = to[key];
  totals.count += count;
  totals.bytes += bytes;
}

}  // namespace

int device_count() { return devices; }
size_t device_memory() { return memory_per_device; }
size_t used_memory(int device) { return used[device]; }

bool take_memory(size_t size) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (used[current_device] + size > memory_per_device) return false;
  used[current_device] += size;
  return true;
}

void give_memory(size_t size, int device) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  used[device] -= size;
}

void *allocate(size_t size, bool pinned) {
  size = (size + kPage - 1) / kPage * kPage;
  if (!pinned && !take_memory(size)) return nullptr;
  void *pointer = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pointer == MAP_FAILED) return nullptr;
  enter_block(pointer, {size, current_device, pinned});
  return pointer;
}

bool release(void *pointer) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  auto found = blocks().find(reinterpret_cast<uintptr_t>(pointer));
  if (found == blocks().end()) return false;
  if (!found->second.pinned) give_memory(found->second.size, found->second.device);
  munmap(pointer, found->second.size);
  blocks().erase(found);
  return true;
}

void enter_block(void *pointer, Block block) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  blocks()[reinterpret_cast<uintptr_t>(pointer)] = block;
}

void forget_block(void *pointer) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  blocks().erase(reinterpret_cast<uintptr_t>(pointer));
}

bool find_block(const void *pointer, Block *found) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  const Block *block = locate(pointer);
  if (block != nullptr) *found = *block;
  return block != nullptr;
}

void copy_values(void *to, const void *from, size_t size) {
  if (to != from && size <= copied_bytes) memmove(to, from, size);
}

void count_copy(void *to, const void *from, size_t size, bool asynchronous) {
  Block target, source;
  bool to_block = find_block(to, &target), from_block = find_block(from, &source);
  bool to_device = to_block && !target.pinned, from_device = from_block && !source.pinned;
  if (to_device == from_device) return;
  bool pageable = asynchronous && !(to_device ? from_block : to_block);
  add(table<kCopies>(), std::string(to_device ? "to device" : "to host") + (pageable ? ", pageable" : ""), 1, size);
}

void set_values(void *to, int value, size_t size) {
  if (size <= copied_bytes) {
    memset(to, value, size);
  } else if (value == 0) {  // gives the pages back instead of writing zeros
    auto begin = (reinterpret_cast<uintptr_t>(to) + kPage - 1) / kPage * kPage;
    auto end = (reinterpret_cast<uintptr_t>(to) + size) / kPage * kPage;
    if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_DONTNEED);
  }
}

void count_launch(const std::string &kernel, long times) {
  if (!is_capturing()) add(table<kLaunches>(), kernel, times);
}

void count_product(const char *function, long m, long n, long k, const char *a, const char *b, const char *c,
                   const char *compute, bool accumulates, long batch) {
  auto key = std::string(function) + "\t" + std::to_string(m) + "\t" + std::to_string(n) + "\t" + std::to_string(k) +
             "\t" + a + "\t" + b + "\t" + c + "\t" + compute + "\t" + (accumulates ? "1" : "0") + "\t" +
             std::to_string(batch);
  add(table<kProducts>(), key, 1);
  std::lock_guard<std::recursive_mutex> guard(mutex);
  ++num_products;
}

void count_collective(const char *kind, int ranks, const char *type, size_t bytes, cudaStream_t stream) {
  auto key = std::string(kind) + "\t" + std::to_string(ranks) + "\t" + type;
  add(table<kCollectives>(), key, 1, bytes);
  if (stream == kernel_stream) return;  // in order with the kernels
  std::lock_guard<std::recursive_mutex> guard(mutex);
  pending.push_back({key, bytes, stream, num_collectives++, num_products, period});
}

void record_event(cudaEvent_t event, cudaStream_t stream) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (!pending.empty()) recorded()[event] = {stream, num_collectives};
}

void wait_for_event(cudaStream_t stream, cudaEvent_t event) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  auto found = recorded().find(event);
  if (found == recorded().end() || found->second.first == stream) return;
  auto [queue, number] = found->second;
  auto is_waited = [&, queue = queue, number = number](const Pending &item) {
    if (item.stream != queue || item.number >= number) return false;
    if (num_products > item.products)
      add(table<kOverlapped>(), item.key + (item.period < period ? "\tbefore" : "\tnow"), 1, item.bytes);
    return true;
  };
  pending.erase(std::remove_if(pending.begin(), pending.end(), is_waited), pending.end());
}

void count_wait(const char *call) {
  if (tracing && on_wait != nullptr) on_wait(call);
}

void unanswered(const char *name) {
  throw std::runtime_error(std::string("the CUDA stub does not answer ") + name +
                           ": add it to megatron_s2d/measure/cuda_stub");
}

}  // namespace stub

// ---- for Python

EXPORTED void stub_configure(int devices, double gibibytes, size_t copied_bytes) {
  stub::devices = devices;
  stub::memory_per_device = static_cast<size_t>(gibibytes * (1ull << 30));
  stub::copied_bytes = copied_bytes;
}

EXPORTED void stub_trace(bool on) { stub::tracing = on; }

EXPORTED void stub_on_wait(stub::WaitCallback callback) { stub::on_wait = callback; }

// Counts what an operation that Python computes instead of its kernels would have done.
EXPORTED void stub_count(const char *kernel, long launches, long waits) {
  if (launches) stub::count_launch(kernel, launches);
  for (long i = 0; i < waits; ++i) stub::count_wait(kernel);
}

// Returns "key<tab>count<tab>bytes" lines since the last call: of launches, products, collectives, overlapped
// collectives or copies.
EXPORTED const char *stub_take(const char *kind) {
  static std::string text;
  std::lock_guard<std::recursive_mutex> guard(stub::mutex);
  auto &table = !strcmp(kind, "launches")      ? stub::table<stub::kLaunches>()
                : !strcmp(kind, "products")    ? stub::table<stub::kProducts>()
                : !strcmp(kind, "collectives") ? stub::table<stub::kCollectives>()
                : !strcmp(kind, "overlapped")  ? stub::table<stub::kOverlapped>()
                                               : stub::table<stub::kCopies>();
  if (!strcmp(kind, "overlapped")) ++stub::period;
  text.clear();
  for (const auto &[key, totals] : table) {
    int status = 1;
    char *name = abi::__cxa_demangle(key.c_str(), nullptr, nullptr, &status);
    text += std::string(status == 0 ? name : key) + "\t" + std::to_string(totals.count) + "\t" +
            std::to_string(totals.bytes) + "\n";
    free(name);
  }
  table.clear();
  return text.c_str();
}
