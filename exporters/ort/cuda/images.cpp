#include "images.h"

// Both files are the builder's (exporters/ort_build.py).
__asm__(
    ".pushsection .rodata\n"
    ".balign 16\n"
    "lte_cuda_images:\n"
    ".incbin \"images.bin\"\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char lte_cuda_images[];

namespace lte::cuda {

Images images() {
  static constexpr Image table[] = {
#include "images.inc"
  };
  return {table, table + sizeof table / sizeof *table};
}

const void* code(const Image& image) { return lte_cuda_images + image.offset; }

}  // namespace lte::cuda
