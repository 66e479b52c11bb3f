#include "thread_team.h"

#include <algorithm>
#include <cfenv>
#include <stdexcept>
#include <string>
#include <utility>

namespace hexad {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // yield does nothing on most cores; this waits about as long as x86's pause
#endif
}

// How long members spin, in ns: for others at a barrier; for the next run, which comes after what Python does between
// two steps. Waking a thread takes some 50 µs.
constexpr int64_t kSpinAtBarriers = 50'000, kSpinBetweenRuns = 500'000;

// Returns once `word` is no longer `old`: spins for `spin` ns, calling `meanwhile` now and then, and on while
// `patient` says so, then sleeps.
template <class F, class G>
void wait_while(const std::atomic<uint32_t>& word, uint32_t old, int64_t spin, F&& meanwhile, G&& patient) {
  const int64_t begin = now_ns();
  int64_t now = begin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
    std::this_thread::yield();  // whoever is waited for may be queued on this very CPU
    now = now_ns();
    meanwhile(now);
  } while (now - begin < spin || patient(now - begin));
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

// ns of runs after which it is judged whether members stay out.
constexpr int64_t kWindow = 100'000'000;

}  // namespace

ThreadTeam::ThreadTeam(int size, std::vector<std::vector<int>> cpus) : size_(size), cpus_(std::move(cpus)) {
  if (size < 1 || size > static_cast<int>(kMostMembers))
    throw std::invalid_argument("a team has 1 to 1024 threads, not " + std::to_string(size));
  if (!cpus_.empty() && cpus_.size() != static_cast<size_t>(size))
    throw std::invalid_argument("CPUs of " + std::to_string(cpus_.size()) + " threads for a team of " +
                                std::to_string(size));
  start();
}

const std::vector<int>& ThreadTeam::cpus(int member) const {
  static const std::vector<int> kAny;
  return cpus_.empty() ? kAny : cpus_[static_cast<size_t>(member)];
}

void ThreadTeam::start() {
  for (Cursors& cursors : cursors_) cursors.reset(new Cursor[static_cast<size_t>(size_)]);
  counts_.reset(new Member[static_cast<size_t>(size_)]);
  arrived_ = 0;
  active_ = size_;
  settled_ = 5 * kWindow;
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
  post(size_);
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
  const OnCpus stay(cpus(0));
  const ShortTurns turns;
  counts_[0].thread.store(this_thread(), std::memory_order_relaxed);
  body_ = &body;
  for (int member = 0; member < active_; ++member) {
    counts_[member].barriers = 0;
    counts_[member].passed.store(0, std::memory_order_relaxed);
    for (Cursors& cursors : cursors_) cursors[member].taken.store(0, std::memory_order_relaxed);
  }
  judged_ = window_ >= kWindow;
  const int64_t begin = size_ > 1 ? now_ns() : 0;
  if (active_ > 1) post(active_);
  take_part(0);
  if (size_ > 1) adapt(now_ns() - begin);
  std::fesetenv(&callers);
}

void ThreadTeam::post(int active) {
  const uint32_t number = job_.load(std::memory_order_relaxed) / kMostMembers + 1;
  job_.store(number * kMostMembers + static_cast<uint32_t>(active - 1), std::memory_order_release);
  job_.notify_all();
}

void ThreadTeam::take_part(int member) {
  counts_[member].cpu.store(current_cpu(), std::memory_order_relaxed);
  (*body_)(member);
  if (judged_) counts_[member].queued = queued_ns();
  barrier(member);
}

void ThreadTeam::adapt(int64_t taken) {
  constexpr int64_t kShortest = 100'000'000, kLongest = 1'600'000'000;
  constexpr int kLasting = 2;
  window_ += taken;
  settled_ += taken;
  if (!judged_) return;
  int64_t queued = 0;
  for (int member = 0; member < active_; ++member) {
    Member& m = counts_[member];
    if (member > 0 || caller_ == std::this_thread::get_id()) queued += m.queued - m.judged;
    m.judged = m.queued;
  }
  caller_ = std::this_thread::get_id();
  // Whoever is queued, all wait: beyond this, that costs more than one member does. It may pass: it has to last, unless
  // more have just been tried, which was too early then.
  crowded_ = queued * active_ > window_ ? crowded_ + 1 : 0;
  const bool retried = settled_ < 5 * kWindow;
  int next = active_;
  if (active_ > 1 && crowded_ >= (retried ? 1 : kLasting)) {
    next = active_ - static_cast<int>(std::clamp<int64_t>(queued / window_, 1, active_ - 1));
    patience_ = retried ? std::clamp(2 * patience_, kShortest, kLongest) : kShortest;
  } else if (active_ < size_ && settled_ >= patience_) {
    next = active_ + (size_ - active_ + 1) / 2;
  }
  if (next != active_) settled_ = 0;
  active_ = next;
  window_ = 0;
}

