#include "phalanx/base/heap_trim.h"

#include <malloc.h>
#include <unistd.h>

#include <fstream>

namespace phalanx {

int64_t own_resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t all_pages = 0;
  int64_t resident_pages = 0;
  int64_t shared_pages = 0;
  statm >> all_pages >> resident_pages >> shared_pages;
  return (resident_pages - shared_pages) * ::sysconf(_SC_PAGESIZE);
}

void HeapTrim::when_idle() {
  if (own_resident_bytes() < own_bytes_ + kGrowthBytes) return;
  ::malloc_trim(0);
  own_bytes_ = own_resident_bytes();
}

}  // namespace phalanx
