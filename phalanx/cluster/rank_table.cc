#include "phalanx/cluster/rank_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "phalanx/base/check.h"
#include "phalanx/base/guarded_file.h"
#include "phalanx/base/json.h"
#include "phalanx/net/address.h"
#include "phalanx/net/digest.h"

namespace phalanx::cluster {
namespace {

using nlohmann::json;

constexpr size_t kMaxServers = 1024;
constexpr size_t kMaxDevices = 1024;  // of one server
constexpr size_t kMaxProblems = 100;  // shown; a hostile file could hold a million

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

// All digits, no sign, no leading zero, nothing after.
std::optional<int> plain_integer(const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  if (text.size() > 1 && text[0] == '0') return std::nullopt;
  return value;
}

class Reader {
 public:
  Reader(const std::string& where, Problems& problems) : where_(where), problems_(problems) {}

  RankTable read(const json& root) {
    if (!root.is_object()) {
      add("", "the whole file", shown(root), "an object with server_count and server_list");
      return {};
    }
    note_unknown_keys(root, "", {"version", "status", "server_count", "server_list", "weight"});
    fixed_string(root, "version", "1.0");
    fixed_string(root, "status", "completed");
    read_common_weight(root);
    read_list(root);
    read_count(root);
    check_servers();
    check_ranks();
    for (Server& server : table_.servers) {
      std::stable_sort(server.devices.begin(), server.devices.end(),
                       [](const Device& a, const Device& b) { return a.rank_id < b.rank_id; });
    }
    if (problems_.empty()) note_order();
    return std::move(table_);
  }

 private:
  void add(const std::string& key, const std::string& what, const std::string& found,
           const std::string& expected, const std::string& fix = {}) {
    if (problems_.list().size() == kMaxProblems)
      problems_.add({.what = "there are more problems than are shown", .where = where_});
    if (problems_.list().size() > kMaxProblems) return;
    problems_.add({.what = what,
                   .where = key.empty() ? where_ : where_ + ": " + key,
                   .found = found,
                   .expected = expected,
                   .fix = fix});
  }

  void note_unknown_keys(const json& object, const std::string& place,
                         const std::set<std::string>& known) {
    for (const auto& [key, value] : object.items()) {
      if (!known.contains(key) && table_.notes.size() < kMaxProblems)
        table_.notes.push_back(fmt::format("{}{}: unknown key, ignored", place,
                                           shown(json(key))));
    }
  }

  void fixed_string(const json& root, const std::string& key, const std::string& expected) {
    const auto it = root.find(key);
    if (it == root.end() || *it == expected) return;
    add(key, "unexpected value", shown(*it), "\"" + expected + "\"",
        key == "status" ? "the table is not finished: have it written again, then set \"completed\""
                        : "only this layout is known");
  }

  // The string under `key`; nothing, and a problem, if it is no string or missing though required.
  std::optional<std::string> string_of(const json& object, const std::string& place,
                                       const std::string& key, bool required,
                                       const std::string& example) {
    const auto it = object.find(key);
    if (it == object.end()) {
      if (required) add(place + key, "key missing", "", "a string such as " + example);
      return std::nullopt;
    }
    if (!it->is_string()) {
      add(place + key, "wrong type", shown(*it), "a string such as " + example,
          it->is_number() ? "put the value in quotation marks" : "");
      return std::nullopt;
    }
    return it->get<std::string>();
  }

  std::optional<int> integer_of(const json& object, const std::string& place,
                                const std::string& key) {
    const auto text = string_of(object, place, key, true, "\"0\"");
    if (!text) return std::nullopt;
    const auto value = plain_integer(*text);
    if (!value) {
      add(place + key, "not an integer", shown(json(*text)),
          "digits only, without sign, leading zero or anything after");
    }
    return value;
  }

