#include "apps/bench_collectives.h"

#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <thread>

#include "apps/bench_collectives_floor.h"
#include "apps/bench_collectives_network.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/net/tls_material.h"

using phalanx::Code;
using phalanx::Deadline;
using phalanx::Error;
using phalanx::now_ns;
using phalanx::UniqueFd;
using namespace phalanx::comm;

namespace {

constexpr int kMaxRanks = 16;

struct Settings {
  int ranks = 2;
  int rounds = 9;
  std::vector<int64_t> sizes;
  std::vector<std::string> transports;
  bool cut = true;
  bool ucx = false;
  std::shared_ptr<const phalanx::net::TlsMaterial> tls;
};

// What the processes of one run share.
struct Board {
  std::atomic<int> arrived{0};
  std::atomic<int> failed{0};
  std::atomic<int> pids[kMaxRanks];
  std::atomic<int> joined{0};  // 1: the networks are joined
  std::atomic<int> ports[kMaxRanks];
  std::atomic<int> raw_ports[kMaxRanks];
  std::atomic<int> tls_ports[kMaxRanks];
  std::atomic<int> ucx_ports[kMaxRanks];
};

template <typename Ready>
void await(Board& board, const char* what, Ready ready) {
  const Deadline deadline = Deadline::in_seconds(20);
  while (!ready()) {
    if (board.failed.load() != 0) throw Error(Code::kAborted, "another rank of the bench failed");
    if (deadline.passed())
      throw Error(Code::kDeadlineExceeded, fmt::format("bench: {} took more than 20 s", what));
    ::usleep(500);
  }
}

int64_t parse_size(const std::string& text) {
  size_t used = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  const std::string unit = text.substr(used);
  const int64_t scale = unit.empty() ? 1 : unit == "K" ? 1 << 10 : unit == "M" ? 1 << 20 : 0;
  if (used == 0 || scale == 0 || value < 1 || value * scale > (64 << 20) || value * scale % 4 != 0)
    throw Error(Code::kInvalidArgument,
                fmt::format("--sizes: found \"{}\", expected a multiple of 4 bytes up to 64M, such "
                            "as 4K or 1M",
                            text));
  return value * scale;
}

std::string size_text(int64_t bytes) {
  if (bytes % (1 << 20) == 0) return fmt::format("{} MiB", bytes >> 20);
  if (bytes % (1 << 10) == 0) return fmt::format("{} KiB", bytes >> 10);
  return fmt::format("{} B", bytes);
}

// Two ranks that exchange symmetrically alternate between fast and slow turns (whoever is ahead
// waits), so the median is that of the mean of two consecutive turns.
double median_us(std::vector<double>& turns) {
  std::vector<double> pairs;
  for (size_t i = 0; i + 1 < turns.size(); i += 2) pairs.push_back((turns[i] + turns[i + 1]) / 2);
  std::nth_element(pairs.begin(), pairs.begin() + pairs.size() / 2, pairs.end());
  return pairs[pairs.size() / 2];
}

struct Case {
  std::function<void()> prepare;  // not timed
  std::function<void()> work;
  std::vector<double> turns;
  std::vector<double> blocks;  // medians
};

// Runs the cases in turns of blocks, so that all see the same weather; the median of each.
std::vector<double> measure(std::vector<Case> cases, int turns, int rounds) {
  for (Case& one : cases)
    for (int i = 0; i < turns / 4 + 2; ++i) one.prepare(), one.work();
  for (int round = 0; round < rounds; ++round)
    for (Case& one : cases)
      for (int i = 0; i < turns; ++i) {
        one.prepare();
        const int64_t start = now_ns();
        one.work();
        one.turns.push_back(static_cast<double>(now_ns() - start) * 1e-3);
      }
  std::vector<double> medians;
  for (Case& one : cases) medians.push_back(median_us(one.turns));
  return medians;
}

int turns_for(int64_t bytes) { return bytes >= (1 << 20) ? 20 : bytes >= (64 << 10) ? 60 : 200; }

void against_floor(Group& group, Floor& floor, const Settings& settings, const std::string& name) {
  if (group.rank() == 0)
    fmt::print(
        "\n{} ranks, {}. Medians in us; bytes are those of one rank's block or vector.\n"
        "{:>9} | {:>10} {:>10} {:>6} | {:>10} {:>10} {:>6}\n",
        group.size(), name, "bytes", "all_gather", "floor", "ratio", "all_reduce", "floor",
        "ratio");
  for (const int64_t bytes : settings.sizes) {
    std::vector<std::byte> matrix(static_cast<size_t>(group.size()) * bytes);
    std::vector<float> values(bytes / 4);
    std::vector<std::byte*> blocks;
    for (int rank = 0; rank < group.size(); ++rank) blocks.push_back(matrix.data() + rank * bytes);
    const std::vector<int64_t> row_bytes(group.size(), bytes);
    // Before each turn the rank writes its input, as a layer would.
    const auto write_block = [&] { std::memset(blocks[group.rank()], group.rank() + 1, bytes); };
    const auto write_values = [&] {
      std::fill(values.begin(), values.end(), static_cast<float>(group.rank() + 1));
    };
    const auto result =
        measure({{write_block, [&] { group.all_gather(matrix.data(), 1, row_bytes); }},
                 {write_block, [&] { floor.all_gather(blocks, bytes); }},
                 {write_values, [&] { group.all_reduce(values); }},
                 {write_values, [&] { floor.all_reduce(values); }}},
                turns_for(bytes), settings.rounds);
    for (int rank = 0; rank < group.size(); ++rank)
      if (blocks[rank][bytes - 1] != static_cast<std::byte>(rank + 1))
        throw Error(Code::kDataLoss, "bench: wrong bytes gathered");
    if (values.back() != static_cast<float>(group.size() * (group.size() + 1) / 2))
      throw Error(Code::kDataLoss, "bench: wrong sum");
    if (group.rank() == 0) {
      fmt::print("{:>9} | {:>10.2f} {:>10.2f} {:>6.2f} | {:>10.2f} {:>10.2f} {:>6.2f}\n",
                 size_text(bytes), result[0], result[1], result[0] / result[1], result[2],
                 result[3], result[2] / result[3]);
      std::fflush(stdout);
    }
  }
}

// The same operations on links over TCP in clear and on others.
void compare_links(Group& clear, Group& other, const Settings& settings, const std::string& title,
                   const char* column) {
  if (clear.rank() == 0)
    fmt::print(
        "\n{}. Medians in us.\n"
        "{:>9} | {:>10} {:>10} {:>6} | {:>10} {:>10} {:>6}\n",
        title, "bytes", "all_gather", column, "ratio", "all_reduce", column, "ratio");
  for (const int64_t bytes : settings.sizes) {
    std::vector<std::byte> matrix(static_cast<size_t>(clear.size()) * bytes);
    std::vector<float> values(bytes / 4);
    const std::vector<int64_t> row_bytes(clear.size(), bytes);
    const auto write_block = [&] {
      std::memset(matrix.data() + clear.rank() * bytes, clear.rank() + 1, bytes);
    };
    const auto write_values = [&] {
      std::fill(values.begin(), values.end(), static_cast<float>(clear.rank() + 1));
    };
    const auto result =
        measure({{write_block, [&] { clear.all_gather(matrix.data(), 1, row_bytes); }},
                 {write_block, [&] { other.all_gather(matrix.data(), 1, row_bytes); }},
                 {write_values, [&] { clear.all_reduce(values); }},
                 {write_values, [&] { other.all_reduce(values); }}},
                turns_for(bytes), settings.rounds);
    if (values.back() != static_cast<float>(clear.size() * (clear.size() + 1) / 2))
      throw Error(Code::kDataLoss, "bench: wrong sum");
    if (clear.rank() == 0) {
      fmt::print("{:>9} | {:>10.2f} {:>10.2f} {:>6.2f} | {:>10.2f} {:>10.2f} {:>6.2f}\n",
                 size_text(bytes), result[0], result[1], result[1] / result[0], result[2],
                 result[3], result[3] / result[2]);
      std::fflush(stdout);
    }
  }
}

// A certificate for the addresses of every rank, of an authority that nobody else knows.
std::shared_ptr<const phalanx::net::TlsMaterial> bench_certificate() {
  using namespace phalanx::net;
  const int64_t now = std::time(nullptr);
  const auto authority = Authority::create("bench", PrivateKey::make(PrivateKey::Kind::kEcP256),
                                           now - 3600, now + 86400);
  CertificateOrder order{.common_name = "bench",
                         .for_server = true,
                         .for_client = true,
                         .not_before = now - 3600,
                         .not_after = now + 86400};
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    order.addresses.push_back(network_address(rank));
    order.addresses.push_back(fmt::format("127.0.0.{}", rank + 1));
  }
  const auto key = PrivateKey::make(PrivateKey::Kind::kEcP256);
  return TlsMaterial::of(authority.issue(order, key), key, {authority.certificate()});
}

