#include "phalanx/base/error.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"

namespace phalanx {
namespace {

TEST(Problems, ShowsAllAtOnce) {
  Problems problems;
  problems.add({.what = "port out of range", .where = "config.json: ServerConfig.port", .found = "80",
                .expected = "1024 to 65535", .fix = "choose a port above 1023"});
  problems.add({.what = "key missing", .where = "config.json: BackendConfig"});
  try {
    problems.throw_if_any("config.json cannot be used");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kInvalidArgument);
    EXPECT_STREQ(e.what(),
                 "config.json cannot be used (2 problems)\n"
                 "  1. config.json: ServerConfig.port: port out of range, found 80, expected 1024 to "
                 "65535. Fix: choose a port above 1023\n"
                 "  2. config.json: BackendConfig: key missing");
  }
}

TEST(Json, NamesPlaceOfFault) {
  try {
    (void)parse_json("{\n  \"a\": 1,\n  oops}", "x.json");
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("x.json: not valid JSON at line 3"), std::string::npos)
        << e.what();
  }
}

TEST(Json, RefusesDeepNesting) {
  EXPECT_THROW((void)parse_json(std::string(1'000'000, '['), "deep"), Error);
  EXPECT_EQ(parse_json("[[\"[[[[\"]]", "ok", 2)[0][0], "[[[[");
}

}  // namespace
}  // namespace phalanx
