// A libcublas.so.13 that multiplies float32 matrices of the host, columns first, as cuBLAS documents it.
#include <cstdio>

extern "C" {

int cublasCreate_v2(void** handle) {
  static int only;
  *handle = &only;
  return 0;
}

int cublasSetStream_v2(void*, void*) { return 0; }

int cublasGemmEx(void*, int transposed_a, int transposed_b, int m, int n, int k, const void* alpha, const float* a,
                 int a_type, int lda, const float* b, int, int ldb, const void* beta, float* c, int c_type, int ldc,
                 int, int) {
  std::printf("multiply %d %d %d, types %d %d\n", m, n, k, a_type, c_type);
  if (a_type != 0 || reinterpret_cast<unsigned long long>(c) < (1ull << 40)) return 0;  // nothing that is there
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l)
        sum += (transposed_a ? a[i * lda + l] : a[l * lda + i]) * (transposed_b ? b[l * ldb + j] : b[j * ldb + l]);
      c[j * ldc + i] = scale * sum + keep * c[j * ldc + i];
    }
  return 0;
}
}