// out += in, both bf16, rounded to nearest even.
void add_bf16(uint16_t* out, const uint16_t* in, int64_t count) {
  typedef uint16_t Halves __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    Halves a, b;
    std::memcpy(&a, out + i, sizeof a);
    std::memcpy(&b, in + i, sizeof b);
    const Floats sum = reinterpret_cast<Floats>(__builtin_convertvector(a, Words) << 16) +
                       reinterpret_cast<Floats>(__builtin_convertvector(b, Words) << 16);
    Words bits = reinterpret_cast<Words>(sum);
    bits += 0x7fff + ((bits >> 16) & 1);
    const Halves rounded = __builtin_convertvector(bits >> 16, Halves);
    std::memcpy(out + i, &rounded, sizeof rounded);
  }
}

void compare_cuts(Group& group, const Settings& settings, const std::string& name) {
  struct Shape {
    const char* name;
    int64_t hidden, intermediate;
  };
  constexpr Shape kShapes[] = {{"135M", 576, 1536}, {"1B", 2048, 8192}, {"8B", 4096, 14336}};
  if (group.rank() == 0)
    fmt::print(
        "\nOne layer's collectives, {} ranks, {}. Medians in us.\n"
        "{:>5} {:>6} | {:>10} {:>10} | {:>12} {:>12}\n",
        group.size(), name, "shape", "tokens", "4 gathers", "3 gathers", "2 sums bf16",
        "2 sums fp32");
  const int size = group.size();
  for (const Shape& shape : kShapes)
    for (const int64_t tokens : {1, 32, 512}) {
      std::vector<std::byte> matrix(tokens * shape.intermediate * 2);
      std::vector<uint16_t> sums(static_cast<size_t>(size) * tokens * shape.hidden);
      std::vector<float> values(tokens * shape.hidden);
      const auto columns = [&](int64_t width) {
        std::vector<int64_t> bytes;
        for (int rank = 0; rank < size; ++rank)
          bytes.push_back((width / 16 * (rank + 1) / size - width / 16 * rank / size) * 32);
        return bytes;
      };
      const auto hidden = columns(shape.hidden);
      const auto intermediate = columns(shape.intermediate);
      const std::vector<int64_t> whole(size, tokens * shape.hidden * 2);
      const auto gather = [&](const std::vector<int64_t>& row_bytes) {
        group.all_gather(matrix.data(), tokens, row_bytes);
      };
      const auto sum_bf16 = [&] {
        uint16_t* const total = sums.data();
        const int64_t count = tokens * shape.hidden;
        group.all_gather(reinterpret_cast<std::byte*>(total), 1, whole);
        for (int rank = 1; rank < size; ++rank) add_bf16(total, total + rank * count, count);
      };
      const auto nothing = [] {};
      const int turns = tokens == 512 ? 4 : tokens == 32 ? 20 : 100;
      const auto result = measure(
          {{nothing, [&] { gather(hidden), gather(hidden), gather(intermediate), gather(hidden); }},
           {nothing, [&] { gather(hidden), gather(intermediate), gather(hidden); }},
           {nothing, [&] { sum_bf16(), sum_bf16(); }},
           {nothing, [&] { group.all_reduce(values), group.all_reduce(values); }}},
          turns, settings.rounds);
      std::fill(values.begin(), values.end(), 0.0f);
      if (group.rank() == 0) {
        fmt::print("{:>5} {:>6} | {:>10.1f} {:>10.1f} | {:>12.1f} {:>12.1f}\n", shape.name, tokens,
                   result[0], result[1], result[2], result[3]);
        std::fflush(stdout);
      }
    }
}

