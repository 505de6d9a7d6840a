#include "phalanx/base/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "phalanx/base/log.h"

namespace phalanx {
namespace {

constexpr int kBarWidth = 30;
constexpr auto kRedrawEvery = std::chrono::milliseconds(100);

std::string amount(int64_t n, ProgressUnit unit) {
  if (unit == ProgressUnit::kItems) return fmt::format("{}", n);
  const auto bytes = static_cast<double>(n);
  if (bytes >= 1e9) return fmt::format("{:.2f} GB", bytes / 1e9);
  if (bytes >= 1e6) return fmt::format("{:.1f} MB", bytes / 1e6);
  return fmt::format("{:.1f} kB", bytes / 1e3);
}

}  // namespace

Progress::Progress(std::string what, int64_t total, ProgressUnit unit, ProgressOptions options)
    : what_(std::move(what)),
      total_(std::max<int64_t>(total, 0)),
      unit_(unit),
      options_(std::move(options)),
      terminal_(options_.terminal.value_or(::isatty(STDERR_FILENO) == 1)),
      start_(options_.start.value_or(Clock::now())) {
  if (!options_.draw)
    options_.draw = [](std::string_view text) {
      std::fwrite(text.data(), 1, text.size(), stderr);
      std::fflush(stderr);
    };
  if (!options_.line) options_.line = [](std::string_view text) { log_info("{}", text); };
}

Progress::~Progress() {
  std::lock_guard lock(mutex_);
  if (bar_drawn_ && !done_) options_.draw("\n");
}

void Progress::advance(int64_t n) {
  std::lock_guard lock(mutex_);
  if (done_) return;
  current_ += n;
  const auto now = Clock::now();
  const auto interval = terminal_ ? std::chrono::duration<double>(kRedrawEvery)
                                  : std::chrono::duration<double>(options_.line_every_seconds);
  if (now - shown_ < interval) return;
  shown_ = now;
  if (terminal_)
    show_bar();
  else
    options_.line(text());
}

void Progress::done() {
  std::lock_guard lock(mutex_);
  if (done_) return;
  done_ = true;
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const std::string rate =
      unit_ == ProgressUnit::kBytes && seconds > 0
          ? fmt::format(", {}/s", amount(static_cast<int64_t>(current_ / seconds), unit_))
          : "";
  const std::string closing =
      fmt::format("{}: {} in {:.1f} s{}", what_, amount(current_, unit_), seconds, rate);
  if (terminal_)
    options_.draw(fmt::format("\r\x1b[K{}\n", closing));
  else
    options_.line(closing);
}

std::string Progress::text() const {
  if (total_ == 0) return fmt::format("{}: {}", what_, amount(current_, unit_));
  return fmt::format(
      "{}: {:3.0f} % of {}", what_,
      100.0 * static_cast<double>(std::min(current_, total_)) / static_cast<double>(total_),
      amount(total_, unit_));
}

void Progress::show_bar() {
  bar_drawn_ = true;
  if (total_ == 0) return options_.draw(fmt::format("\r\x1b[K{}", text()));
  const auto filled = static_cast<size_t>(static_cast<double>(std::min(current_, total_)) /
                                          static_cast<double>(total_) * kBarWidth);
  options_.draw(fmt::format("\r\x1b[K[{}{}] {}", std::string(filled, '#'),
                            std::string(kBarWidth - filled, '.'), text()));
}

}  // namespace phalanx