void ThreadTeam::work(int member, uint32_t seen) {
  std::fesetenv(FE_DFL_ENV);
  const OnCpus stay(cpus(member));
  const ShortTurns turns;
  counts_[member].thread.store(this_thread(), std::memory_order_relaxed);
  for (;;) {
    wait_while(job_, seen, kSpinBetweenRuns, [](int64_t) {}, [](int64_t) { return false; });
    // Who stays out may miss jobs, but none that it takes part in: that one does not end without it.
    seen = job_.load(std::memory_order_acquire);
    if (stop_) return;
    if (member > static_cast<int>(seen % kMostMembers)) continue;
    take_part(member);
  }
}

void ThreadTeam::keep_apart(int member, int64_t now) {
  constexpr int64_t kPause = 10'000'000;
  Member& me = counts_[member];
  const int cpu = current_cpu();
  if (cpu < 0 || now - me.moved < kPause) return;
  bool shared = false;  // by two: one of them leaves
  for (int other = 0; other < member; ++other)
    shared = shared || counts_[other].cpu.load(std::memory_order_relaxed) == cpu;
  if (!shared) return;
  me.moved = now;
  std::vector<int> taken;
  for (int other = 0; other < active_; ++other)
    if (other != member) taken.push_back(counts_[other].cpu.load(std::memory_order_relaxed));
  me.moving.store(true, std::memory_order_relaxed);
  leave_cpus(taken);
  me.moving.store(false, std::memory_order_relaxed);
  me.cpu.store(current_cpu(), std::memory_order_relaxed);
}

bool ThreadTeam::is_late(int other, int member) const {
  return counts_[other].passed.load(std::memory_order_relaxed) < counts_[member].barriers;
}

ThreadTeam::Late ThreadTeam::find_late(int member) const {
  for (int i = 1; i < active_; ++i) {
    const int other = (member + i) % active_;
    if (is_late(other, member))
      return {other, on_cpu_ns(counts_[other].thread.load(std::memory_order_relaxed))};
  }
  return {};
}

bool ThreadTeam::bring(const Late& late, int member, int64_t waited) {
  constexpr int64_t kPatience = 2'000'000;
  if (late.member < 0 || late.on_cpu < 0 || !is_late(late.member, member)) return false;
  const Member& it = counts_[late.member];
  const ThreadNumbers thread = it.thread.load(std::memory_order_relaxed);
  if (on_cpu_ns(thread) != late.on_cpu) return false;
  if (waited < kPatience) return true;
  // Where it may go is not known while it moves itself.
  if (!it.moving.load(std::memory_order_relaxed)) bring_here(thread);
  return false;
}

void ThreadTeam::barrier(int member) {
  // The other parity's cursors were last used before the previous barrier: nobody reads them now.
  cursors_[parity(member) ^ 1][member].taken.store(0, std::memory_order_relaxed);
  counts_[member].passed.store(++counts_[member].barriers, std::memory_order_relaxed);
  if (active_ == 1) return;
  counts_[member].cpu.store(current_cpu(), std::memory_order_relaxed);
  const auto wait = [&](uint32_t before) {
    const int64_t begin = now_ns();
    Late late;
    wait_while(
        generation_, before, kSpinAtBarriers,
        [&](int64_t now) {
          keep_apart(member, now);
          if (late.member < 0 && now - begin > kSpinAtBarriers / 2) late = find_late(member);
        },
        [&](int64_t waited) { return bring(late, member, waited); });
  };
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(active_)) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  } else if (timed_) {
    const int64_t begin = now_ns();
    wait(generation);
    counts_[member].waited += now_ns() - begin;
  } else {
    wait(generation);
  }
}

}  // namespace hexad