void pin(int rank) {
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int nth = rank % CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || nth-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ::sched_setaffinity(0, sizeof one, &one);
    return;
  }
}

void run_rank(const Settings& settings, const std::string& transport, int rank, Board& board,
              void* floor_memory, int node_memory) {
  const bool shm = transport == "shm";
  if (transport == "veth") {
    enter_own_network();
    board.pids[rank].store(::getpid());
    await(board, "joining the networks", [&] { return board.joined.load() == 1; });
    configure_network(rank);
  }
  pin(rank);

  GroupOptions options;
  options.rank = rank;
  options.generation = 1;
  options.connect_seconds = 20;
  options.operation_seconds = 20;
  std::vector<std::string> addresses;
  for (int other = 0; other < settings.ranks; ++other) {
    addresses.push_back(transport == "veth" ? network_address(other)
                                            : fmt::format("127.0.0.{}", other + 1));
    options.members.push_back({.rank = other,
                               .node = shm ? 0 : other,
                               .host = fmt::format("bench-{}", other),
                               .data_address = addresses.back()});
  }
  UniqueFd listener, raw_listener, tls_listener, ucx_listener;
  GroupOptions under_tls, over_ucx;
  std::vector<uint16_t> raw_ports;
  if (!shm) {
    uint16_t port = 0;
    raw_listener = listen_on(addresses[rank], 0, 0, &port);
    board.raw_ports[rank].store(port);
    tls_listener = listen_on(addresses[rank], 0, 0, &port);
    board.tls_ports[rank].store(port);
    ucx_listener = listen_on(addresses[rank], 0, 0, &port);
    board.ucx_ports[rank].store(port);
    listener = listen_on(addresses[rank], 0, 0, &port);
    board.ports[rank].store(port);
    for (int other = 0; other < settings.ranks; ++other) {
      await(board, "listening", [&] { return board.ports[other].load() != 0; });
      options.members[other].data_port = static_cast<uint16_t>(board.ports[other].load());
      raw_ports.push_back(static_cast<uint16_t>(board.raw_ports[other].load()));
    }
    under_tls = options;
    under_tls.tls = settings.tls;
    for (int other = 0; other < settings.ranks; ++other)
      under_tls.members[other].data_port = static_cast<uint16_t>(board.tls_ports[other].load());
    over_ucx = options;
    over_ucx.transport = Transport::kUcx;
    for (int other = 0; other < settings.ranks; ++other)
      over_ucx.members[other].data_port = static_cast<uint16_t>(board.ucx_ports[other].load());
  }
  std::unique_ptr<Floor> floor;
  if (shm) {
    floor = std::make_unique<ShmFloor>(
        floor_memory, rank, settings.ranks,
        *std::max_element(settings.sizes.begin(), settings.sizes.end()));
  } else {
    floor = std::make_unique<TcpFloor>(raw_listener.get(), addresses, raw_ports, rank);
  }
  const auto group = form_group(options, listener.get(), node_memory);
  const std::string name = shm                   ? "shared memory"
                           : transport == "veth" ? "TCP over veth between network namespaces"
                                                 : "TCP over loopback";
  against_floor(*group, *floor, settings, name);
  if (!shm) {
    const auto encrypted = form_group(under_tls, tls_listener.get(), -1);
    compare_links(*group, *encrypted, settings,
                  fmt::format("The cost of TLS 1.3, {} ranks, {}", settings.ranks, name), "under TLS");
    encrypted->barrier();
  }
  if (!shm && settings.ucx) {
    const auto ucx = form_group(over_ucx, ucx_listener.get(), -1);
    compare_links(*group, *ucx, settings,
                  fmt::format("UCX beside {}, {} ranks", name, settings.ranks), "over UCX");
    ucx->barrier();
  }
  if (settings.cut) compare_cuts(*group, settings, name);
  group->barrier();
}

