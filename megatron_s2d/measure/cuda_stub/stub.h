// State that the answered calls share: memory, counters, and the callback for waits of the host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

// cuBLAS and NCCL name 16-bit types in signatures only. The headers that define them need nv/target of
// CUDA's C++ libraries, which PyTorch's wheels do not bring: their include guards leave them out.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __nv_bfloat16;

#include <cuda_runtime_api.h>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace stub {

// ---- devices: NVIDIA H100s of 80 GB, of which PyTorch sees 79.1 GiB
constexpr int kComputeCapability[2] = {9, 0};
constexpr int kMultiprocessors = 132;
extern thread_local int current_device;
int device_count();
size_t device_memory();  // bytes of one device

// ---- memory: host memory that no kernel touches, so that only what is copied takes physical memory
struct Block {
  size_t size;
  int device;
  bool pinned;  // host memory of cudaHostAlloc; otherwise device memory
};
void *allocate(size_t size, bool pinned);  // nullptr if the device has too little left
bool release(void *pointer);
void enter_block(void *pointer, Block block);  // memory that was reserved elsewhere
void forget_block(void *pointer);
bool find_block(const void *pointer, Block *found);
size_t used_memory(int device);
bool take_memory(size_t size);  // of the current device, without an address; false if too little is left
void give_memory(size_t size, int device);

// Copies values if they are few, so that what the host reads is right: sizes, indices, masks.
void copy_values(void *to, const void *from, size_t size);
void count_copy(void *to, const void *from, size_t size, bool asynchronous);
void set_values(void *to, int value, size_t size);

// ---- counters; by name while tracing
void count_launch(const std::string &kernel, long times = 1);
void count_product(const char *function, long m, long n, long k, const char *a, const char *b, const char *c,
                   const char *compute, bool accumulates, long batch);
// Also remembers it until a stream waits for it: collectives before products that were queued meanwhile are hidden.
void count_collective(const char *kind, int ranks, const char *type, size_t bytes, cudaStream_t stream);
extern thread_local cudaStream_t kernel_stream;  // of the last kernel that this thread launched
void record_event(cudaEvent_t event, cudaStream_t stream);
void wait_for_event(cudaStream_t stream, cudaEvent_t event);
void count_wait(const char *call);  // the host waits for the device: tells the callback
bool is_capturing();                // a CUDA graph is recorded by this thread

extern std::recursive_mutex mutex;
extern std::atomic<uintptr_t> next_handle;  // of streams, events, modules and functions

template <class Handle>
Handle new_handle() {
  return reinterpret_cast<Handle>(next_handle += 16);
}

[[noreturn]] void unanswered(const char *name);

}  // namespace stub