  // A valid address in canonical form, else nothing and a problem.
  std::optional<std::string> address_of(const std::string& text, const std::string& key) {
    const auto address = net::Address::parse(text);
    if (!address) {
      const bool unset = text == "-.-.-.-";
      add(key, unset ? "no address was configured when the file was written" : "not an IP address",
          shown(json(text)), "an IPv4 or IPv6 address",
          unset ? "give the address of the network interface, or remove the key" : "");
      return std::nullopt;
    }
    if (address->is_all_zero()) {
      add(key, "the all-zero address names no server", shown(json(text)),
          "the address at which other servers reach it");
      return std::nullopt;
    }
    return address->text();
  }

  bool spare_of(const json& object, const std::string& place) {
    const auto it = object.find("spare");
    if (it == object.end()) return false;
    if (it->is_boolean()) return it->get<bool>();
    add(place + "spare", "wrong type", shown(*it), "true or false");
    return false;
  }

  static bool all_devices_spare(const json& object) {
    const auto devices = object.find("device");
    return devices != object.end() && devices->is_array() && !devices->empty() &&
           std::all_of(devices->begin(), devices->end(), [](const json& device) {
             return device.is_object() && device.contains("spare") && device["spare"] == true;
           });
  }

  // "weight": "auto" beside server_list holds for every device that has no weight of its own.
  void read_common_weight(const json& root) {
    const auto it = root.find("weight");
    if (it == root.end()) return;
    if (*it == "auto") {
      auto_weights_ = true;
    } else {
      add("weight", "wrong value", shown(*it), "\"auto\", or no such key",
          "numbers are given for each device");
    }
  }

  void read_weight(const json& object, const std::string& place, Device& device) {
    device.auto_weight = auto_weights_;
    const auto it = object.find("weight");
    if (it == object.end()) return;
    device.auto_weight = *it == "auto";
    if (device.auto_weight) return;
    const double value = it->is_number() ? it->get<double>() : 0;
    if (std::isfinite(value) && value > 0 && value <= 1e6) {
      device.weight = value;
    } else {
      add(place + "weight", "wrong value", shown(*it),
          "a number above 0, at most 1000000, or \"auto\"");
    }
  }

  void read_list(const json& root) {
    const auto list = root.find("server_list");
    if (list == root.end()) return add("server_list", "key missing", "", "an array of servers");
    if (!list->is_array())
      return add("server_list", "wrong type", shown(*list), "an array of servers");
    if (list->empty() || list->size() > kMaxServers) {
      return add("server_list", "wrong number of servers", std::to_string(list->size()),
                 fmt::format("1 to {}", kMaxServers));
    }
    listed_ = list->size();
    for (size_t i = 0; i < list->size(); ++i) {
      table_.servers.emplace_back();
      const std::string place = fmt::format("server_list[{}]", i);
      if ((*list)[i].is_object()) {
        read_server((*list)[i], place + ".", table_.servers.back());
      } else {
        add(place, "wrong type", shown((*list)[i]), "an object with server_id and device");
      }
    }
  }

  void read_server(const json& object, const std::string& place, Server& server) {
    note_unknown_keys(object, place, {"server_id", "container_ip", "device", "spare"});
    server.spare = spare_of(object, place) || all_devices_spare(object);
    if (const auto text = string_of(object, place, "server_id", true, "\"10.0.0.1\""))
      server.server_id = address_of(*text, place + "server_id").value_or("");
    const auto container = string_of(object, place, "container_ip", false, "\"10.0.0.1\"");
    if (container && !container->empty()) {
      server.container_ip = address_of(*container, place + "container_ip").value_or("");
    } else if (!object.contains("container_ip") || container) {
      server.container_ip = server.server_id;
      table_.notes.push_back(fmt::format("{}container_ip: {}, server_id {} is taken", place,
                                         container ? "empty" : "not given", server.server_id));
    }
    const auto devices = object.find("device");
    if (server.spare && (devices == object.end() || (devices->is_array() && devices->empty())))
      return;
    if (devices == object.end())
      return add(place + "device", "key missing", "", "an array of devices");
    if (!devices->is_array())
      return add(place + "device", "wrong type", shown(*devices), "an array of devices");
    if (devices->empty() || devices->size() > kMaxDevices) {
      return add(place + "device", "wrong number of devices", std::to_string(devices->size()),
                 fmt::format("1 to {}", kMaxDevices));
    }
    for (size_t i = 0; i < devices->size(); ++i) {
      const std::string device = fmt::format("{}device[{}]", place, i);
      if (!server.spare) ++devices_listed_;
      if ((*devices)[i].is_object()) {
        read_device((*devices)[i], device + ".", server);
      } else {
        if (!server.spare) ++ranks_unread_;
        add(device, "wrong type", shown((*devices)[i]), "an object with device_id and rank_id");
      }
    }
  }

