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
  struct alignas(64) Share {
    int64_t macs = 0, sink = 0;
  };
  std::vector<Share> shares(static_cast<size_t>(threads));
  constexpr double kRound = 0.01;  // seconds: long against waking a thread
  double best = 0;
  for (int round = 0; round < 4; ++round) {
    for (Share& share : shares) share.macs = 0;
    const auto begin = Clock::now();
    team.run([&](int member) {
      Share& share = shares[static_cast<size_t>(member)];
      while (seconds_since(begin) < kRound) share.macs += kernels.dot_rate(2000, &share.sink);
    });
    const double seconds = seconds_since(begin);
    int64_t macs = 0;
    for (const Share& share : shares) macs += share.macs;
    best = std::max(best, static_cast<double>(macs) / seconds);
  }
  return best;
}

}  // namespace hexad
