#include "platform.h"

#include <sys/mman.h>
#include <unistd.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cerrno>
#include <cstring>
#include <new>

namespace hexad {

int64_t process_id() { return getpid(); }

ReadError::ReadError(int file, int reason)
    : std::runtime_error(reason == 0 ? "the file ends where a weight should be" : std::strerror(reason)),
      file(file),
      reason(reason) {}

void read_file(int file, int64_t start, size_t bytes, void* to) {
  auto* p = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t n = pread(file, p, bytes, start);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw ReadError(file, n < 0 ? errno : 0);
    p += n;
    start += n;
    bytes -= static_cast<size_t>(n);
  }
}

void* allocate_bytes(size_t bytes) {
  if (bytes == 0) bytes = 1;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  constexpr size_t kWorthHugePages = size_t{1} << 21;
  if (bytes >= kWorthHugePages) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

void trim_heap() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

void FreeMemory::operator()(void* p) const { munmap(p, bytes ? bytes : 1); }

}  // namespace hexad
