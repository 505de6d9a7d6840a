#include "phalanx/api/request_journal.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>
#include <sstream>

#include "phalanx/api/testing.h"

namespace phalanx::api {
namespace {

using nlohmann::json;
using testing::Client;
using testing::fetch;
using testing::Instance;
using testing::post;
using testing::Reply;

class Journal : public ::testing::Test {
 protected:
  Journal() {
    std::string pattern = ::testing::TempDir() + "journal-XXXXXX";
    folder_ = ::mkdtemp(pattern.data());
    path_ = folder_ + "/requests";
  }
  ~Journal() override { std::filesystem::remove_all(folder_); }
  [[nodiscard]] static std::string text(const std::string& path) {
    std::ifstream in(path);
    std::stringstream all;
    all << in.rdbuf();
    return all.str();
  }
  [[nodiscard]] std::string text() const { return text(path_); }
  void write(const std::string& bytes) const {
    std::ofstream(path_) << bytes;
    ::chmod(path_.c_str(), 0600);
  }
  // Until the file is as a test wants it.
  template <typename Condition>
  [[nodiscard]] bool becomes(Condition condition) const {
    const Deadline deadline = Deadline::in_seconds(20);
    while (!deadline.passed()) {
      if (condition(text())) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }
  [[nodiscard]] static std::string refusal(const std::string& path) {
    try {
      const JournalFile file(path);
    } catch (const Error& error) {
      return error.what();
    }
    return "none";
  }
  std::string folder_, path_;
};

std::string completion(const std::string& prompt, const json& patch = json::object()) {
  json body = {{"model", "demo"}, {"prompt", prompt}, {"max_tokens", 8}};
  body.merge_patch(patch);
  return body.dump();
}

using Entries = std::map<uint64_t, std::string>;

TEST_F(Journal, FileKeepsWhatWasNotRemoved) {
  {
    JournalFile file(path_);
    file.add(std::vector<JournalFile::Entry>{{1, "a b"}, {2, "{}"}, {7, "-7"}});
    file.remove(std::vector<uint64_t>{2, 99});
    EXPECT_EQ(text(), "+1 a b\n+2 {}\n+7 -7\n-2\n");
  }
  const JournalFile again(path_);
  EXPECT_EQ(again.entries(), (Entries{{1, "a b"}, {7, "-7"}}));
  EXPECT_EQ(text(), "+1 a b\n+7 -7\n");
  struct stat s {};
  ASSERT_EQ(::stat(path_.c_str(), &s), 0);
  EXPECT_EQ(s.st_mode & 07777, 0600u);
}

TEST_F(Journal, FileSurvivesDamage) {
  for (const std::string& damage :
       {std::string("+3 torn"), std::string("-"), std::string("nothing\n"), std::string("+x y\n"),
        std::string("-1x\n"), std::string("+5\n"), std::string("\n\n"), std::string("-99\n"),
        std::string(100, '\0')}) {
    write("+1 one\n+2 two\n-2\n" + damage);
    EXPECT_EQ(JournalFile(path_).entries(), (Entries{{1, "one"}})) << damage;
    EXPECT_EQ(text(), "+1 one\n");
  }
}

TEST_F(Journal, FileStaysSmall) {
  JournalFile file(path_);
  file.add(std::vector<JournalFile::Entry>{{1, "stays"}});
  for (uint64_t n = 2; n < 500; ++n) {
    file.add(std::vector<JournalFile::Entry>{{n, std::string(20'000, 'x')}});
    file.remove(std::vector<uint64_t>{n});
    ASSERT_LT(std::filesystem::file_size(path_), 1'200'000u);
  }
  EXPECT_EQ(file.entries(), (Entries{{1, "stays"}}));
}

TEST_F(Journal, FilesThatCannotBeUsedAreRefusedByName) {
  EXPECT_EQ(refusal(folder_ + "/none/requests"),
            "request journal " + folder_ + "/none/requests cannot be used: No such file or directory. "
            "Fix: name a file in a folder that this user may write");
  write("");
  std::filesystem::create_symlink(path_, folder_ + "/link");
  EXPECT_NE(refusal(folder_ + "/link").find("it is a symbolic link"), std::string::npos);
  ::chmod(path_.c_str(), 0640);
  EXPECT_NE(refusal(path_).find("its mode is 0640, expected 0600. Fix: chmod 600 " + path_),
            std::string::npos);
  ::chmod(path_.c_str(), 0600);
  const JournalFile held(path_);
  EXPECT_NE(refusal(path_).find("another process holds it"), std::string::npos);
  EXPECT_NE(refusal(folder_).find("Is a directory"), std::string::npos);
}

TEST_F(Journal, RequestsAreOnDiskWhileTheyRun) {
  RequestJournal journal{JournalFile(path_)};
  Instance instance(Instance::default_options(), {}, true, &journal);
  instance.engine.hold = true;
  auto reply = std::async(std::launch::async, [&] {
    return post(instance.port, "/v1/completions", completion("Keep me"),
                "X-Request-Id: mine\r\nAuthorization: Bearer secret\r\n");
  });
  EXPECT_TRUE(becomes([](const std::string& t) { return t.find("Keep me") != std::string::npos; }));
  EXPECT_EQ(text().find("secret"), std::string::npos);
  EXPECT_EQ(fetch(instance.port, "/v1/requests/mine").status, 202);
  EXPECT_EQ(fetch(instance.port, "/v1/requests/other").status, 404);
  instance.engine.hold = false;
  EXPECT_EQ(reply.get().status, 200);
  EXPECT_TRUE(becomes([](const std::string& t) { return t.ends_with("-1\n"); })) << text();
  const Reply gone = fetch(instance.port, "/v1/requests/mine");
  EXPECT_EQ(gone.status, 404);
  EXPECT_NE(gone.body.find("No request 'mine' of this client is kept"), std::string::npos);
}

TEST_F(Journal, StreamsAndWhatIsNoRequestAreNotKept) {
  RequestJournal journal{JournalFile(path_)};
  Instance instance(Instance::default_options(), {}, true, &journal);
  EXPECT_EQ(post(instance.port, "/v1/completions", completion("a", {{"stream", true}})).status, 200);
  EXPECT_EQ(post(instance.port, "/generate_stream", R"({"inputs":"a"})").status, 200);
  EXPECT_NE(post(instance.port, "/v1/completions", "{").status, 200);
  EXPECT_NE(post(instance.port, "/v1/completions", "\"\xff\"").status, 200);
  EXPECT_EQ(post(instance.port, "/tokenize", R"({"prompt":"a"})").status, 200);
  EXPECT_EQ(text(), "");
  EXPECT_EQ(post(instance.port, "/v1/completions", completion("a")).status, 200);
  EXPECT_TRUE(becomes([](const std::string& t) { return t.starts_with("+1 {") && t.ends_with("-1\n"); }));
}

TEST_F(Journal, TheNextProcessAnswersWhatWasLeft) {
  {
    RequestJournal journal{JournalFile(path_)};
    Instance instance(Instance::default_options(), {}, true, &journal);
    instance.engine.hold = true;
    std::vector<std::future<Reply>> replies;
    for (int i = 0; i < 40; ++i)
      replies.push_back(std::async(std::launch::async, [&, i] {
        return post(instance.port, "/v1/completions", completion("Prompt " + std::to_string(i)),
                    "X-Request-Id: id" + std::to_string(i) + "\r\n");
      }));
    EXPECT_TRUE(becomes([](const std::string& t) { return std::count(t.begin(), t.end(), '\n') == 40; }));
    std::filesystem::copy_file(path_, path_ + ".crashed");  // as a process that is killed leaves it
    ::chmod((path_ + ".crashed").c_str(), 0600);
    instance.engine.hold = false;
    for (auto& reply : replies) EXPECT_EQ(reply.get().status, 200);
  }
  RequestJournal journal{JournalFile(path_ + ".crashed")};
  Instance instance(Instance::default_options(), {}, true, &journal);
  for (int i = 0; i < 40; ++i) {
    const std::string path = "/v1/requests/id" + std::to_string(i);
    const Deadline deadline = Deadline::in_seconds(20);
    Reply reply = fetch(instance.port, path);
    while (reply.status == 202 && !deadline.passed()) {
      EXPECT_TRUE(reply.has("Retry-After: 1\r\n"));
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      reply = fetch(instance.port, path);
    }
    ASSERT_EQ(reply.status, 200) << reply.body;
    const json body = json::parse(reply.body);
    EXPECT_EQ(body["choices"][0]["text"], "Hello.");
    EXPECT_EQ(body["usage"]["prompt_tokens"], i < 10 ? 8 : 9);
    EXPECT_EQ(fetch(instance.port, path).status, 404);  // once
  }
  EXPECT_EQ(std::ssize(instance.engine.requests), 40);
}

TEST_F(Journal, AnswersAreForWhoAsked) {
  write(R"(+4 {"id":"x","path":"/v1/completions","query":"","headers":{"content-type":"application/json"},)"
        R"("user":"key 2","peer":"127.0.0.1:9","body":"{\"model\":\"demo\",\"prompt\":\"Hi\"}"})" "\n"
        "+5 {\"id\":1}\n+6 no JSON\n");
  RequestJournal journal{JournalFile(path_)};
  Instance instance(Instance::default_options(), {}, true, &journal);
  EXPECT_TRUE(instance.engine.wait_running(0));
  EXPECT_EQ(fetch(instance.port, "/v1/requests/x").status, 404);
  EXPECT_TRUE(becomes([](const std::string& t) { return t.ends_with("-5\n-6\n"); })) << text();
}

TEST_F(Journal, AFullDiskRefusesByName) {
  RequestJournal journal{JournalFile(path_)};
  Instance instance(Instance::default_options(), {}, true, &journal);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_IGN);
  const rlimit none{.rlim_cur = 0, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &none), 0);
  const Reply refused = post(instance.port, "/v1/completions", completion("a"));
  const Reply stream = post(instance.port, "/v1/completions", completion("a", {{"stream", true}}));
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(refused.status, 503);
  EXPECT_NE(refused.body.find("The request journal cannot be written: File too large"),
            std::string::npos) << refused.body;
  EXPECT_EQ(stream.status, 200);
  EXPECT_EQ(post(instance.port, "/v1/completions", completion("a")).status, 200);
}

}  // namespace
}  // namespace phalanx::api
