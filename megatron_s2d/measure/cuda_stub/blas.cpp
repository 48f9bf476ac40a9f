// cuBLAS and cuBLASLt: every product is recorded with its sizes (m, n, k of the column-major call) and types.
#include "stub.h"

#include <cublasLt.h>
#include <cublas_v2.h>

#include <dlfcn.h>
#include <link.h>

#include <cstring>

#define ANSWER(name, parameters) EXPORTED cublasStatus_t name parameters
#define SUCCEED(name, parameters) \
  EXPORTED cublasStatus_t name parameters { return CUBLAS_STATUS_SUCCESS; }

using namespace stub;

static const char *name_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F: return "f64";
    case CUDA_R_32F: return "f32";
    case CUDA_R_16F: return "f16";
    case CUDA_R_16BF: return "bf16";
    case CUDA_R_8F_E4M3: return "e4m3";
    case CUDA_R_8F_E5M2: return "e5m2";
    case CUDA_R_8I: return "i8";
    case CUDA_R_32I: return "i32";
    default: return "other";
  }
}
static const char *name_of(cublasComputeType_t type) {
  switch (type) {
    case CUBLAS_COMPUTE_16F: return "f16";
    case CUBLAS_COMPUTE_32F: return "f32";
    case CUBLAS_COMPUTE_32F_PEDANTIC: return "f32 pedantic";
    case CUBLAS_COMPUTE_32F_FAST_TF32: return "tf32";
    case CUBLAS_COMPUTE_32F_FAST_16F: return "f32 by f16";
    case CUBLAS_COMPUTE_32F_FAST_16BF: return "f32 by bf16";
    case CUBLAS_COMPUTE_64F: return "f64";
    default: return "other";
  }
}

static thread_local cublasMath_t math_mode = CUBLAS_DEFAULT_MATH;
static thread_local cublasPointerMode_t pointer_mode = CUBLAS_POINTER_MODE_HOST;

static const char *single_precision() { return math_mode == CUBLAS_TF32_TENSOR_OP_MATH ? "tf32" : "f32"; }

// The scalar beta: a result that is added to what is there already.
template <class Scalar>
static bool accumulates(const Scalar *beta) {
  return pointer_mode == CUBLAS_POINTER_MODE_HOST && beta != nullptr && *beta != Scalar(0);
}
static bool accumulates(const void *beta, cublasComputeType_t compute) {
  return compute == CUBLAS_COMPUTE_64F ? accumulates(static_cast<const double *>(beta))
                                       : accumulates(static_cast<const float *>(beta));
}

// -------------------------------------------------------------------------------- handles and modes

ANSWER(cublasCreate_v2, (cublasHandle_t *handle)) { *handle = new_handle<cublasHandle_t>(); return CUBLAS_STATUS_SUCCESS; }
SUCCEED(cublasDestroy_v2, (cublasHandle_t))
SUCCEED(cublasSetStream_v2, (cublasHandle_t, cudaStream_t))
SUCCEED(cublasSetWorkspace_v2, (cublasHandle_t, void *, size_t))
ANSWER(cublasSetMathMode, (cublasHandle_t, cublasMath_t mode)) { math_mode = mode; return CUBLAS_STATUS_SUCCESS; }
ANSWER(cublasGetMathMode, (cublasHandle_t, cublasMath_t *mode)) { *mode = math_mode; return CUBLAS_STATUS_SUCCESS; }
ANSWER(cublasSetPointerMode_v2, (cublasHandle_t, cublasPointerMode_t mode)) {
  pointer_mode = mode;
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasGetPointerMode_v2, (cublasHandle_t, cublasPointerMode_t *mode)) {
  *mode = pointer_mode;
  return CUBLAS_STATUS_SUCCESS;
}

// -------------------------------------------------------------------------------- products