  void read_device(const json& object, const std::string& place, Server& server) {
    note_unknown_keys(object, place, {"device_id", "device_ip", "rank_id", "super_device_id",
                                      "weight", "spare"});
    if (spare_of(object, place) && !server.spare) {
      add(place + "spare", "one device of several cannot be a spare", "true",
          "\"spare\": true on a server", "put it on the server, or remove the device");
    }
    (void)string_of(object, place, "super_device_id", false, "\"0\"");
    Device device;
    const auto id = integer_of(object, place, "device_id");
    if (id && *id >= static_cast<int>(kMaxDevices)) {
      add(place + "device_id", "out of range", std::to_string(*id),
          fmt::format("0 to {}", kMaxDevices - 1));
    }
    if (id) {
      device.device_id = *id;
      const auto [first, fresh] =
          device_ids_.try_emplace({table_.servers.size(), *id}, place + "device_id");
      if (!fresh) {
        add(place + "device_id", "device listed twice on one server",
            fmt::format("{}, already at {}", *id, first->second), "each device_id once per server");
      }
    }
    if (const auto ip = string_of(object, place, "device_ip", false, "\"10.20.0.1\"")) {
      if (!ip->empty()) device.device_ip = address_of(*ip, place + "device_ip").value_or("");
    }
    check_device_ip(device, place);
    read_weight(object, place, device);
    if (server.spare) {
      device.rank_id = -1;
      device.weight = 1;
      device.auto_weight = false;
      for (const char* key : {"rank_id", "weight"}) {
        if (object.contains(key) && table_.notes.size() < kMaxProblems)
          table_.notes.push_back(fmt::format(
              "{}{}: not used, a spare takes over the ranks of a lost server", place, key));
      }
      server.devices.push_back(device);
      return;
    }
    const auto rank = integer_of(object, place, "rank_id");
    if (!rank) {
      ++ranks_unread_;
      return;
    }
    device.rank_id = *rank;
    const auto [first, fresh] = rank_places_.try_emplace(*rank, place + "rank_id");
    if (!fresh) {
      add(place + "rank_id", "rank given twice",
          fmt::format("{}, already at {}", *rank, first->second), "each rank_id once");
    }
    server.devices.push_back(device);
  }

  // Ranks of one server may share an interface; two servers cannot share an address.
  void check_device_ip(const Device& device, const std::string& place) {
    if (device.device_ip.empty()) return;
    const auto [first, fresh] = device_ips_.try_emplace(
        device.device_ip, std::pair(table_.servers.size(), place + "device_ip"));
    if (fresh) return;
    if (first->second.first != table_.servers.size()) {
      add(place + "device_ip", "address of a device on another server",
          fmt::format("{}, already at {}", device.device_ip, first->second.second),
          "each server's devices at addresses of their own");
    }
  }

  void read_count(const json& root) {
    const auto it = root.find("server_count");
    if (it == root.end())
      return add("server_count", "key missing", "", "the number of servers as a string");
    std::optional<int> count;
    if (it->is_number_integer() && *it >= 0 && *it <= 1'000'000) {
      count = it->get<int>();
      table_.notes.push_back("server_count: a number; a string such as \"2\" is usual");
    } else if (it->is_string()) {
      count = plain_integer(it->get<std::string>());
    }
    if (!count)
      return add("server_count", "not an integer", shown(*it), "a string such as \"2\"");
    if (listed_ > 0 && static_cast<size_t>(*count) != listed_) {
      add("server_count", "differs from the length of server_list", std::to_string(*count),
          std::to_string(listed_), fmt::format("write \"{}\", or mend server_list", listed_));
    }
  }

