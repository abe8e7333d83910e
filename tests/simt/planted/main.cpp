// `planted NAME [mended]` runs one of planted.h; status 3 and a message where simt has found a fault, 4 where the
// launch has failed or its result is wrong. A sanitizer that finds one ends the process itself.
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <string>

#include "planted.h"

int main(int count, char** words) {
  using namespace granet::cuda::planted;
  const std::map<std::string, Launcher> launchers = {
      {"unguarded_sum", unguarded_sum},
      {"missing_barrier", missing_barrier},
      {"reused_too_early", reused_too_early},
      {"missing_fence", missing_fence},
      {"plain_counter", plain_counter},
      {"warp_without_barrier", warp_without_barrier},
      {"behind_the_end", behind_the_end},
      {"before_the_start", before_the_start},
      {"behind_shared_memory", behind_shared_memory},
      {"unaligned_vector", unaligned_vector},
      {"divergent_barrier", divergent_barrier},
      {"ended_before_barrier", ended_before_barrier},
      {"two_barriers", two_barriers},
      {"divergent_shuffle", divergent_shuffle},
      {"shuffle_outside_mask", shuffle_outside_mask},
      {"uninitialised_shared_memory", uninitialised_shared_memory},
      {"too_much_shared_memory", too_much_shared_memory},
  };
  const auto found = count > 1 ? launchers.find(words[1]) : launchers.end();
  if (found == launchers.end()) return 2;
  try {
    return found->second(count > 2 && std::strcmp(words[2], "mended") == 0) == cudaSuccess ? 0 : 4;
  } catch (const std::exception& fault) {
    std::puts(fault.what());
    return 3;
  }
}
