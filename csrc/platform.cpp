#include "platform.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
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

int64_t now_ns() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

OnCpus::OnCpus(const std::vector<int>& cpus) {
#ifdef __linux__
  if (cpus.empty()) return;
  cpu_set_t before, wanted;
  CPU_ZERO(&wanted);
  for (int cpu : cpus)
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &wanted);
  if (sched_getaffinity(0, sizeof before, &before) != 0) return;
  if (sched_setaffinity(0, sizeof wanted, &wanted) != 0) return;
  before_.assign(reinterpret_cast<char*>(&before), reinterpret_cast<char*>(&before + 1));
#else
  (void)cpus;
#endif
}

OnCpus::~OnCpus() {
#ifdef __linux__
  if (before_.empty()) return;
  cpu_set_t before;
  std::memcpy(&before, before_.data(), sizeof before);
  sched_setaffinity(0, sizeof before, &before);
#endif
}

int current_cpu() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

void leave_cpus(const std::vector<int>& cpus) {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  std::vector<int> others;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && std::find(cpus.begin(), cpus.end(), cpu) == cpus.end())
      others.push_back(cpu);
  const OnCpus moved(others);
#else
  (void)cpus;
#endif
}

ThreadNumbers this_thread() {
#ifdef __linux__
  clockid_t clock;
  if (pthread_getcpuclockid(pthread_self(), &clock) == 0)
    return {static_cast<int>(syscall(SYS_gettid)), clock};
#endif
  return {};
}

int64_t on_cpu_ns(ThreadNumbers thread) {
#ifdef __linux__
  timespec time;
  if (thread.id > 0 && clock_gettime(thread.clock, &time) == 0)
    return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
#else
  (void)thread;
#endif
  return -1;
}

void bring_here(ThreadNumbers thread) {
#ifdef __linux__
  cpu_set_t allowed, here;
  const int cpu = sched_getcpu();
  if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(thread.id, sizeof allowed, &allowed) != 0) return;
  if (!CPU_ISSET(cpu, &allowed)) return;
  CPU_ZERO(&here);
  CPU_SET(cpu, &here);
  if (sched_setaffinity(thread.id, sizeof here, &here) == 0)
    sched_setaffinity(thread.id, sizeof allowed, &allowed);
#else
  (void)thread;
#endif
}

namespace {

// Sets how long a turn of the calling thread is, in ns. Returns what it was, or 0 if nothing was changed.
uint64_t set_turn(uint64_t ns) {
#ifdef __linux__
  struct {  // the system's struct sched_attr in its first version
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes = {};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return 0;
  if (attributes.policy != SCHED_OTHER) return 0;
  const uint64_t before = attributes.runtime;
  attributes.runtime = ns;
  return syscall(SYS_sched_setattr, 0, &attributes, 0) == 0 ? before : 0;
#else
  (void)ns;
  return 0;
#endif
}

}  // namespace

ShortTurns::ShortTurns() : before_(set_turn(100'000)) {}  // the shortest there are

ShortTurns::~ShortTurns() {
  if (before_ > 0) set_turn(before_);
}

namespace {

struct File {
  int number = -1;
  int64_t process = 0;
  ~File() { reset(); }
  void reset() {
    if (number >= 0) close(number);
    number = -1;
  }
};

}  // namespace

int64_t queued_ns() {
  // Linux: time on a CPU, time waiting for one, number of turns.
  thread_local File file;
  if (file.process != process_id()) {  // the first time, and in a forked child
    file.reset();
    file.number = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    file.process = process_id();
  }
  char text[64];
  const ssize_t length = file.number < 0 ? 0 : pread(file.number, text, sizeof text - 1, 0);
  if (length <= 0) return 0;
  text[length] = 0;
  const char* second = std::strchr(text, ' ');
  return second == nullptr ? 0 : std::strtoll(second, nullptr, 10);
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