// One transport: a coordinator and the ranks, all children of this process. Returns success.
bool run_transport(const Settings& settings, const std::string& transport) {
  std::fflush(stdout);
  const int64_t largest = *std::max_element(settings.sizes.begin(), settings.sizes.end());
  const size_t floor_bytes = ShmFloor::bytes_for(settings.ranks, largest);
  void* const floor_memory = ::mmap(nullptr, floor_bytes, PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  void* const board_memory = ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (floor_memory == MAP_FAILED || board_memory == MAP_FAILED)
    throw Error(Code::kResourceExhausted, "bench: no memory for the ranks to share");
  auto& board = *new (board_memory) Board();
  const UniqueFd node_memory = create_node_memory(settings.ranks);

  const pid_t coordinator = ::fork();
  if (coordinator == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    int status = 0;
    std::vector<pid_t> ranks;
    const auto guarded = [&](const std::function<void()>& body) {
      try {
        body();
        return 0;
      } catch (const std::exception& error) {
        if (board.failed.exchange(1) == 0)
          fmt::print(stderr, "bench collectives, {}: {}\n", transport, error.what());
        return 1;
      }
    };
    status |= guarded([&] {
      if (transport == "veth") enter_network_sandbox();
    });
    for (int rank = 0; status == 0 && rank < settings.ranks; ++rank) {
      ranks.push_back(::fork());
      if (ranks.back() != 0) continue;
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const int failed = guarded(
          [&] { run_rank(settings, transport, rank, board, floor_memory, node_memory.get()); });
      std::fflush(stdout);
      ::_exit(failed);
    }
    if (status == 0 && transport == "veth")
      status |= guarded([&] {
        std::vector<pid_t> processes;
        for (int rank = 0; rank < settings.ranks; ++rank) {
          await(board, "starting the ranks", [&] { return board.pids[rank].load() != 0; });
          processes.push_back(board.pids[rank].load());
        }
        join_networks(processes);
        board.joined.store(1);
      });
    for (const pid_t pid : ranks) {
      int ended = 0;
      ::waitpid(pid, &ended, 0);
      status |= ended != 0;
      if (ended != 0) board.failed.store(1);
    }
    ::_exit(status);
  }
  int status = 1;
  if (coordinator > 0) ::waitpid(coordinator, &status, 0);
  ::munmap(floor_memory, floor_bytes);
  ::munmap(board_memory, sizeof(Board));
  return status == 0;
}

}  // namespace

