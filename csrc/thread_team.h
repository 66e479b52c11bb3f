// The only owner of threads: a team that runs one function on every member, with loops and barriers inside
// it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "platform.h"

namespace hexad {

// The caller is member 0. Waiting members spin for at most 50 µs, or 500 for the next run, and then sleep. All compute
// with the default floating-point environment (no flush to zero), whatever the caller's is. After a fork the child builds
// its own members at the next run; a fork while another thread is inside `run` is not supported.
//
// A member that waits for a CPU holds up all others at every barrier. So members take short turns where they share a CPU
// with other programs, those that find themselves on the same CPU part, and one that gets no turn at all is brought to
// the CPU of another that waits for it. Where other programs take CPUs away for long, the last members stay out of the
// next runs for a while; the others do their share.
class ThreadTeam {
 public:
  // cpus: for each member those that it stays on during runs; empty: all are left to the system.
  // Throws std::invalid_argument unless 1 ≤ size ≤ 1024 and `cpus` is empty or as long, std::system_error where threads
  // cannot be had.
  explicit ThreadTeam(int size, std::vector<std::vector<int>> cpus = {});
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return size_; }

  // Runs body(member) on every member that takes part, the first ones, and returns when all have; runs are serialised.
  // `body` must not throw.
  void run(const std::function<void(int)>& body);

  // Inside run, called by every member with the same n: calls body(i) once for each i in [0, n), then meets
  // at a barrier. Members start on contiguous shares, so memory is walked in order, and take from others'
  // shares once their own is done; who does what never changes a result.
  template <class F>
  void loop(int member, int64_t n, F&& body) {
    Cursors& cursors = cursors_[parity(member)];
    const int size = active_;
    for (int i = 0; i < size; ++i) {
      const int victim = member + i < size ? member + i : member + i - size;
      const int64_t begin = n * victim / size, end = n * (victim + 1) / size;
      if (begin == end) continue;
      for (int64_t k; (k = begin + cursors[victim].taken.fetch_add(1, std::memory_order_relaxed)) < end;)
        body(k);
    }
    barrier(member);
  }

  // Inside run: waits for all members that take part.
  void barrier(int member);

  // Between runs: whether waiting is timed from now on.
  void time_waiting(bool timed) { timed_ = timed; }
  // What a member has done so far; inside run for members themselves.
  struct Count {
    int64_t barriers = 0;            // of the run
    int64_t waited = 0, queued = 0;  // ns at barriers, while that was timed; ns for a CPU, as last judged
  };
  const Count& count(int member) const { return counts_[member]; }

 private:
  struct alignas(64) Cursor {
    std::atomic<int64_t> taken{0};
  };
  using Cursors = std::unique_ptr<Cursor[]>;
  struct alignas(64) Member : Count {
    int64_t judged = 0;               // `queued` as of the time before
    int64_t moved = 0;                // when it last left a CPU that another member used, too
    std::atomic<int> cpu{-1};         // as it began, or at its last barrier
    std::atomic<int64_t> passed{0};   // barriers of the run that it has come to
    std::atomic<bool> moving{false};  // from one CPU to another, by itself
    std::atomic<ThreadNumbers> thread{ThreadNumbers{}};
  };
  static constexpr uint32_t kMostMembers = 1024;

  // Picks the cursors in use.
  int parity(int member) const { return counts_[member].barriers & 1; }
  const std::vector<int>& cpus(int member) const;
  void start();
  void stop();
  void post(int active);
  void work(int member, uint32_t seen);
  void take_part(int member);
  void adapt(int64_t taken);
  // While waiting: leaves a CPU that another member is on. The system puts two on one at times, and takes its time to
  // part them.
  void keep_apart(int member, int64_t now);
  // While waiting: a member that others wait for, and how long it had been on a CPU when that was noticed.
  struct Late {
    int member = -1;
    int64_t on_cpu = 0;
  };
  bool is_late(int other, int member) const;
  Late find_late(int member) const;
  // Brings a late member that has not been on a CPU for long to this one, which has nothing to do. Whether that may yet
  // come.
  bool bring(const Late& late, int member, int64_t waited);

  const int size_;
  const std::vector<std::vector<int>> cpus_;  // [size_]
  std::vector<std::thread> threads_;
  std::mutex run_mutex_;
  int64_t process_ = 0;
  std::atomic<bool> stop_{false};
  bool timed_ = false;
  const std::function<void(int)>* body_ = nullptr;
  int active_ = 0;  // members that take part
  // What `adapt` goes by: whether it decides after this run; ns of runs since it did and since the number of members was
  // changed; how long it stays down once it was lowered; times in a row that there were too many; who called the last run
  // it judged.
  bool judged_ = false;
  int64_t window_ = 0, settled_ = 0, patience_ = 0;
  int crowded_ = 0;
  std::thread::id caller_;
  Cursors cursors_[2];
  std::unique_ptr<Member[]> counts_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> job_{0};  // number · kMostMembers + the last member that takes part
};

}  // namespace hexad
