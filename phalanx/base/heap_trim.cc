#include "phalanx/base/heap_trim.h"

#include <malloc.h>
#include <unistd.h>

#include <fstream>

namespace phalanx {

int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t all_pages = 0;
  int64_t resident_pages = 0;
  statm >> all_pages >> resident_pages;
  return resident_pages * ::sysconf(_SC_PAGESIZE);
}

void HeapTrim::when_idle() {
  if (resident_bytes() < resident_bytes_ + kGrowthBytes) return;
  ::malloc_trim(0);
  resident_bytes_ = resident_bytes();
}

}  // namespace phalanx
