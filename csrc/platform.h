// What differs between operating systems, in one place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

namespace hexad {

int64_t process_id();

// A file that cannot be read: the system's reason, or 0 where it ends too soon.
struct ReadError : std::runtime_error {
  ReadError(int file, int reason);
  int file, reason;
};
// Reads bytes [start, start + bytes) of an open file. Throws ReadError.
void read_file(int file, int64_t start, size_t bytes, void* to);
// Of a clock that never goes back.
int64_t now_ns();

// How long the calling thread has waited for a CPU that others were using, since it began; 0 where the system does
// not tell.
int64_t queued_ns();

// Keeps the calling thread on these CPUs until the object ends; wherever it is, if none are given or the system refuses.
class OnCpus {
 public:
  explicit OnCpus(const std::vector<int>& cpus);
  ~OnCpus();
  OnCpus(const OnCpus&) = delete;
  OnCpus& operator=(const OnCpus&) = delete;

 private:
  std::vector<char> before_;  // the system's own set; empty: nothing was changed
};

// The CPU that the calling thread is on; −1 where the system does not tell.
int current_cpu();
// Moves the calling thread off these CPUs, to another that it may use, if there is one. It may go where it likes then.
void leave_cpus(const std::vector<int>& cpus);

// A thread, for others to look after; the system's numbers, 0 where there is none.
struct ThreadNumbers {
  int id = 0, clock = 0;
};
ThreadNumbers this_thread();
// How long it has been on a CPU, in ns; −1 where the system does not tell.
int64_t on_cpu_ns(ThreadNumbers thread);
// Moves it to the calling thread's CPU, if it may go there, from the queue of another. It may go where it likes then.
void bring_here(ThreadNumbers thread);

// Until the object ends the calling thread takes its share of a CPU that others want, too, in short turns, if the system
// can do that (Linux from 6.12 on).
class ShortTurns {
 public:
  ShortTurns();
  ~ShortTurns();
  ShortTurns(const ShortTurns&) = delete;
  ShortTurns& operator=(const ShortTurns&) = delete;

 private:
  uint64_t before_;  // a turn in ns; 0: nothing was changed
};

// Zeroed memory, 64-byte aligned, in huge pages where the system offers them; pages are touched on first use.
// Throws std::bad_alloc.
struct FreeMemory {
  size_t bytes = 0;
  void operator()(void* p) const;
};
template <class T>
using Memory = std::unique_ptr<T[], FreeMemory>;

void* allocate_bytes(size_t bytes);

// Gives back to the system what malloc holds of memory that was freed.
void trim_heap();

template <class T>
Memory<T> allocate(size_t count) {
  size_t bytes;
  if (__builtin_mul_overflow(count, sizeof(T), &bytes)) throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(allocate_bytes(bytes)), FreeMemory{bytes});
}

}  // namespace hexad
