#include "phalanx/api/request_parser.h"

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/beast/core/string.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <cctype>
#include <utility>

namespace phalanx::api {

namespace http = boost::beast::http;

struct RequestParser::Parts {
  http::request_parser<http::string_body> parser;
  Limits limits;
  bool head_checked = false;
  std::string reason;
};

RequestParser::RequestParser(const Limits& limits) : parts_(new Parts{.limits = limits}) {
  parts_->parser.eager(true);
  parts_->parser.header_limit(static_cast<uint32_t>(limits.head_bytes));
  parts_->parser.body_limit(static_cast<uint64_t>(limits.body_bytes));
}

RequestParser::~RequestParser() = default;

RequestParser::State RequestParser::put(std::span<const char> input, size_t* used) {
  auto& parser = parts_->parser;
  boost::system::error_code error;
  *used = parser.put(boost::asio::buffer(input.data(), input.size()), error);
  if (error == http::error::need_more) error = {};
  if (error == http::error::header_limit) return State::kHeadTooLarge;
  if (error == http::error::body_limit || error == http::error::buffer_overflow)
    return State::kBodyTooLarge;
  if (error) {
    parts_->reason = error.message();
    return State::kMalformed;
  }
  if (!parser.is_header_done()) return State::kHead;
  if (!parts_->head_checked) {
    parts_->head_checked = true;
    for (const auto& field : parser.get())
      if (field.name_string().size() + field.value().size() + 4 > parts_->limits.head_line_bytes)
        return State::kHeadTooLarge;
  }
  return parser.is_done() ? State::kDone : State::kBody;
}

const std::string& RequestParser::reason() const { return parts_->reason; }

bool RequestParser::expects_continue() const {
  return boost::beast::iequals(parts_->parser.get()[http::field::expect], "100-continue");
}

bool RequestParser::keep_alive() const { return parts_->parser.get().keep_alive(); }

bool RequestParser::http10() const { return parts_->parser.get().version() < 11; }

HttpRequest RequestParser::head() const {
  const auto& message = parts_->parser.get();
  HttpRequest request;
  request.method = std::string(message.method_string());
  const std::string target(message.target());
  const size_t mark = target.find('?');
  request.path = target.substr(0, mark);
  if (mark != std::string::npos) request.query = target.substr(mark + 1);
  for (const auto& field : message) {
    std::string name(field.name_string());
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    request.headers.emplace_back(std::move(name), std::string(field.value()));
  }
  return request;
}

HttpRequest RequestParser::take() {
  HttpRequest request = head();
  request.body = std::move(parts_->parser.get().body());
  return request;
}

}  // namespace phalanx::api
