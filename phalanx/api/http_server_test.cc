#include "phalanx/api/http_server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <regex>
#include <thread>

#include "phalanx/api/testing_client.h"
#include "phalanx/base/error.h"
#include "phalanx/net/digest.h"

namespace phalanx::api {
namespace {

using testing::Client;
using testing::ask;
using testing::fetch;
using testing::parse_reply;
using testing::post;
using testing::post_text;
using testing::Reply;

// One listener with a few routes; responders of /later are kept for the test to answer.
struct Site {
  explicit Site(ServerOptions options = {}) : server(with_listener(std::move(options))) {
    server.route(kBusiness, "GET", "/hello", [](const HttpRequest& r, const auto& responder) {
      responder->respond({.body = "{\"query\":\"" + r.query + "\"}", .headers = {}});
    });
    server.route(kBusiness, "POST", "/echo", [](const HttpRequest& r, const auto& responder) {
      responder->respond({.content_type = "text/plain", .body = r.body, .headers = {}});
    });
    server.route(kBusiness, "POST", "/throw",
                 [](const HttpRequest&, const auto&) { throw std::runtime_error("inside"); });
    server.route(kBusiness, "POST", "/drop", [](const HttpRequest&, const auto&) {});
    server.route(kBusiness, "GET", "/under/*", [](const HttpRequest& r, const auto& responder) {
      responder->respond({.content_type = "text/plain", .body = r.path, .headers = {}});
    });
    server.route(kBusiness, "GET", "/stream", [](const HttpRequest&, const auto& responder) {
      responder->start_stream(200, "text/event-stream", {{"X-Extra", "1"}});
      responder->write("data: a\n\n");
      responder->write("");
      responder->write("data: b\n\n");
      responder->end();
    });
    server.route(kBusiness, "GET", "/later",
                 [this](const HttpRequest&, std::shared_ptr<Responder> responder) {
                   responder->on_disconnect([this] { ++gone; });
                   const std::lock_guard lock(mutex);
                   kept.push_back(std::move(responder));
                   arrived.notify_all();
                 });
    server.route(kManagement, "GET", "/hidden", [](const HttpRequest&, const auto& responder) {
      responder->respond({.headers = {}});
    });
    server.start();
    port = server.ports()[0];
  }
  ~Site() { server.stop(Deadline::in_seconds(0.5)); }

  static ServerOptions with_listener(ServerOptions options) {
    if (options.listeners.empty()) options.listeners = {{"127.0.0.1", 0, kBusiness}};
    return options;
  }
  std::shared_ptr<Responder> wait_kept(size_t count = 1) {
    std::unique_lock lock(mutex);
    EXPECT_TRUE(arrived.wait_for(lock, std::chrono::seconds(10), [&] { return kept.size() >= count; }));
    return kept.back();
  }
  bool wait_gone(int count) const {
    const Deadline deadline = Deadline::in_seconds(10);
    while (gone < count && !deadline.passed())
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return gone == count;
  }

