#pragma once

// Tables of docs/models.md that the test run makes: a test writes one where
// PHALANX_WRITE_MODELS_TABLE names the page, and otherwise fails when the page says something else.

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "phalanx/base/json.h"

namespace phalanx::models {

// Without the fourth column: measured figures, whose last digit may differ between machines.
inline std::string without_figures(const std::string& table) {
  std::string names;
  size_t begin = 0;
  while (begin < table.size()) {
    const size_t end = std::min(table.find('\n', begin), table.size());
    int column = 0;
    for (size_t i = begin; i < end; ++i) {
      column += table[i] == '|' ? 1 : 0;
      if (column != 4 || table[i] == '|') names += table[i];
    }
    names += '\n';
    begin = end + 1;
  }
  return names;
}

// name: of the comments around it, "<!-- name: begin -->".
inline void hold_table(const std::string& name, const std::string& text) {
  const std::string begin_mark = "<!-- " + name + ": begin -->\n";
  const std::string end_mark = "<!-- " + name + ": end -->";
  const char* target = std::getenv("PHALANX_WRITE_MODELS_TABLE");
  const std::string path =
      target != nullptr ? target : std::string(PHALANX_ORACLE_DIR) + "/../../../docs/models.md";
  std::string page = read_text_file(path, 1 << 20);
  const size_t begin = page.find(begin_mark);
  const size_t end = page.find(end_mark);
  ASSERT_TRUE(begin != std::string::npos && end != std::string::npos && begin < end) << path;
  const size_t first = begin + begin_mark.size();
  if (target != nullptr) {
    page.replace(first, end - first, text);
    std::ofstream(path) << page;
    return;
  }
  EXPECT_EQ(without_figures(page.substr(first, end - first)), without_figures(text))
      << "PHALANX_WRITE_MODELS_TABLE=docs/models.md writes it anew";
}

}  // namespace phalanx::models
