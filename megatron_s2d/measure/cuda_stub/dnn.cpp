// cuDNN's graphs, of which attention is made. A descriptor keeps the attributes that are set; every graph has one
// engine, which needs no workspace of its own. What the library above asks for itself (cuDNN's frontend: the float32
// accumulators of a backward pass) is allocated as on a GPU. A plan that is executed is one launch; one that is built is
// counted like one, because it keeps the host busy for about half a second.
#include "stub.h"

#include <cudnn_graph.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#define ANSWER(name, parameters) EXPORTED cudnnStatus_t name parameters

using namespace stub;

namespace {

struct Value {
  int64_t count = 0;
  std::vector<char> bytes;
};
struct Descriptor {
  cudnnBackendDescriptorType_t type;
  std::map<int, Value> attributes;
};

Descriptor *of(cudnnBackendDescriptor_t handle) { return static_cast<Descriptor *>(handle); }

size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_BOOLEAN: return sizeof(bool);
    case CUDNN_TYPE_CHAR: return sizeof(char);
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
    case CUDNN_TYPE_FRACTION: return 2 * sizeof(int64_t);
    default: return sizeof(int);  // enumerations and float
  }
}

// What cuDNN would compute when a descriptor is finalized. Lists (notes, knobs) are empty, sizes 0.
enum Computed { kRefused, kEmptyList, kZero, kOne, kOneDescriptor };
Computed computed(int name) {
  switch (name) {
    case CUDNN_ATTR_ENGINE_KNOB_INFO:
    case CUDNN_ATTR_ENGINE_NUMERICAL_NOTE:
    case CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE:
    case CUDNN_ATTR_ENGINECFG_INTERMEDIATE_INFO:
    case CUDNN_ATTR_ENGINECFG_KNOB_CHOICES: return kEmptyList;
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE: return kZero;
    case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT: return kOne;
    case CUDNN_ATTR_ENGINEHEUR_RESULTS:
    case CUDNN_ATTR_ENGINECFG_ENGINE: return kOneDescriptor;  // the caller has made it
    default: return kRefused;
  }
}

}  // namespace

// -------------------------------------------------------------------------------- handles

static std::map<cudnnHandle_t, cudaStream_t> &streams() {
  static auto *map = new std::map<cudnnHandle_t, cudaStream_t>;
  return *map;
}
ANSWER(cudnnCreate, (cudnnHandle_t *handle)) { *handle = new_handle<cudnnHandle_t>(); return CUDNN_STATUS_SUCCESS; }
ANSWER(cudnnDestroy, (cudnnHandle_t)) { return CUDNN_STATUS_SUCCESS; }
ANSWER(cudnnSetStream, (cudnnHandle_t handle, cudaStream_t stream)) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  streams()[handle] = stream;
  return CUDNN_STATUS_SUCCESS;
}
ANSWER(cudnnGetStream, (cudnnHandle_t handle, cudaStream_t *stream)) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  *stream = streams()[handle];
  return CUDNN_STATUS_SUCCESS;
}

// -------------------------------------------------------------------------------- descriptors

ANSWER(cudnnBackendCreateDescriptor, (cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor)) {
  *descriptor = new Descriptor{type, {}};
  return CUDNN_STATUS_SUCCESS;
}
ANSWER(cudnnBackendDestroyDescriptor, (cudnnBackendDescriptor_t descriptor)) {
  delete of(descriptor);
  return CUDNN_STATUS_SUCCESS;
}
ANSWER(cudnnBackendFinalize, (cudnnBackendDescriptor_t descriptor)) {
  if (of(descriptor)->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) count_launch("cuDNN plan built");
  return CUDNN_STATUS_SUCCESS;
}
ANSWER(cudnnBackendSetAttribute, (cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                  cudnnBackendAttributeType_t type, int64_t count, const void *elements)) {
  auto begin = static_cast<const char *>(elements);
  of(descriptor)->attributes[name] = {count, std::vector<char>(begin, begin + count * size_of(type))};
  return CUDNN_STATUS_SUCCESS;
}
ANSWER(cudnnBackendGetAttribute, (cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                  cudnnBackendAttributeType_t type, int64_t requested, int64_t *count,
                                  void *elements)) {
  auto kind = computed(name);
  auto known = of(descriptor)->attributes.find(name);
  bool is_known = known != of(descriptor)->attributes.end();
  if (!is_known && kind == kRefused) unanswered(("attribute " + std::to_string(name) + " of cuDNN").c_str());
  int64_t available = is_known ? known->second.count : kind == kEmptyList ? 0 : 1;
  if (count != nullptr) *count = available;
  if (elements == nullptr || type == CUDNN_TYPE_BACKEND_DESCRIPTOR) return CUDNN_STATUS_SUCCESS;
  if (is_known) {
    memcpy(elements, known->second.bytes.data(), std::min(requested, available) * size_of(type));
  } else if (requested > 0 && (kind == kZero || kind == kOne)) {
    *static_cast<int64_t *>(elements) = kind == kOne;
  }
  return CUDNN_STATUS_SUCCESS;
}
ANSWER(cudnnBackendExecute, (cudnnHandle_t, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t)) {
  count_launch("cuDNN plan");
  return CUDNN_STATUS_SUCCESS;
}