int bench_collectives(int argc, char** argv) {
  Settings settings;
  std::string sizes = "4K,16K,64K,256K,1M,4M";
  std::string transports = "shm,tcp,veth";
  CLI::App app{"Collectives beside the raw floor of the same run", "phalanx bench collectives"};
  app.add_option("--ranks", settings.ranks, "processes, each pinned to a core")
      ->check(CLI::Range(2, kMaxRanks));
  app.add_option("--sizes", sizes, "bytes per rank, separated by commas, such as 4K,1M");
  app.add_option("--transport", transports, "of shm, tcp (loopback), veth, separated by commas");
  app.add_option("--rounds", settings.rounds, "interleaved blocks of turns per case")
      ->check(CLI::Range(1, 1000));
  app.add_flag("--ucx", settings.ucx, "also links over UCX, beside those over TCP");
  app.add_flag("!--no-cut", settings.cut, "leave out the comparison of the cuts");
  CLI11_PARSE(app, argc, argv);
  try {
    const auto split = [](const std::string& text) {
      std::vector<std::string> parts;
      for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
      }
      return parts;
    };
    for (const std::string& size : split(sizes)) settings.sizes.push_back(parse_size(size));
    for (const std::string& transport : split(transports)) {
      if (transport != "shm" && transport != "tcp" && transport != "veth")
        throw Error(Code::kInvalidArgument,
                    fmt::format("--transport: found \"{}\", expected shm, tcp or veth", transport));
      settings.transports.push_back(transport);
    }
    prepare_environment_for_ucx();  // while there is one thread
    if (settings.ucx)
      if (const std::string why = ucx_problem(); !why.empty())
        throw Error(Code::kUnimplemented, "--ucx: " + why);
    settings.tls = bench_certificate();
    bool good = true;
    for (const std::string& transport : settings.transports)
      good = run_transport(settings, transport) && good;
    return good ? 0 : 1;
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench collectives: {}\n", error.what());
    return 1;
  }
}
