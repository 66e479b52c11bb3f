#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "platform.h"
#include "thread_team.h"

namespace hexad {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

double probe_bandwidth(const Kernels& kernels, int threads) {
  constexpr int64_t kBytes = int64_t{256} << 20, kChunk = int64_t{1} << 16;
  const Memory<char> data = allocate<char>(static_cast<size_t>(kBytes));
  ThreadTeam team(threads);
  std::vector<int64_t> sinks(static_cast<size_t>(threads) * 8);
  double best = 0;
  for (int round = 0; round < 5; ++round) {  // the first makes every page a page of its own
    const auto begin = Clock::now();
    team.run([&](int member) {
      team.loop(member, kBytes / kChunk, [&](int64_t chunk) {
        char* at = data.get() + chunk * kChunk;
        if (round == 0)
          std::memset(at, 1, kChunk);
        else
          sinks[static_cast<size_t>(member) * 8] += kernels.read(at, kChunk);
      });
    });
    if (round > 0) best = std::max(best, static_cast<double>(kBytes) / seconds_since(begin));
  }
  return best;
}

double probe_int8(const Kernels& kernels, int threads) {
  ThreadTeam team(threads);
  std::vector<int64_t> sinks(static_cast<size_t>(threads) * 8);
  constexpr int64_t kIterations = 400'000;
  double best = 0;
  for (int round = 0; round < 4; ++round) {
    const auto begin = Clock::now();
    int64_t macs = 0;
    team.run([&](int member) {
      const int64_t done = kernels.dot_rate(kIterations, &sinks[static_cast<size_t>(member) * 8]);
      if (member == 0) macs = done;
    });
    best = std::max(best, static_cast<double>(macs) * threads / seconds_since(begin));
  }
  return best;
}

}  // namespace hexad
