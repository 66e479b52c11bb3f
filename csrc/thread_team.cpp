#include "thread_team.h"

#include <cfenv>
#include <chrono>
#include <stdexcept>
#include <string>

#include "platform.h"

namespace hexad {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // yield does nothing on most cores; this waits about as long as x86's pause
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
    std::this_thread::yield();  // whoever is waited for may be queued on this very CPU
  } while (Clock::now() - begin < kSpin);
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadTeam::ThreadTeam(int size) : size_(size) {
  if (size < 1 || size > 1024)
    throw std::invalid_argument("a team has 1 to 1024 threads, not " + std::to_string(size));
  start();
}

void ThreadTeam::start() {
  for (Cursors& cursors : cursors_) cursors.reset(new Cursor[static_cast<size_t>(size_)]);
  counts_.reset(new OwnCount[static_cast<size_t>(size_)]);
  arrived_ = 0;
  const uint32_t seen = job_.load();
  try {
    for (int member = 1; member < size_; ++member)
      threads_.emplace_back([this, member, seen] { work(member, seen); });
  } catch (...) {
    stop();
    throw;
  }
  process_ = process_id();
}

void ThreadTeam::stop() {
  stop_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  stop_ = false;
}

namespace {

// Handles of threads that stayed behind in a forked child's parent can be neither joined nor destroyed here.
void let_go(std::vector<std::thread>& threads) {
  for (std::thread& thread : threads) new std::thread(std::move(thread));
  threads.clear();
}

}  // namespace

ThreadTeam::~ThreadTeam() {
  if (process_ == process_id())
    stop();
  else
    let_go(threads_);
}

void ThreadTeam::run(const std::function<void(int)>& body) {
  std::lock_guard<std::mutex> lock(run_mutex_);
  if (process_ != process_id()) {
    let_go(threads_);
    start();
  }
  std::fenv_t callers;
  std::fegetenv(&callers);
  std::fesetenv(FE_DFL_ENV);
  body_ = &body;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  body(0);
  barrier(0);
  std::fesetenv(&callers);
}

void ThreadTeam::work(int member, uint32_t seen) {
  std::fesetenv(FE_DFL_ENV);
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
  } else if (timed_) {
    const int64_t begin = now_ns();
    wait_while(generation_, generation);
    counts_[member].waited += now_ns() - begin;
  } else {
    wait_while(generation_, generation);
  }
}

}  // namespace hexad
