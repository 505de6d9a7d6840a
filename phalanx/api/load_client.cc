#include "phalanx/api/load_client.h"

#include <algorithm>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <memory>
#include <string_view>

#include "phalanx/base/clock.h"

namespace phalanx::api {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;

namespace {

class Load {
 public:
  Load(const LoadTarget& target, const std::vector<LoadRequest>& requests, int64_t most_open)
      : target_(target),
        requests_(requests),
        most_open_(most_open),
        answers_(requests.size()),
        freed_(io_, Clock::time_point::max()) {}

  std::vector<LoadAnswer> run() {
    asio::co_spawn(io_, send_all(), asio::detached);
    io_.run();
    return std::move(answers_);
  }

  asio::awaitable<void> one(http::request<http::string_body> request, LoadAnswer& answer) {
    try {
      co_await exchange(std::move(request), answer);
    } catch (const std::exception& e) {
      answer.error = e.what();
    }
    answer.end_ns = now_ns();
    --open_;
    freed_.cancel();
  }

  asio::io_context& io() { return io_; }

 private:
  asio::awaitable<void> send_all() {
    const Clock::time_point begin = Clock::now();
    asio::steady_timer timer(io_);
    for (size_t i = 0; i < requests_.size(); ++i) {
      const auto due = begin + std::chrono::duration_cast<Clock::duration>(
                                   std::chrono::duration<double>(requests_[i].at_seconds));
      timer.expires_at(due);
      co_await timer.async_wait(asio::use_awaitable);
      while (open_ >= most_open_) {
        boost::system::error_code cancelled;  // how one that ended tells
        co_await freed_.async_wait(asio::redirect_error(asio::use_awaitable, cancelled));
      }
      answers_[i].due_ns =
          std::chrono::duration_cast<std::chrono::nanoseconds>(due.time_since_epoch()).count();
      http::request<http::string_body> request{http::verb::post, target_.path, 11};
      request.set(http::field::content_type, "application/json");
      request.body() = requests_[i].body;
      ++open_;
      asio::co_spawn(io_, one(std::move(request), answers_[i]), asio::detached);
    }
  }

  asio::awaitable<void> exchange(http::request<http::string_body> request, LoadAnswer& answer) {
    beast::tcp_stream stream(io_);
    stream.expires_after(std::chrono::milliseconds(static_cast<int64_t>(target_.timeout_seconds * 1e3)));
    asio::ip::tcp::resolver resolver(io_);
    const auto found = co_await resolver.async_resolve(target_.host, std::to_string(target_.port),
                                                       asio::use_awaitable);
    co_await stream.async_connect(found, asio::use_awaitable);
    stream.socket().set_option(asio::ip::tcp::no_delay(true));
    request.set(http::field::host, target_.host);
    request.keep_alive(false);
    request.prepare_payload();
    answer.sent_ns = now_ns();
    co_await http::async_write(stream, request, asio::use_awaitable);
    beast::flat_buffer buffer;
    http::response_parser<http::string_body> parser;
    parser.body_limit(boost::none);
    co_await http::async_read_header(stream, buffer, parser, asio::use_awaitable);
    answer.status = parser.get().result_int();
    const bool events = parser.get()[http::field::content_type].starts_with("text/event-stream");
    size_t taken = 0;
    while (!parser.is_done()) {
      co_await http::async_read_some(stream, buffer, parser, asio::use_awaitable);
      if (events) taken = take_events(parser.get().body(), taken, answer);
    }
    if (!events) answer.pieces.push_back({now_ns(), std::move(parser.get().body())});
  }

  // Whole `data:` lines of `body` from `taken` on. Returns where the next one begins.
  static size_t take_events(std::string_view body, size_t taken, LoadAnswer& answer) {
    constexpr std::string_view kData = "data:";
    for (size_t end = 0; (end = body.find('\n', taken)) != std::string_view::npos; taken = end + 1) {
      std::string_view line = body.substr(taken, end - taken);
      if (!line.starts_with(kData)) continue;
      line.remove_prefix(std::min(line.find_first_not_of(' ', kData.size()), line.size()));
      answer.pieces.push_back({now_ns(), std::string(line)});
    }
    return taken;
  }

  const LoadTarget& target_;
  const std::vector<LoadRequest>& requests_;
  int64_t most_open_;
  int64_t open_ = 0;
  asio::io_context io_{1};
  std::vector<LoadAnswer> answers_;
  asio::steady_timer freed_;  // cancelled whenever one ends
};

}  // namespace

std::vector<LoadAnswer> run_load(const LoadTarget& target, const std::vector<LoadRequest>& requests,
                                 int64_t most_open) {
  return Load(target, requests, most_open).run();
}

LoadAnswer get_once(const LoadTarget& target) {
  const std::vector<LoadRequest> none;
  Load load(target, none, 1);
  LoadAnswer answer;
  http::request<http::string_body> request{http::verb::get, target.path, 11};
  asio::co_spawn(load.io(), load.one(std::move(request), answer), asio::detached);
  load.io().run();
  return answer;
}

}  // namespace phalanx::api
