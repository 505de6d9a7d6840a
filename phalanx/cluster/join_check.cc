#include "phalanx/cluster/join_check.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

namespace phalanx::cluster {
namespace {

const std::string* find_fact(const JoinFacts& facts, const std::string& name) {
  for (const auto& [key, value] : facts) {
    if (key == name) return &value;
  }
  return nullptr;
}

bool offers_class(const NodeOffer& offer, const std::string& name) {
  return std::find(offer.numeric_classes.begin(), offer.numeric_classes.end(), name) !=
         offer.numeric_classes.end();
}

}  // namespace

JoinFacts all_facts(const ControlOptions& options) {
  JoinFacts facts{{"control version", std::to_string(kControlVersion)}};
  if (find_fact(options.facts, "rank table") == nullptr)
    facts.emplace_back("rank table", options.table.digest());
  facts.insert(facts.end(), options.facts.begin(), options.facts.end());
  return facts;
}

std::string mismatch_table(const JoinFacts& master, const JoinFacts& node,
                           const std::string& master_name, const std::string& node_name) {
  struct Row {
    std::string name, left, right;
  };
  std::vector<Row> rows{{"", master_name, node_name}};
  for (const auto& [name, value] : master) {
    const std::string* other = find_fact(node, name);
    if (other == nullptr || *other != value) rows.push_back({name, value, other ? *other : "-"});
  }
  for (const auto& [name, value] : node) {
    if (find_fact(master, name) == nullptr) rows.push_back({name, "-", value});
  }
  if (rows.size() == 1) return {};
  size_t name_width = 0;
  size_t left_width = 0;
  for (const Row& row : rows) {
    name_width = std::max(name_width, row.name.size());
    left_width = std::max(left_width, row.left.size());
  }
  std::string text;
  for (const Row& row : rows) {
    text += fmt::format("{}  {:<{}}  {:<{}}  {}", text.empty() ? "" : "\n", row.name, name_width,
                        row.left, left_width, row.right);
  }
  return text;
}

std::string common_numeric_class(const std::vector<std::string>& names,
                                 const std::vector<NodeOffer>& offers) {
  const auto& own = offers.at(0).numeric_classes;
  for (auto it = own.rbegin(); it != own.rend(); ++it) {
    if (std::all_of(offers.begin(), offers.end(),
                    [&](const NodeOffer& offer) { return offers_class(offer, *it); }))
      return *it;
  }
  if (std::all_of(offers.begin(), offers.end(),
                  [](const NodeOffer& offer) { return offer.numeric_classes.empty(); }))
    return {};
  std::string text = "no numeric class is common to all nodes:";
  for (size_t i = 0; i < offers.size(); ++i)
    text += fmt::format(" {} has {};", names[i],
                        offers[i].numeric_classes.empty()
                            ? "none"
                            : fmt::format("{}", fmt::join(offers[i].numeric_classes, ", ")));
  text.back() = '.';
  throw Error(Code::kFailedPrecondition,
              text + " Fix: run the same build on all nodes, without PHALANX_CPU_ISA");
}

BestClasses best_classes(const std::vector<std::string>& names,
                         const std::vector<NodeOffer>& offers) {
  const auto best = [](const NodeOffer& offer) {
    return offer.numeric_classes.empty() ? std::string("none") : offer.numeric_classes.back();
  };
  BestClasses found;
  for (size_t i = 0; i < offers.size(); ++i) {
    found.text += fmt::format("{}{} {}", i == 0 ? "" : ", ", names[i], best(offers[i]));
    found.equal = found.equal && best(offers[i]) == best(offers[0]);
  }
  return found;
}

int64_t unix_ms(const ControlOptions& options) {
  if (options.unix_ms) return options.unix_ms();
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

void add_clocks(const ControlOptions& options, int64_t own_ms, int64_t other_ms, JoinFacts& own,
                JoinFacts& other) {
  const double apart = std::abs(static_cast<double>(own_ms) - static_cast<double>(other_ms)) / 1000;
  if (options.clock_seconds <= 0 || apart <= options.clock_seconds) return;
  const auto text = [](int64_t ms) {
    return fmt::format("{:%Y-%m-%d %H:%M:%S} UTC", fmt::gmtime(static_cast<std::time_t>(ms / 1000)));
  };
  own.emplace_back("clock", text(own_ms));
  other.emplace_back("clock", fmt::format("{}, {:.0f} s apart", text(other_ms), apart));
}

std::string printable(const std::string& text, size_t max_bytes) {
  std::string result = text.substr(0, max_bytes);
  for (char& c : result) {
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\n') || c == 0x7f) c = ' ';
  }
  return result;
}

Code code_of(int value) {
  return value >= static_cast<int>(Code::kCancelled) && value <= static_cast<int>(Code::kDataLoss)
             ? static_cast<Code>(value)
             : Code::kUnknown;
}

bool may_be_symptom(Code code) {
  return code == Code::kUnavailable || code == Code::kAborted || code == Code::kCancelled ||
         code == Code::kDeadlineExceeded;
}

}  // namespace phalanx::cluster