  void check_servers() {
    std::map<std::string, size_t> addresses, ids;
    for (size_t i = 0; i < table_.servers.size(); ++i) {
      const Server& server = table_.servers[i];
      const auto key = [&](const char* name, size_t index) {
        return fmt::format("server_list[{}].{}", index, name);
      };
      if (server.container_ip.empty()) continue;
      const auto [first, fresh] = addresses.try_emplace(server.container_ip, i);
      if (!fresh) {
        add(key("container_ip", i), "server listed twice",
            fmt::format("{}, already at server_list[{}]", server.container_ip, first->second),
            "each server once",
            "put all devices of one server into one entry, or correct the address");
        continue;
      }
      const auto [other, new_id] = ids.try_emplace(server.server_id, i);
      if (!new_id && !server.server_id.empty()) {
        table_.notes.push_back(
            fmt::format("{}: {} also at server_list[{}]; the two are told apart by container_ip",
                        key("server_id", i), server.server_id, other->second));
      }
    }
  }

  void check_ranks() {
    table_.world_size = static_cast<int>(rank_places_.size());
    if (listed_ > 0 && devices_listed_ == 0 && problems_.empty()) {
      add("server_list", "every server is a spare", std::to_string(listed_),
          "at least one server with ranks", "remove \"spare\" from those that compute");
    }
    if (rank_places_.empty() || ranks_unread_ > 0) return;
    const int expected = static_cast<int>(devices_listed_);
    std::string missing;
    int missing_count = 0;
    for (int rank = 0; rank < expected; ++rank) {
      if (rank_places_.contains(rank)) continue;
      if (++missing_count <= 20) missing += fmt::format("{}{}", missing.empty() ? "" : ", ", rank);
    }
    if (missing_count == 0) return;
    if (missing_count > 20) missing += ", ...";
    add("server_list", "ranks are not contiguous", fmt::format("no rank {}", missing),
        fmt::format("0 to {}, each once, for {} devices", expected - 1, expected),
        rank_places_.contains(0) ? "" : "rank 0 makes its server the master");
    for (const auto& [rank, place] : rank_places_) {
      if (rank >= expected)
        add(place, "rank out of range", std::to_string(rank), fmt::format("0 to {}", expected - 1));
    }
  }

  void note_order() {
    int next = 0;
    for (const Server& server : table_.servers) {
      if (server.spare) continue;
      for (const Device& device : server.devices) {
        if (device.rank_id == next++) continue;
        table_.notes.push_back(fmt::format(
            "ranks are not numbered server by server in the order of server_list; the master is "
            "the server of rank 0, {}",
            table_.servers[static_cast<size_t>(table_.master())].address()));
        return;
      }
    }
  }

