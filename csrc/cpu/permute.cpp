// Permute: tokens gathered into the order of their experts.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "../checks.h"
#include "../moe.h"
#include "parallel.h"

namespace clipup {

void permute(const void* x, std::int64_t row_bytes, const std::int32_t* choice_of_row,
             const std::int32_t* rows_used, std::int64_t R, std::int64_t K, void* rows) {
  check_permute_sizes(row_bytes, R, K);
  check_pointer("choice_of_row", choice_of_row, R);
  check_pointer("rows_used", rows_used, 1);
  check_pointer("x", x, R * row_bytes);
  check_pointer("rows", rows, R * row_bytes);
  check_values("rows_used", rows_used, 1, 0, R + 1);
  check_values("choice_of_row", choice_of_row, *rows_used, 0, R);
  if (row_bytes == 0) return;

  const auto* from = static_cast<const unsigned char*>(x);
  auto* to = static_cast<unsigned char*>(rows);
  const std::int64_t used = *rows_used;
  parallel_for(R, parallel_from(row_bytes), [&](std::int64_t r) {
    if (r < used) {
      std::memcpy(to + r * row_bytes, from + choice_of_row[r] / K * row_bytes, row_bytes);
    } else {
      std::memset(to + r * row_bytes, 0, row_bytes);
    }
  });
}

}  // namespace clipup
