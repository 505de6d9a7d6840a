#include "phalanx/base/log.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "phalanx/base/error.h"
#include "phalanx/base/log_file.h"

namespace phalanx {
namespace {

namespace fs = std::filesystem;

class Log : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "log-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override {
    set_up_log({});
    fs::remove_all(folder_);
  }
  std::string text(const std::string& name) const {
    std::ifstream in(fs::path(folder_) / name);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::string folder_;
};

TEST_F(Log, RotatesByNumberWithTheNewestFirst) {
  LogFile file(folder_ + "/a.log", 10, 2);
  for (const char* line : {"line 1\n", "line 2\n", "line 3\n", "line 4\n"}) file.write(line);
  EXPECT_EQ(text("a.log"), "line 4\n");
  EXPECT_EQ(text("a.01.log"), "line 3\n");
  EXPECT_EQ(text("a.02.log"), "line 2\n");
  EXPECT_FALSE(fs::exists(folder_ + "/a.03.log"));
  struct stat st {};
  ASSERT_EQ(::stat((folder_ + "/a.log").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777 & ~0640, 0);
}

TEST_F(Log, DoesNotWriteThroughALink) {
  fs::create_symlink(folder_ + "/elsewhere", folder_ + "/a.log");
  EXPECT_THROW(LogFile(folder_ + "/a.log", 10, 2), Error);
  EXPECT_FALSE(fs::exists(folder_ + "/elsewhere"));
}

TEST_F(Log, WritesJsonLinesThatParseWhateverIsSaid) {
  set_up_log({.to_stderr = false, .file = folder_ + "/a.log", .tag = "node \"x\"", .json = true});
  log_warn("a \"quoted\" \\ line\nand %v {} \x01", "more");
  const auto json = nlohmann::json::parse(text("a.log"));
  EXPECT_EQ(json["message"], "a \"quoted\" \\ line\nand %v more \x01");
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["who"], "node \"x\"");
}

TEST_F(Log, LevelCanBeChangedWhileItRuns) {
  set_up_log({.level = LogLevel::kError, .to_stderr = false, .file = folder_ + "/a.log"});
  log_info("not this");
  set_log_level(LogLevel::kInfo);
  log_info("but this");
  EXPECT_EQ(text("a.log").find("not this"), std::string::npos);
  EXPECT_NE(text("a.log").find("but this"), std::string::npos);
}

TEST_F(Log, AuditRecordsHaveTheFieldsOfTheSheet) {
  log_audit("system", "start", "success");  // no audit log: no effect
  set_up_log({.to_stderr = false, .audit_file = folder_ + "/audit.log"});
  log_audit("127.0.0.1:5", "Request mindie server, method=POST, uri is /v1/completions", "success");
  EXPECT_TRUE(std::regex_match(
      text("audit.log"),
      std::regex("\\[\\d{4}-\\d\\d-\\d\\d \\d\\d:\\d\\d:\\d\\d\\.\\d{6}\\] \\[\\d+\\] \\[[^\\]]+\\] "
                 "\\[127\\.0\\.0\\.1:5\\] \\[server\\] \\[Request mindie server, method=POST, uri is "
                 "/v1/completions\\] \\[success\\]\n")))
      << text("audit.log");
}

}  // namespace
}  // namespace phalanx
