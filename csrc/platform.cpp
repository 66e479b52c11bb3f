#include "platform.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <new>

namespace hexad {

int64_t process_id() { return getpid(); }

int64_t now_ns() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
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

void FreeMemory::operator()(void* p) const { munmap(p, bytes ? bytes : 1); }

}  // namespace hexad
