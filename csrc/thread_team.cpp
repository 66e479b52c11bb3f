#include "thread_team.h"

#include <chrono>

#include "platform.h"

namespace hexad {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `word` is no longer `old`: spins, then sleeps.
void wait_while(const std::atomic<uint32_t>& word, uint32_t old) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kSpin = std::chrono::microseconds(50);
  const auto begin = Clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (Clock::now() - begin < kSpin);
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadTeam::ThreadTeam(int size) : size_(size) { start(); }

void ThreadTeam::start() {
  for (Cursors& cursors : cursors_) cursors.reset(new Cursor[static_cast<size_t>(size_)]);
  counts_.reset(new Count[static_cast<size_t>(size_)]);
  arrived_ = 0;
  process_ = process_id();
  const uint32_t seen = job_.load();
  for (int member = 1; member < size_; ++member)
    threads_.emplace_back([this, member, seen] { work(member, seen); });
}

ThreadTeam::~ThreadTeam() {
  if (process_ != process_id()) {  // a forked child: the members stayed behind in the parent
    for (std::thread& thread : threads_) new std::thread(std::move(thread));
    return;
  }
  stop_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadTeam::run(const std::function<void(int)>& body) {
  std::lock_guard<std::mutex> lock(run_mutex_);
  if (process_ != process_id()) {
    // Handles of threads that do not exist here can be neither joined nor destroyed; let them go.
    for (std::thread& thread : threads_) new std::thread(std::move(thread));
    threads_.clear();
    start();
  }
  body_ = &body;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  body(0);
  barrier(0);
}

void ThreadTeam::work(int member, uint32_t seen) {
  for (;;) {
    wait_while(job_, seen);
    ++seen;
    if (stop_) return;
    (*body_)(member);
    barrier(member);
  }
}

void ThreadTeam::barrier(int member) {
  // The other parity's cursors were last used before the previous barrier: nobody reads them now.
  cursors_[parity(member) ^ 1][member].taken.store(0, std::memory_order_relaxed);
  ++counts_[member].barriers;
  if (size_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_while(generation_, generation);
  }
}

}  // namespace hexad