  std::mutex mutex;
  std::condition_variable arrived;
  std::vector<std::shared_ptr<Responder>> kept;
  std::atomic<int> gone{0};
  Server server;
  uint16_t port = 0;
};

TEST(HttpServer, AnswersWithTheHeadersOfTheSheet) {
  Site site;
  const Reply reply = fetch(site.port, "/hello?a=b");
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.body, "{\"query\":\"a=b\"}");
  EXPECT_TRUE(reply.has("Content-Type: application/json\r\n"));
  EXPECT_TRUE(reply.has("Content-Length: 15\r\n"));
  EXPECT_TRUE(reply.has("Connection: close\r\n"));
  EXPECT_TRUE(std::regex_search(
      reply.head, std::regex("RequestUUID: [0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-"
                             "f]{12}\r\n")))
      << reply.head;
}

TEST(HttpServer, RoutesByPathMethodAndPlane) {
  Site site;
  const Reply none = fetch(site.port, "/nowhere");
  EXPECT_EQ(none.status, 404);
  EXPECT_EQ(none.body, "");
  EXPECT_EQ(fetch(site.port, "/hidden").status, 404);  // of another plane
  const Reply wrong = post(site.port, "/hello", "{}");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_TRUE(wrong.has("Allow: GET\r\n"));
  EXPECT_EQ(fetch(site.port, "/under/a.b-c/ready").body, "/under/a.b-c/ready");
  const Reply head = ask(site.port, "HEAD /hello HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.body, "");
  EXPECT_TRUE(head.has("Content-Length: 12\r\n"));
}

TEST(HttpServer, AHandlerThatThrowsOrForgetsAnswers500) {
  Site site;
  for (const char* path : {"/throw", "/drop"}) {
    const Reply reply = post(site.port, path, "");
    EXPECT_EQ(reply.status, 500) << path;
    EXPECT_EQ(reply.body, "Server internal error");
  }
  EXPECT_EQ(fetch(site.port, "/hello").status, 200);
}

TEST(HttpServer, StreamsInChunksByteForByte) {
  Site site;
  Client client(site.port);
  client.send("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n");
  std::string text = client.read_until("0\r\n\r\n");
  text = std::regex_replace(text, std::regex("(RequestUUID|X-Request-Id): [0-9a-f-]+"), "$1: U");
  EXPECT_EQ(text,
            "HTTP/1.1 200 OK\r\nRequestUUID: U\r\nX-Request-Id: U\r\nContent-Type: text/event-stream\r\n"
            "Transfer-Encoding: chunked\r\nX-Extra: 1\r\n\r\n"
            "9\r\ndata: a\n\n\r\n9\r\ndata: b\n\n\r\n0\r\n\r\n");
  // The connection lives on after a stream.
  client.send("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(parse_reply(client.read_all()).status, 200);
}

TEST(HttpServer, ClientsOfHttp10GetNoChunks) {
  Site site;
  const Reply reply = ask(site.port, "GET /stream HTTP/1.0\r\n\r\n");
  EXPECT_FALSE(reply.has("chunked"));
  EXPECT_TRUE(reply.has("Connection: close"));
  EXPECT_EQ(reply.body, "data: a\n\ndata: b\n\n");
}

TEST(HttpServer, KeepsConnectionsWhereConfigured) {
  Site site({.close_after_answer = false});
  Client client(site.port);
  // The second and third request arrive together.
  client.send(post_text("/echo", "one"));
  EXPECT_TRUE(client.read_until("one").ends_with("one"));
  client.send(post_text("/echo", "two") + post_text("/echo", "three"));
  EXPECT_TRUE(client.read_until("two").ends_with("two"));
  EXPECT_TRUE(client.read_until("three").ends_with("three"));
  client.send("GET /hello HTTP/1.1\r\nConnection: close\r\n\r\n");
  EXPECT_NE(client.read_all().find("Connection: close"), std::string::npos);
}

TEST(HttpServer, RefusesABodyAboveTheLimitBeforeReadingIt) {
  Site site({.max_body_bytes = 1 << 20});
  const Reply declared = ask(
      site.port, "POST /echo HTTP/1.1\r\nContent-Length: 1048577\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(declared.status, 413);
  EXPECT_EQ(declared.body,
            "{\"message\":\"Request body too large. Maximum allowed size is 1MB.\"}");
  // A client that sends on all the same still gets to read the answer.
  EXPECT_EQ(post(site.port, "/echo", std::string(3 << 20, 'x')).status, 413);
  const std::string chunk = fmt::format("{:x}\r\n{}\r\n", 700000, std::string(700000, 'x'));
  EXPECT_EQ(ask(site.port, "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk +
                                    chunk + "0\r\n\r\n")
                .status,
            413);
  EXPECT_EQ(post(site.port, "/echo", std::string(1 << 20, 'x')).body.size(), size_t{1} << 20);
}

TEST(HttpServer, AsksForTheBodyOfAClientThatWaits) {
  Site site;
  Client client(site.port);
  client.send("POST /echo HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.send("body");
  EXPECT_EQ(parse_reply(client.read_all()).body, "body");
}

TEST(HttpServer, MalformedRequestsGet400AndDisturbNobody) {
  Site site;
  const std::string bad[] = {
      "\x16\x03\x01\x02\x05\x01\x00\x01 a TLS hello\r\n\r\n",
      "GARBAGE\r\n\r\n",
      "GET /hello HTTP/9.9\r\n\r\n",
      "GET /hello HTTP/1.1\r\nno colon here\r\n\r\n",
      "POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
      "POST /echo HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
      "POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
      std::string("GET /he\0llo HTTP/1.1\r\n\r\n", 25),
  };
  for (const auto& request : bad) {
    const Reply reply = ask(site.port, request);
    EXPECT_TRUE(reply.status == 400 || reply.status == 413) << request << reply.status;
    EXPECT_EQ(fetch(site.port, "/hello").status, 200);
  }
  const Reply reply = ask(site.port, "GARBAGE\r\n\r\n");
  EXPECT_TRUE(reply.body.starts_with("{\"error\":\"Malformed HTTP request: ")) << reply.body;
}

TEST(HttpServer, LimitsHeaderLines) {
  Site site;
  const auto with_header = [](size_t bytes) {
    return "GET /hello HTTP/1.1\r\nX-Long: " + std::string(bytes, 'a') + "\r\n\r\n";
  };
  EXPECT_EQ(ask(site.port, with_header(16000)).status, 200);
  EXPECT_EQ(ask(site.port, with_header(17000)).status, 431);
  EXPECT_EQ(ask(site.port, with_header(70000)).status, 431);
}

TEST(HttpServer, TellsOnceThatTheClientLeft) {
  Site site;
  {
    Client client(site.port);
    client.send("GET /later HTTP/1.1\r\n\r\n");
    const auto responder = site.wait_kept();
    EXPECT_EQ(site.gone, 0);
    client.close();
    EXPECT_TRUE(site.wait_gone(1));
    std::atomic<bool> late{false};
    responder->on_disconnect([&] { late = true; });
    const Deadline deadline = Deadline::in_seconds(5);
    while (!late && !deadline.passed()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_TRUE(late);
    responder->respond({.headers = {}});  // without effect
  }
  // Nor is it told when the answer was complete.
  Client client(site.port);
  client.send("GET /later HTTP/1.1\r\n\r\n");
  site.wait_kept(2)->respond({.body = "x", .headers = {}});
  EXPECT_EQ(parse_reply(client.read_all()).body, "x");
  client.close();
  EXPECT_EQ(fetch(site.port, "/hello").status, 200);
  EXPECT_EQ(site.gone, 1);
}

TEST(HttpServer, CutsASlowReader) {
  Site site({.max_buffered_bytes = 1 << 20});
  Client client(site.port, 4096);
  client.send("GET /later HTTP/1.1\r\n\r\n");
  const auto responder = site.wait_kept();
  responder->start_stream(200, "text/event-stream");
  for (int i = 0; i < 200 && site.gone == 0; ++i) responder->write(std::string(100000, 'x'));
  EXPECT_TRUE(site.wait_gone(1));
  client.read_all();
  EXPECT_TRUE(client.closed());
  EXPECT_EQ(fetch(site.port, "/hello").status, 200);
}

TEST(HttpServer, ClosesWhatStaysSilent) {
  Site site({.read_seconds = 0.2, .idle_seconds = 0.2, .close_after_answer = false});
  Client half(site.port);
  half.send("GET /hel");
  half.read_all();
  EXPECT_TRUE(half.closed());
  Client body(site.port);
  body.send("POST /echo HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc");
  EXPECT_EQ(body.read_all(), "");
  Client idle(site.port);
  idle.send("GET /hello HTTP/1.1\r\n\r\n");
  EXPECT_NE(idle.read_all().find("200 OK"), std::string::npos);
}

TEST(HttpServer, RefusesConnectionsAboveTheLimit) {
  Site site({.max_connections = 2});
  Client a(site.port), b(site.port);
  a.send("GET /later HTTP/1.1\r\n\r\n");
  b.send("GET /later HTTP/1.1\r\n\r\n");
  site.wait_kept(2);
  Client c(site.port);
  const Reply reply = parse_reply(c.read_all());
  EXPECT_EQ(reply.status, 503);
  EXPECT_TRUE(reply.has("Retry-After: 1\r\n"));
  a.close();
  b.close();
  EXPECT_TRUE(site.wait_gone(2));
  EXPECT_EQ(fetch(site.port, "/hello").status, 200);
}

// The records of finished requests, as the access log gets them.
struct Records {
  void operator()(const AccessRecord& record) {
    const std::lock_guard lock(mutex);
    list.push_back(record);
    changed.notify_all();
  }
  AccessRecord wait(size_t count) {
    std::unique_lock lock(mutex);
    EXPECT_TRUE(changed.wait_for(lock, std::chrono::seconds(10), [&] { return list.size() >= count; }));
    return list.size() >= count ? list[count - 1] : AccessRecord{};
  }
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<AccessRecord> list;
};

TEST(HttpServer, PassesRequestIdsAndTracesOnAndRecordsWhatHappened) {
  Records records;
  Site site({.on_finished = std::ref(records)});
  const std::string trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  const Reply reply =
      ask(site.port, "GET /hello?secret=1 HTTP/1.1\r\nX-Request-Id: r-17\r\ntraceparent: " + trace +
                         "\r\n\r\n");
  EXPECT_TRUE(reply.has("X-Request-Id: r-17\r\n")) << reply.head;
  EXPECT_TRUE(reply.has("traceparent: " + trace + "\r\n")) << reply.head;
  const AccessRecord record = records.wait(1);
  EXPECT_EQ(record.status, 200);
  EXPECT_EQ(record.path, "/hello");
  EXPECT_EQ(record.request_id, "r-17");
  EXPECT_EQ(record.trace, trace);
  EXPECT_GT(record.bytes, 100U);
  EXPECT_TRUE(std::regex_match(
      to_line(record),
      std::regex("access 127\\.0\\.0\\.1:\\d+ - \"GET /hello\" 200 \\d+ bytes, first [0-9.]+ ms, all "
                 "[0-9.]+ ms, id r-17 trace 00-.*-01")))
      << to_line(record);

  // A name that would break a line is replaced by ours, and so is a trace that is none.
  const Reply other = ask(site.port,
                          "GET /hello HTTP/1.1\r\nX-Request-Id: a\"b\r\ntraceparent: 00-zz\r\n\r\n");
  EXPECT_FALSE(other.has("a\"b"));
  EXPECT_TRUE(std::regex_search(other.head, std::regex("X-Request-Id: [0-9a-f-]{36}\r\n")));
  EXPECT_FALSE(other.has("traceparent"));
  EXPECT_EQ(records.wait(2).trace, "");

  // A client that leaves is told from one that was answered.
  {
    Client client(site.port);
    client.send("GET /later HTTP/1.1\r\n\r\n");
    (void)site.wait_kept();
  }
  EXPECT_EQ(records.wait(3).status, 499);
  EXPECT_EQ(fetch(site.port, "/nowhere").status, 404);
  EXPECT_EQ(records.wait(4).status, 404);
}

TEST(HttpServer, AsksForAnApiKeyBeforeItReadsTheBody) {
  Records records;
  Site site({.gate = {.key_digests = {net::sha256_hex("first"), net::sha256_hex("second")}},
             .on_finished = std::ref(records)});
  const auto with = [&](const std::string& header) {
    return post(site.port, "/echo", "x", header);
  };
  EXPECT_EQ(with("Authorization: Bearer second\r\n").body, "x");
  EXPECT_EQ(records.wait(1).user, "key 2");
  EXPECT_EQ(with("x-api-key: first\r\n").status, 200);
  for (const char* bad : {"", "Authorization: Bearer \r\n", "Authorization: Bearer third\r\n",
                          "Authorization: first\r\n", "Authorization: Basic first\r\n"}) {
    const Reply reply = with(bad);
    EXPECT_EQ(reply.status, 401) << bad;
    EXPECT_TRUE(reply.has("WWW-Authenticate: Bearer\r\n"));
    EXPECT_NE(reply.body.find("\"code\":\"invalid_api_key\""), std::string::npos) << reply.body;
  }
  // 40 MB that never come are not waited for.
  const Reply early = ask(site.port, "POST /echo HTTP/1.1\r\nContent-Length: 40000000\r\n\r\n");
  EXPECT_EQ(early.status, 401);
  EXPECT_EQ(ask(site.port, "GET /health HTTP/1.1\r\n\r\n").status, 404);  // no key asked
}

TEST(HttpServer, FollowsTheCorsRules) {
  Site site({.gate = {.key_digests = {net::sha256_hex("k")}, .origins = {"https://a.example"}}});
  const auto preflight = [&](const std::string& origin) {
    return ask(site.port, "OPTIONS /echo HTTP/1.1\r\nOrigin: " + origin +
                              "\r\nAccess-Control-Request-Method: POST\r\n"
                              "Access-Control-Request-Headers: authorization\r\n\r\n");
  };
  const Reply good = preflight("https://a.example");
  EXPECT_EQ(good.status, 200);
  EXPECT_TRUE(good.has("Access-Control-Allow-Origin: https://a.example\r\n")) << good.head;
  EXPECT_TRUE(good.has("Access-Control-Allow-Headers: authorization\r\n"));
  EXPECT_EQ(preflight("https://b.example").status, 400);
  const Reply answer =
      post(site.port, "/echo", "x", "Authorization: Bearer k\r\nOrigin: https://a.example\r\n");
  EXPECT_TRUE(answer.has("Access-Control-Allow-Origin: https://a.example\r\n"));
  // A refusal can be read by the page too.
  EXPECT_TRUE(post(site.port, "/echo", "x", "Origin: https://a.example\r\n")
                  .has("Access-Control-Allow-Origin: https://a.example\r\n"));
}

TEST(HttpServer, RefusesRequestsAboveTheLimitAtOnce) {
  Site site({.max_requests = 2});
  Client a(site.port), b(site.port);
  a.send("POST /echo HTTP/1.1\r\nContent-Length: 10\r\n\r\n1234");  // in progress from its head on
  b.send("POST /echo HTTP/1.1\r\nContent-Length: 10\r\n\r\n1234");
  Reply third;
  const Deadline deadline = Deadline::in_seconds(5);
  do third = post(site.port, "/echo", "x");
  while (third.status == 200 && !deadline.passed());
  EXPECT_EQ(third.status, 503);
  EXPECT_TRUE(third.has("Retry-After: 1\r\n"));
  EXPECT_NE(third.body.find("at most 2"), std::string::npos);
  EXPECT_EQ(fetch(site.port, "/hello").status, 200);  // probes are not counted
  a.close();
  b.send("567890");
  EXPECT_EQ(parse_reply(b.read_all()).body, "1234567890");
  Reply again;
  do again = post(site.port, "/echo", "x");
  while (again.status != 200 && !deadline.passed());
  EXPECT_EQ(again.status, 200);
}

TEST(HttpServer, CutsAReaderThatStopsAndASenderThatDrips) {
  Site site({.read_seconds = 0.3, .write_seconds = 0.3, .max_buffered_bytes = 64 << 20});
  Client reader(site.port, 4096);
  reader.send("GET /later HTTP/1.1\r\n\r\n");
  const auto responder = site.wait_kept();
  responder->start_stream(200, "text/event-stream");
  // More than the sockets hold, less than is buffered before the reader is cut at once.
  for (int i = 0; i < 60; ++i) {
    responder->write(std::string(100000, 'x'));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(site.wait_gone(1));

  Client sender(site.port);
  sender.send("POST /echo HTTP/1.1\r\nContent-Length: 100000\r\n\r\n");
  const Deadline deadline = Deadline::in_seconds(5);
  bool cut = false;
  while (!cut && !deadline.passed()) {
    cut = !sender.send("x");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_TRUE(cut);
}

TEST(HttpServer, StopWaitsForAnswersInProgressOnly) {
  Site site({.close_after_answer = false});
  Client idle(site.port);
  idle.send("GET /hello HTTP/1.1\r\n\r\n");
  idle.read_until("}");
  Client open(site.port);
  open.send("GET /later HTTP/1.1\r\n\r\n");
  const auto responder = site.wait_kept();
  std::thread answer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    responder->respond({.body = "in time", .headers = {}});
  });
  site.server.stop(Deadline::in_seconds(10));
  answer.join();
  EXPECT_EQ(parse_reply(open.read_all()).body, "in time");
  idle.read_all();
  EXPECT_TRUE(idle.closed());
  responder->write("after the end");  // harmless
}

TEST(HttpServer, NamesPlaneAddressAndReasonWhenItCannotListen) {
  Site site;
  ServerOptions taken;
  taken.listeners = {{"127.0.0.1", site.port, kBusiness | kMetrics}};
  try {
    Server server(taken);
    FAIL() << "two servers on one port";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kUnavailable);
    EXPECT_EQ(std::string(e.what()),
              fmt::format("Cannot listen on address 127.0.0.1 port {} for the business+metrics plane: "
                          "Address already in use. Fix: stop the program that uses port {} (`ss "
                          "-ltnp`), or configure another port.",
                          site.port, site.port));
  }
  ServerOptions foreign;
  foreign.listeners = {{"192.0.2.77", 1025, kBusiness}};
  try {
    Server server(foreign);
    FAIL() << "listens on a foreign address";
  } catch (const Error& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("192.0.2.77 port 1025"), std::string::npos) << text;
    EXPECT_NE(text.find("Local addresses: "), std::string::npos) << text;
    EXPECT_NE(text.find("127.0.0.1"), std::string::npos) << text;
  }
}

TEST(HttpServer, HoldsThePortButRefusesClientsBeforeStart) {
  ServerOptions options;
  options.listeners = {{"127.0.0.1", 0, kBusiness}};
  Server server(options);
  const uint16_t port = server.ports()[0];
  EXPECT_FALSE(Client(port).connected());
  options.listeners[0].port = port;
  EXPECT_THROW(Server{options}, Error);
  server.start();
  EXPECT_TRUE(Client(port).connected());
}

}  // namespace
}  // namespace phalanx::api