  const std::string& where_;
  Problems& problems_;
  RankTable table_;
  size_t listed_ = 0;
  size_t devices_listed_ = 0;
  size_t ranks_unread_ = 0;
  bool auto_weights_ = false;
  std::map<std::pair<size_t, int>, std::string> device_ids_;  // (server, id) -> first place
  std::map<std::string, std::pair<size_t, std::string>> device_ips_;
  std::map<int, std::string> rank_places_;
};

RankTable parse(std::string_view text, const std::string& where, Problems& problems) {
  if (text.find_first_not_of(" \t\r\n") == std::string_view::npos) {
    problems.add({.what = "file is empty", .where = where, .expected = "a rank table in JSON"});
    return {};
  }
  json root;
  try {
    root = parse_json(text, where, 16);
  } catch (const Error& e) {
    problems.add({.what = e.what()});
    return {};
  }
  return Reader(where, problems).read(root);
}

std::string title(const std::string& where) {
  return fmt::format("rank table {} cannot be used", where);
}

}  // namespace

int RankTable::master() const { return server_of_rank(0); }

int RankTable::server_of_rank(int rank) const {
  for (size_t i = 0; i < servers.size(); ++i) {
    for (const Device& device : servers[i].devices) {
      if (device.rank_id == rank) return static_cast<int>(i);
    }
  }
  PHALANX_CHECK(false && "rank of the table");
  return -1;
}

const Device& RankTable::device_of_rank(int rank) const {
  for (const Device& device : servers[static_cast<size_t>(server_of_rank(rank))].devices) {
    if (device.rank_id == rank) return device;
  }
  PHALANX_CHECK(false && "rank of its server");
  return servers[0].devices[0];
}

bool RankTable::has_auto_weights() const {
  return std::any_of(servers.begin(), servers.end(), [](const Server& server) {
    return std::any_of(server.devices.begin(), server.devices.end(),
                       [](const Device& device) { return device.auto_weight; });
  });
}

std::string RankTable::digest() const { return net::sha256_hex(to_json(*this)); }

RankTable parse_rank_table(std::string_view text, const std::string& where) {
  Problems problems;
  RankTable table = parse(text, where, problems);
  problems.throw_if_any(title(where));
  return table;
}

RankTable load_rank_table(const std::string& path) {
  Problems problems;
  Problems warnings;
  const std::string text = read_guarded_file(path, {}, problems, warnings);
  RankTable table;
  if (!text.empty()) table = parse(text, path, problems);
  problems.throw_if_any(title(path));
  for (const Problem& warning : warnings.list()) table.notes.push_back(to_string(warning));
  return table;
}

int find_own_server(const RankTable& table, const std::string& own_container_ip,
                    const std::string& own_host_ip, const std::string& where) {
  std::vector<int> by_host;
  std::string listed;
  for (size_t i = 0; i < table.servers.size(); ++i) {
    const Server& server = table.servers[i];
    if (!own_container_ip.empty() && net::same_address(server.address(), own_container_ip))
      return static_cast<int>(i);
    if (!own_host_ip.empty() && net::same_address(server.server_id, own_host_ip))
      by_host.push_back(static_cast<int>(i));
    if (i < 64) listed += fmt::format("{}{}", i > 0 ? ", " : "", server.address());
  }
  if (by_host.size() == 1) return by_host[0];
  std::string own = own_container_ip.empty() ? "" : "MIES_CONTAINER_IP " + own_container_ip;
  if (!own_host_ip.empty()) own += (own.empty() ? "" : ", ") + ("HOST_IP " + own_host_ip);
  Problem problem{.what = by_host.empty() ? "this node is in no entry of the rank table"
                                          : "HOST_IP fits several entries of the rank table",
                  .where = where,
                  .found = fmt::format("{} (addresses of this machine: {})",
                                       own.empty() ? "no own address" : own,
                                       net::own_addresses_text()),
                  .expected = fmt::format("one of {}", listed),
                  .fix = "set MIES_CONTAINER_IP to this node's container_ip in the table, or add "
                         "the node to the table"};
  throw Error(Code::kInvalidArgument, to_string(problem));
}

std::string to_json(const RankTable& table) {
  nlohmann::ordered_json root;
  root["version"] = "1.0";
  root["server_count"] = std::to_string(table.servers.size());
  root["server_list"] = nlohmann::ordered_json::array();
  for (const Server& server : table.servers) {
    nlohmann::ordered_json entry;
    entry["server_id"] = server.server_id;
    entry["container_ip"] = server.address();
    if (server.spare) entry["spare"] = true;
    entry["device"] = nlohmann::ordered_json::array();
    for (const Device& device : server.devices) {
      nlohmann::ordered_json item;
      item["device_id"] = std::to_string(device.device_id);
      item["device_ip"] = device.device_ip.empty() ? server.address() : device.device_ip;
      if (!server.spare) item["rank_id"] = std::to_string(device.rank_id);
      if (device.auto_weight) {
        item["weight"] = "auto";
      } else if (device.weight != 1.0) {
        item["weight"] = device.weight;
      }
      entry["device"].push_back(item);
    }
    root["server_list"].push_back(entry);
  }
  root["status"] = "completed";
  return root.dump(1) + "\n";
}

}  // namespace phalanx::cluster
