#include "phalanx/base/guarded_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace phalanx {
namespace {

class GuardedFile : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "guarded-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = directory_ + "/a.json";
    ::unsetenv("MINDIE_CHECK_INPUTFILES_PERMISSION");
  }
  void TearDown() override {
    ::unsetenv("MINDIE_CHECK_INPUTFILES_PERMISSION");
    std::filesystem::remove_all(directory_);
  }
  void write(const std::string& text, mode_t mode) {
    std::ofstream(path_) << text;
    ASSERT_EQ(::chmod(path_.c_str(), mode), 0);
  }
  std::string read(const FileRule& rule = {}) {
    problems_ = {};
    warnings_ = {};
    return read_guarded_file(path_, rule, problems_, warnings_);
  }

  std::string directory_, path_;
  Problems problems_, warnings_;
};

TEST_F(GuardedFile, ReadsAnAdmittedFile) {
  write("hello", 0600);
  EXPECT_EQ(read(), "hello");
  EXPECT_TRUE(problems_.empty()) << problems_.to_string();
}

TEST_F(GuardedFile, NamesModeAndTheCommandThatMendsIt) {
  write("hello", 0664);
  EXPECT_EQ(read(), "hello");
  EXPECT_EQ(problems_.to_string(), "  1. " + path_ +
                                       ": file permissions too wide, found mode 0664, expected at "
                                       "most 0640. Fix: chmod 640 '" + path_ + "'");
}

TEST_F(GuardedFile, SwitchTurnsModeIntoWarningOnlyWhereItApplies) {
  write("hello", 0666);
  ::setenv("MINDIE_CHECK_INPUTFILES_PERMISSION", "0", 1);
  EXPECT_EQ(read(), "hello");
  EXPECT_TRUE(problems_.empty());
  EXPECT_EQ(warnings_.list().size(), 1u);
  EXPECT_EQ(read({.check_switch_applies = false}), "hello");
  EXPECT_EQ(problems_.list().size(), 1u);
}

TEST_F(GuardedFile, AnOwnersXBitOnlyWarnsWhereAllowed) {
  write("hello", 0700);
  EXPECT_EQ(read({.owner_x_warns = true}), "hello");
  EXPECT_TRUE(problems_.empty()) << problems_.to_string();
  EXPECT_NE(warnings_.to_string().find("found mode 0700"), std::string::npos);
  (void)read();
  EXPECT_FALSE(problems_.empty());
  write("hello", 0710);
  (void)read({.owner_x_warns = true});
  EXPECT_FALSE(problems_.empty());
}

TEST_F(GuardedFile, ChecksWithoutReading) {
  write("hello", 0600);
  EXPECT_TRUE(check_guarded_file(path_, {}, problems_, warnings_));
  EXPECT_TRUE(problems_.empty());
  write("hello", 0666);
  EXPECT_TRUE(check_guarded_file(path_, {}, problems_, warnings_));
  EXPECT_EQ(problems_.list().size(), 1u);
  EXPECT_FALSE(check_guarded_file(path_ + "x", {}, problems_, warnings_));
}

TEST_F(GuardedFile, RefusesLinkUnlessAllowed) {
  write("hello", 0640);
  const std::string link = directory_ + "/link";
  std::filesystem::create_symlink(path_, link);
  path_ = link;
  EXPECT_EQ(read(), "");
  EXPECT_NE(problems_.to_string().find(link + ": file is a symbolic link"), std::string::npos);
  EXPECT_EQ(read({.symlink_allowed = true}), "hello");
  EXPECT_TRUE(problems_.empty());
}

TEST_F(GuardedFile, SaysEmptyTooLargeMissingAndNotRegular) {
  write("", 0640);
  EXPECT_EQ(read(), "");
  EXPECT_NE(problems_.to_string().find("file is empty"), std::string::npos);
  write("123456", 0640);
  EXPECT_EQ(read({.max_bytes = 5}), "");
  EXPECT_NE(problems_.to_string().find("file is too large, found 6 bytes, expected at most 5"),
            std::string::npos);
  std::filesystem::remove(path_);
  EXPECT_EQ(read(), "");
  EXPECT_NE(problems_.to_string().find("cannot be opened: No such file"), std::string::npos);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0640), 0);
  EXPECT_EQ(read(), "");
  EXPECT_NE(problems_.to_string().find("not a regular file"), std::string::npos);
}

TEST_F(GuardedFile, NamesAnotherOwner) {
  if (::getuid() != 0) GTEST_SKIP() << "only root can give a file away";
  write("hello", 0640);
  ASSERT_EQ(::chown(path_.c_str(), 12345, static_cast<gid_t>(-1)), 0);
  (void)read();
  EXPECT_NE(problems_.to_string().find("found owner uid 12345, expected uid 0"), std::string::npos);
  (void)read({.root_exempt = true});
  EXPECT_TRUE(problems_.empty());
}

}  // namespace
}  // namespace phalanx