ANSWER(cublasGemmEx, (cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void *,
                      const void *, cudaDataType a, int, const void *, cudaDataType b, int, const void *beta, void *,
                      cudaDataType c, int, cublasComputeType_t compute, cublasGemmAlgo_t)) {
  count_product("GemmEx", m, n, k, name_of(a), name_of(b), name_of(c), name_of(compute), accumulates(beta, compute), 1);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasGemmStridedBatchedEx,
       (cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void *, const void *,
        cudaDataType a, int, long long, const void *, cudaDataType b, int, long long, const void *beta, void *,
        cudaDataType c, int, long long, int batch, cublasComputeType_t compute, cublasGemmAlgo_t)) {
  count_product("GemmStridedBatchedEx", m, n, k, name_of(a), name_of(b), name_of(c), name_of(compute),
                accumulates(beta, compute), batch);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasSgemm_v2, (cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const float *,
                        const float *, int, const float *, int, const float *beta, float *, int)) {
  count_product("Sgemm", m, n, k, "f32", "f32", "f32", single_precision(), accumulates(beta), 1);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasSgemmStridedBatched,
       (cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const float *, const float *, int,
        long long, const float *, int, long long, const float *beta, float *, int, long long, int batch)) {
  count_product("SgemmStridedBatched", m, n, k, "f32", "f32", "f32", single_precision(), accumulates(beta), batch);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasDgemm_v2, (cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const double *,
                        const double *, int, const double *, int, const double *beta, double *, int)) {
  count_product("Dgemm", m, n, k, "f64", "f64", "f64", "f64", accumulates(beta), 1);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasSgemv_v2, (cublasHandle_t, cublasOperation_t, int m, int n, const float *, const float *, int,
                        const float *, int, const float *beta, float *, int)) {
  count_product("Sgemv", m, 1, n, "f32", "f32", "f32", "f32", accumulates(beta), 1);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasSdot_v2, (cublasHandle_t, int n, const float *, int, const float *, int, float *)) {
  count_product("Sdot", 1, 1, n, "f32", "f32", "f32", "f32", false, 1);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasDotEx, (cublasHandle_t, int n, const void *, cudaDataType a, int, const void *, cudaDataType b, int,
                     void *, cudaDataType c, cudaDataType compute)) {
  count_product("DotEx", 1, 1, n, name_of(a), name_of(b), name_of(c), name_of(compute), false, 1);
  return CUBLAS_STATUS_SUCCESS;
}

// -------------------------------------------------------------------------------- cuBLASLt
// Descriptors are made by the real library, which needs no GPU for them; it is loaded after the stub.

static int open_cublas_lt(struct dl_phdr_info *library, size_t, void *found) {
  if (strstr(library->dlpi_name, "libcublasLt.so") == nullptr) return 0;
  *static_cast<void **>(found) = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  return 1;
}

// The real library's function: other libraries may have loaded it without making its names global.
static void *function_of_cublas_lt(const char *name) {
  static void *library = [] {
    void *found = nullptr;
    dl_iterate_phdr(open_cublas_lt, &found);
    return found;
  }();
  return dlsym(library == nullptr ? RTLD_DEFAULT : library, name);
}

template <class Value, class Object, class Attribute>
static Value attribute(const char *getter, Object object, Attribute name) {
  using Getter = cublasStatus_t (*)(Object, Attribute, void *, size_t, size_t *);
  auto get = reinterpret_cast<Getter>(function_of_cublas_lt(getter));
  if (get == nullptr) unanswered(getter);
  Value value{};
  size_t written = 0;
  if (object != nullptr) get(object, name, &value, sizeof value, &written);
  return value;
}

EXPORTED size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
ANSWER(cublasLtCreate, (cublasLtHandle_t *handle)) {
  *handle = new_handle<cublasLtHandle_t>();
  return CUBLAS_STATUS_SUCCESS;
}
SUCCEED(cublasLtDestroy, (cublasLtHandle_t))
ANSWER(cublasLtMatmulAlgoGetHeuristic,
       (cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t results[],
        int *count)) {
  memset(results, 0, sizeof results[0]);
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasLtMatmul, (cublasLtHandle_t, cublasLtMatmulDesc_t description, const void *, const void *,
                        cublasLtMatrixLayout_t a, const void *, cublasLtMatrixLayout_t b, const void *beta,
                        const void *, cublasLtMatrixLayout_t, void *, cublasLtMatrixLayout_t d,
                        const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t)) {
  auto layout = "cublasLtMatrixLayoutGetAttribute", product = "cublasLtMatmulDescGetAttribute";
  auto type = [&](cublasLtMatrixLayout_t matrix) {
    return name_of(static_cast<cudaDataType>(attribute<uint32_t>(layout, matrix, CUBLASLT_MATRIX_LAYOUT_TYPE)));
  };
  auto compute = static_cast<cublasComputeType_t>(
      attribute<int32_t>(product, description, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE));
  auto transposed = attribute<int32_t>(product, description, CUBLASLT_MATMUL_DESC_TRANSA);
  auto inner = transposed == CUBLAS_OP_N ? CUBLASLT_MATRIX_LAYOUT_COLS : CUBLASLT_MATRIX_LAYOUT_ROWS;
  int batch = attribute<int32_t>(layout, d, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
  count_product("LtMatmul", attribute<uint64_t>(layout, d, CUBLASLT_MATRIX_LAYOUT_ROWS),
                attribute<uint64_t>(layout, d, CUBLASLT_MATRIX_LAYOUT_COLS), attribute<uint64_t>(layout, a, inner),
                type(a), type(b), type(d), name_of(compute), accumulates(beta, compute), batch > 0 ? batch : 1);
  return CUBLAS_STATUS_SUCCESS;
}
